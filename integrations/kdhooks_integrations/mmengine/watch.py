"""Whether a run trains what was asked for, whatever its train_step and its optimizers are."""

from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakSet, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kdhooks.errors import KDHooksError, listed

CHILD = "kdhooks"  # the student's child, so the prefix of its keys in checkpoints
NOT_RUN = (
    "mmengine: a step was trained, and the model's hooks did not run; its train_step must call the "
    "model itself, in training mode and with mode='loss', as BaseModel's does"
)


class Watch:
    """Looks on until an optimizer of the student's takes its second step, and judges before it.

    By then a model that steps several optimizers in turn has stepped each. A wrapper that keeps
    other parameters than the model's, as FSDP does, is not judged.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = ref(student)
        self._reached: dict[str, bool] = {}  # whether a term got a gradient
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._judged = False
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def note(self, terms: Mapping[str, Tensor]) -> None:
        """The terms of a step, before they are trained."""
        if self._judged:
            self._handle.remove()  # not while torch goes through its hooks
            return
        for name, term in terms.items():
            self._reached.setdefault(name, False)
            term.register_hook(partial(self._reach, name))

    def _reach(self, name: str, gradient: Tensor) -> None:
        self._reached[name] = True

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        student = self._student()
        if student is None or self._judged:
            return
        groups: list[dict[str, Any]] = optimizer.param_groups
        given = {id(parameter) for group in groups for parameter in group["params"]}
        if given.isdisjoint(map(id, student.parameters())):
            return
        if optimizer in self._stepped:
            self._judge()
            self._judged = True
        self._stepped.add(optimizer)

    def _judge(self) -> None:
        if not self._reached:
            raise KDHooksError(NOT_RUN)
        dropped = [name for name, reached in self._reached.items() if not reached]
        if dropped:
            raise KDHooksError(
                f"mmengine: a step was trained without {listed(dropped)}; the model's parse_losses "
                "and train_step must train the sum of all keys with 'loss' in their names, as "
                "BaseModel's do"
            )
