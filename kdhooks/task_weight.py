"""The factor of the trainer's own loss."""

from kdhooks.errors import KDHooksError
from kdhooks.schedules import Schedule, Scheduled, counts_epochs
from kdhooks.teacher_rows import Inherited
from kdhooks.terms import weight_at


class TaskWeight:
    """A number, a schedule or a function, and whether the loop has read it."""

    def __init__(self, value: Scheduled, inherited: Inherited | None) -> None:
        """inherited: the term that the trainer's own head computes, if there is one."""
        if inherited is not None and value != 1:
            raise KDHooksError(
                f"task_weight must be 1 if the trainer's own head computes {inherited.name}, since "
                f"the trainer then has no other loss; found {_shown(value)}; give "
                f"{inherited.name} a weight instead, or set its head = 'own'"
            )
        self.value = value
        self.asked = inherited is not None

    @property
    def in_epochs(self) -> bool:
        return counts_epochs(self.value)

    def at(self, step: int, steps_per_epoch: int | None) -> float:
        """Return the factor in this step, and note that the loop has read it."""
        self.asked = True
        return self.value_at(step, steps_per_epoch)

    def value_at(self, step: int, steps_per_epoch: int | None) -> float:
        """Return the factor in this step."""
        if not callable(self.value):
            return self.value
        return weight_at("task_weight", self.value, step, steps_per_epoch)

    def check_asked(self) -> None:
        """Refuse a factor other than 1 that the loop has never read."""
        if not self.asked and self.value != 1:
            raise KDHooksError(
                f"task_weight is {_shown(self.value)}, but the loop has never read it, so the "
                "trainer's own loss counts in full; train kd.task_weight * task_loss and the "
                "terms, or leave out task_weight"
            )


def _shown(value: Scheduled) -> str:
    if isinstance(value, Schedule):
        return "a schedule"
    return "a function" if callable(value) else str(value)
