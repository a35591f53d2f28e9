"""What must hold in every step, whatever the training loop is."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kdhooks.errors import KDHooksError, listed


def checked_labels(labels: object, images: Tensor) -> Tensor:
    """(b) or (b 1) whole numbers -> (b), as many as there are images."""
    if not isinstance(labels, Tensor):
        raise KDHooksError(
            f"labels must be a tensor (b) of class numbers; found {type(labels).__name__}"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise KDHooksError(
            f"labels must be class numbers (b); found shape {tuple(labels.shape)}; turn one-hot "
            "rows into numbers by labels.argmax(dim=1)"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise KDHooksError(
            f"labels must be whole numbers (b); found dtype {labels.dtype}; use labels.long() if "
            "they are class numbers"
        )
    if labels.shape[0] != images.shape[0]:
        raise KDHooksError(
            f"images and labels must be of the same samples; found {len(images)} and {len(labels)}"
        )
    return labels


def check_batch(images: Tensor, student: Tensor, teacher: Tensor | None) -> None:
    """(b 3 h w), (b d), (b e): a smaller batch would be broadcast, and train something else."""
    b = images.shape[0]  # a Tensor's len() is a Python call
    if student.shape[0] != b:
        raise KDHooksError(
            f"the student's last forward in training was of {len(student)} images, and kd was "
            f"given {b}; call kd once after each forward, with the images of that forward"
        )
    if teacher is not None and teacher.shape[0] != b:
        raise KDHooksError(
            f"the teacher must return one embedding for each of {b} images; found {len(teacher)}"
        )


def check_range(labels: Tensor, classes: int) -> Tensor | None:
    """(b) -> None, or (1): not a number if a label is beyond the classes, 0 otherwise.

    A processor tells at once; another device is not waited for, and the number is read later.
    Labels below 0 are samples without a class.
    """
    beyond = labels >= classes
    if labels.device.type != "cpu":
        return torch.where(beyond.any(), torch.nan, 0.0).reshape(1)
    if beyond.any():
        raise KDHooksError(out_of_range(labels, classes))
    return None


def out_of_range(labels: Tensor, classes: int) -> str:
    found = listed(map(str, sorted({label for label in labels.cpu().tolist() if label >= classes})))
    return (
        f"labels must be below the classifier's {classes} classes; found {found}; "
        "teacher.classifier and the training set must have the same classes in the same order"
    )


class NotCopied:
    """A copy or a pickle of its owner has None in its place: what it hooks is not copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


class OptimizerGuard(NotCopied):
    """Refuses the second step of the student's optimizer if no optimizer trains the losses.

    By then a loop that steps several optimizers in turn has stepped each. An optimizer that holds
    other parameters than the student's, as with FSDP, is not judged.
    """

    def __init__(self, student: nn.Module, losses: nn.Module) -> None:
        self.judged = False
        self._student, self._losses = ref(student), ref(losses)
        self._optimised: set[int] = set()  # ids of parameters
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        student, losses = self._student(), self._losses()
        if self.judged or student is None or losses is None:
            return
        groups: list[dict[str, Any]] = optimizer.param_groups
        given = {id(parameter) for group in groups for parameter in group["params"]}
        self._optimised |= given
        if given.isdisjoint(map(id, student.parameters())):
            return
        if optimizer in self._stepped:
            self.judged = True
            self._judge(dict(losses.named_parameters()))
        self._stepped.add(optimizer)

    def _judge(self, named: Mapping[str, nn.Parameter]) -> None:
        left = [n for n, p in named.items() if p.requires_grad and id(p) not in self._optimised]
        if left:
            raise KDHooksError(
                f"these parameters of the losses are in no optimizer: {listed(left)}; give the "
                "student's optimizer those of kd, or of the model that holds it, too, as "
                "kd.parameter_groups(weight_decay) returns them; requires_grad_(False) keeps one "
                "as it is"
            )

    def remove(self) -> None:
        self._handle.remove()
