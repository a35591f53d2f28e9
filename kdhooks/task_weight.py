"""The factor of the trainer's own loss."""

from kdhooks.declarations import check_weight
from kdhooks.errors import KDHooksError
from kdhooks.schedules import Schedule, Scheduled, counts_epochs, number_at
from kdhooks.teacher_rows import Inherited


class TaskWeight:
    """A number or a schedule, and whether anybody has asked for it."""

    def __init__(self, value: Scheduled, inherited: Inherited | None) -> None:
        """inherited: the term that the trainer's own head computes, if there is one."""
        if inherited is not None and value != 1:
            raise KDHooksError(
                f"task_weight must be 1 if the trainer's own head computes {inherited.name}, since "
                f"there is no other loss of the trainer's; found {_shown(value)}; give "
                f"{inherited.name} a weight instead, or set its head = 'own'"
            )
        self.value = value
        self.asked = inherited is not None

    @property
    def in_epochs(self) -> bool:
        return counts_epochs(self.value)

    def at(self, step: int, steps_per_epoch: int | None) -> float:
        """The factor in this step."""
        self.asked = True
        if not callable(self.value):
            return self.value
        factor = number_at(self.value, step, steps_per_epoch)
        check_weight(f"task_weight, step {step}", factor)
        return float(factor)

    def check_asked(self) -> None:
        """Refuse a factor that nothing has multiplied the trainer's loss by."""
        if not self.asked and self.value != 1:
            raise KDHooksError(
                f"task_weight is {_shown(self.value)}, and the loop has never read it, so that the "
                "trainer's own loss counts in full; train kd.task_weight * task_loss and the "
                "terms, or leave task_weight out"
            )


def _shown(value: Scheduled) -> str:
    if isinstance(value, Schedule):
        return "a schedule"
    return "a function" if callable(value) else str(value)
