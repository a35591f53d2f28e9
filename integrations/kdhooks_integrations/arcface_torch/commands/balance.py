"""Compares the gradients of a step's losses, considering the trainer's clipping."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

CLIP = 5.0
"""The trainer clips the gradient of the backbone to this norm before each optimizer step."""
DWARFS = 10.0
"""If a term's gradient is this many times the task's, it leaves the task 9 % of the step."""
NEGLIGIBLE = 1e-3
"""If a term's gradient is a smaller multiple of the task's, it changes almost nothing."""


@dataclass(frozen=True)
class Pull:
    """A loss times its weight, and the norm of its gradient at the backbone's parameters."""

    loss: float
    gradient: float
    weight: float
    by_schedule: bool = False  # if true, weight is the highest value of a schedule


@dataclass(frozen=True)
class Balance:
    """The losses of one step."""

    task: Pull
    terms: Mapping[str, Pull]
    whole: float  # norm of the sum of all gradients
    accumulation: int = 1  # batches that the trainer sums before it clips

    @property
    def clipped(self) -> bool:
        return self.whole * self.accumulation > CLIP

    @property
    def task_share(self) -> float:
        """The norm of the task's gradient, as a share of the sum of all norms."""
        every = self.task.gradient + sum(term.gradient for term in self.terms.values())
        return self.task.gradient / every if every else 1.0

    def ratio(self, name: str) -> float | None:
        """Return the norm of a term's gradient divided by the task's; None if the task has none."""
        return self.terms[name].gradient / self.task.gradient if self.task.gradient else None

    def balancing_weight(self, name: str) -> float | None:
        """Return the weight that would make a term's gradient as long as the task's."""
        term = self.terms[name]
        return term.weight * self.task.gradient / term.gradient if term.gradient else None

    def described(self) -> str:
        lengths = {"task": self.task, **self.terms}
        found = ", ".join(f"{name} {pull.gradient:.3g}" for name, pull in lengths.items())
        batches = f"sums {self.accumulation} batches and " if self.accumulation > 1 else ""
        rule = f"clips them to {CLIP:g}" if self.clipped else f"clips nothing below {CLIP:g}"
        return f"{found}, all together {self.whole:.3g}; the trainer {batches}{rule}"

    def conclusions(self) -> list[str]:
        """Return a sentence on each disproportionate term, with the weight that balances it."""
        dwarfing = [name for name in self.terms if (self.ratio(name) or 0) >= DWARFS]
        negligible = [
            name
            for name, term in self.terms.items()
            if term.gradient and (self.ratio(name) or 1) < NEGLIGIBLE
        ]
        keeps = f"the task keeps {_percent(self.task_share)} of the step"
        kept = f"with clipping at {CLIP:g} {keeps}" if self.clipped else keeps
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
            "clip": CLIP,
            "clipped": self.clipped,
            "task_share": self.task_share,
            "conclusions": self.conclusions(),
        }


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else f"{share * 100:.1g} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
