"""Compares the gradients of a step's losses, which decide how much the student learns from each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdhooks.errors import KDHooksError, listed

Parts: TypeAlias = Sequence[Tensor | None]
"""A gradient, with a part for each parameter of the student; None where the loss has none."""

# In docs/results, the terms that teach have gradients of 0.2 to 25 times those of the labels' loss,
# and a term with a hundredth of it taught nothing.
DWARFS = 30.0
"""If a term's gradient is this many times the task's, it leaves the task 3 % of the step."""
NEGLIGIBLE = 1e-2
"""If a term's gradient is a smaller multiple of the task's, it changes almost nothing."""


_LOSS_SCALE = 65536.0  # the initial scale of torch's GradScaler


@dataclass(frozen=True)
class Weighted:
    """A loss (), multiplied by its weight in this step."""

    loss: Tensor
    weight: float  # the recipe's
    by_schedule: bool = False  # if true, weight is the highest value of a schedule


@dataclass(frozen=True)
class Pull:
    """A loss times its weight, and the norm of its gradient at the student's parameters."""

    loss: float
    gradient: float
    weight: float
    by_schedule: bool = False  # if true, weight is the highest value of a schedule


@dataclass(frozen=True)
class Balance:
    """The losses of one step. `str` lists the norms, and names each disproportionate term."""

    task: Pull
    terms: Mapping[str, Pull]
    whole: float  # norm of the sum of all gradients
    accumulation: int = 1  # batches that the trainer sums before it clips
    clip: float | None = None  # the norm to which the trainer clips the gradient, if it is known

    def __str__(self) -> str:
        return "; ".join([self.described(), *self.conclusions()])

    @property
    def clipped(self) -> bool:
        return self.clip is not None and self.whole * self.accumulation > self.clip

    @property
    def task_share(self) -> float:
        """The norm of the task's gradient, as a share of the sum of all norms."""
        every = self.task.gradient + sum(term.gradient for term in self.terms.values())
        return self.task.gradient / every if every else 1.0

    def ratio(self, name: str) -> float | None:
        """Return the norm of a term's gradient divided by the task's; None if the task has none."""
        return self._term(name).gradient / self.task.gradient if self.task.gradient else None

    def balancing_weight(self, name: str) -> float | None:
        """Return the weight that would make a term's gradient as long as the task's."""
        term = self._term(name)
        return term.weight * self.task.gradient / term.gradient if term.gradient else None

    def _term(self, name: str) -> Pull:
        if name not in self.terms:
            raise KDHooksError(
                "compare_gradients: the name must be that of a term that was compared; found "
                f"'{name}' with {listed(self.terms)}; terms of weight 0 are left out"
            )
        return self.terms[name]

    def described(self) -> str:
        lengths = {"task": self.task, **self.terms}
        found = ", ".join(f"{name} {pull.gradient:.3g}" for name, pull in lengths.items())
        found += f", all together {self.whole:.3g}"
        if self.clip is None:
            return found
        batches = f"sums {self.accumulation} batches and " if self.accumulation > 1 else ""
        rule = (
            f"clips them to {self.clip:g}" if self.clipped else f"clips nothing below {self.clip:g}"
        )
        return f"{found}; the trainer {batches}{rule}"

    def conclusions(self) -> list[str]:
        """Return a sentence on each disproportionate term, with the weight that balances it."""
        dwarfing = [name for name in self.terms if (self.ratio(name) or 0) >= DWARFS]
        negligible = [
            name
            for name, term in self.terms.items()
            if term.gradient and (self.ratio(name) or 1) < NEGLIGIBLE
        ]
        keeps = f"the task keeps {_percent(self.task_share)} of the step"
        kept = f"with clipping at {self.clip:g} {keeps}" if self.clipped else keeps
        said = [
            f"{name}: its gradient is {_number(self.ratio(name) or 0)} times the task's "
            f"({self._lengths(name)}); {kept}; {self._way_out(name)}"
            for name in dwarfing
        ]
        if not dwarfing and 0 < self.task_share <= 1 / (1 + DWARFS):
            said.append(
                f"{' and '.join(self.terms)}: their gradients together are "
                f"{_number(1 / self.task_share - 1)} times the task's; {kept}; lower their weights"
            )
        said += [
            f"{name}: its gradient is 1/{1 / (self.ratio(name) or 1):,.0f} of the task's "
            f"({self._lengths(name)}), so it changes almost nothing; {self._way_out(name)}"
            for name in negligible
        ]
        return said

    def _lengths(self, name: str) -> str:
        return f"{_number(self.terms[name].gradient)} to {_number(self.task.gradient)}"

    def _way_out(self, name: str) -> str:
        key = "weight.value" if self.terms[name].by_schedule else "weight"
        return f"{key} = {self.balancing_weight(name):.2g} would balance them"

    def as_json(self) -> dict[str, Any]:
        terms = {
            name: {
                **asdict(term),
                "ratio": self.ratio(name),
                "balancing_weight": self.balancing_weight(name),
            }
            for name, term in self.terms.items()
        }
        return {
            "task": asdict(self.task),
            "terms": terms,
            "together": self.whole,
            "clip": self.clip,
            "clipped": self.clipped,
            "task_share": self.task_share,
            "conclusions": self.conclusions(),
        }


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else f"{share * 100:.1g} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def compare(
    task: Weighted,
    terms: Mapping[str, Weighted],
    gradient: Callable[[Tensor], Parts],
    clip: float | None = None,
    accumulation: int = 1,
) -> Balance:
    """Compare the trainer's own loss with the terms.

    gradient: returns the gradient of a loss () at the student's parameters, and keeps the graph.
    """
    own, whole = _pulled("task", task, gradient)
    pulls = {}
    for name, term in terms.items():
        pulls[name], parts = _pulled(name, term, gradient)
        whole = [_sum(total, part) for total, part in zip(whole, parts, strict=True)]
    return Balance(own, pulls, _length(whole), accumulation, clip)


def _pulled(
    name: str, given: Weighted, gradient: Callable[[Tensor], Parts]
) -> tuple[Pull, list[Tensor | None]]:
    """Measure a loss; name: the subject of errors."""
    parts = _unscaled(given.loss, gradient)
    value, length = float(given.loss.detach()), _length(parts)
    if not math.isfinite(length):
        raise KDHooksError(
            f"{name}: the gradient of its loss must be finite; found {length}, with a loss of "
            f"{value:.4g}; lower its weight, or use other taps"
        )
    if value != 0 and length == 0:
        raise KDHooksError(
            f"{name}: its loss is {value:.4g}, but no gradient reaches the student; use taps whose "
            "parameters the student trains"
        )
    return Pull(value, length, given.weight, given.by_schedule), parts


def _unscaled(loss: Tensor, gradient: Callable[[Tensor], Parts]) -> list[Tensor | None]:
    """Scale the loss as GradScaler does, so that no small gradient in float16 becomes 0.

    The scale is halved until nothing overflows. It is a power of two, so it rounds nothing.
    """
    scale = _LOSS_SCALE
    while True:
        parts = [None if part is None else part / scale for part in gradient(loss * scale)]
        if scale <= 1 or math.isfinite(_length(parts)):
            return parts
        scale /= 2


def _length(parts: Parts) -> float:
    squares = [part.double().square().sum() for part in parts if part is not None]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
