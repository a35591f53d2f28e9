"""Numbers that change while the student trains."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias, TypeGuard

from torch import nn

from kdhooks.errors import KDHooksError
from kdhooks.options import REQUIRED, Options, option


class Schedule(Options):
    """A number that is `initial`, then changes linearly to `value`, then may return to `initial`.

    The change starts at `start` and takes `warmup`; from `stop` on, the number is `initial` again.
    A step is one batch; the first step is 0. An epoch is `Distiller.steps_per_epoch` batches. A
    term of weight 0 is still computed, so that no parameter ever enters or leaves the graph.
    """

    bounded = ("value", "initial")

    value: float = option(REQUIRED, "The number after the warm-up.")
    initial: float | None = option(
        None, "The number until `start`, and again from `stop` on; by default 0."
    )
    start: float = option(0, "When the change from `initial` to `value` starts.", least=0)
    stop: float | None = option(
        None, "When the number returns to `initial`; by default never.", least=0
    )
    warmup: float = option(
        0, "The duration of the linear change from `initial` to `value`.", least=0
    )
    unit: Literal["step", "epoch"] = option("step", "The unit of `start`, `stop` and `warmup`.")

    def check(self) -> None:
        if self.initial is None:  # a constant never uses it, and 0 may be out of bounds
            changes = self.start or self.warmup or self.stop is not None
            object.__setattr__(self, "initial", 0.0 if changes else self.value)
        if self.unit == "step":
            for name in ("start", "stop", "warmup"):
                found = getattr(self, name)
                if found is not None and found != int(found):
                    raise self.refused(name, f"must be a whole number of steps; found {found}")
        if self.stop is not None and self.stop <= self.start + self.warmup:
            raise self.refused(
                "stop",
                "must come after start + warmup, or else `value` is never reached; found stop "
                f"{self.stop}, start {self.start}, warmup {self.warmup}",
            )

    def __call__(self, position: float) -> float:
        """Return the number at this step, or at this epoch."""
        assert self.initial is not None
        if position < self.start or (self.stop is not None and position >= self.stop):
            return self.initial
        risen = min(1.0, (position - self.start) / self.warmup) if self.warmup else 1.0
        return self.initial + (self.value - self.initial) * risen if risen < 1 else self.value


Scheduled: TypeAlias = float | Schedule | Callable[[int], float]
"""A number, a schedule, or a function from the step (the first is 0) to a number."""


def counts_epochs(value: Scheduled) -> TypeGuard[Schedule]:
    return isinstance(value, Schedule) and value.unit == "epoch"


def number_at(value: Scheduled, step: int, steps_per_epoch: int | None) -> float:
    """Return the number in this step.

    Raises:
        KDHooksError: the schedule counts epochs, and the number of steps in an epoch is not set.
    """
    if not callable(value):
        return value
    if not counts_epochs(value):
        return value(step)
    if steps_per_epoch is None:
        raise KDHooksError(
            "a schedule counts epochs, and the number of steps in an epoch is not known; pass "
            "Distiller(…, steps_per_epoch=len(loader)), or use a schedule in steps"
        )
    return value(step / steps_per_epoch)


def times(value: Scheduled, factor: float) -> Scheduled:
    """Return a number, schedule or function multiplied by a constant."""
    if isinstance(value, Schedule):
        assert value.initial is not None
        return replace(value, value=value.value * factor, initial=value.initial * factor)
    if callable(value):
        return lambda step: factor * value(step)
    return factor * value


class Varying(nn.Module):
    """A number of a loss that may follow a schedule: `now` is its value in the current step.

    A Distiller finds it among the loss's modules and sets its step; before that, the step is 0.
    """

    def __init__(self, value: "Scheduled | Varying") -> None:
        super().__init__()
        self.value: Scheduled = value.value if isinstance(value, Varying) else value
        self._step = 0
        self._steps_per_epoch: int | None = None

    def move(self, step: int, steps_per_epoch: int | None) -> None:
        self._step, self._steps_per_epoch = step, steps_per_epoch

    @property
    def changes(self) -> bool:
        return callable(self.value)

    @property
    def now(self) -> float:
        return number_at(self.value, self._step, self._steps_per_epoch)
