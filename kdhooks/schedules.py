"""A weight that begins, rises and ends with the training steps."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kdhooks.declarations import check_weight
from kdhooks.errors import KDHooksError, listed, near_miss


@dataclass(frozen=True)
class Schedule:
    """0 before `start`, a straight line to `value` over `warmup` steps, 0 from `stop` on.

    A step is a batch, the first is 0. A term of weight 0 is computed all the same, so that no
    parameter ever enters or leaves the graph.
    """

    value: float
    start: int = 0
    stop: int | None = None
    warmup: int = 0

    @classmethod
    def read(cls, name: str, table: Mapping[str, Any]) -> "Schedule":
        """From the table that stands for a method's weight in a recipe."""
        known = [field.name for field in fields(cls)]
        for key in table:
            if key not in known:
                raise KDHooksError(
                    f"{name}: weight has no key '{key}'; {near_miss(str(key), known)}"
                    f"its keys are: {listed(known)}"
                )
        if "value" not in table:
            raise KDHooksError(f"{name}: weight needs 'value'; found {listed(map(str, table))}")
        check_weight(f"{name}: weight.value", table["value"])
        for key in ("start", "stop", "warmup"):
            if key in table:
                _check_steps(f"{name}: weight.{key}", table[key])
        schedule = cls(**table)
        if schedule.stop is not None and schedule.stop <= schedule.start + schedule.warmup:
            raise KDHooksError(
                f"{name}: weight.stop must come after start and warm-up, or the weight never gets "
                f"to its value; found stop {schedule.stop}, start {schedule.start}, warmup "
                f"{schedule.warmup}"
            )
        return schedule

    def __call__(self, step: int) -> float:
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 0.0
        risen = (step - self.start) / self.warmup if self.warmup else 1.0
        return self.value * min(1.0, risen)


def _check_steps(what: str, found: object) -> None:
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise KDHooksError(f"{what} must be a number of steps, at least 0; found {found!r}")
