"""Adds the terms to the loss of a LightningModule's training step."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import update_wrapper
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdhooks.copies import IdleCopy
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks.recipe import Recipe, build
from kdhooks_integrations.lightning.batches import Place, images_in, labels_in
from kdhooks_integrations.lightning.models import classifier_rows, find_student

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

log = logging.getLogger("kdhooks")

CHILD = "kdhooks"  # the name of the LightningModule's child


@dataclass(frozen=True)
class Settings:
    """The arguments of `Distill`, checked."""

    recipe: Recipe
    student: str | None
    images: Place | None
    labels: Place | None
    classifier: str | None
    prog_bar: bool


class Attachment:
    """The distillation of one LightningModule, until `remove`."""

    def __init__(self, module: "LightningModule", settings: Settings) -> None:
        if hasattr(module, CHILD):
            raise KDHooksError(
                f"lightning: this LightningModule already has an attribute '{CHILD}'; keep one "
                "Distill among the callbacks, or rename the attribute"
            )
        recipe = settings.recipe
        self.path, student = find_student(module, settings.student, recipe)
        self.distiller: Distiller = build(
            recipe,
            student,
            head=classifier_rows(module, settings.classifier),
            learnt_whole=True,  # the Trainer saves the state of rank 0
        )
        self.student = student
        self._module, self._settings = module, settings
        self._batch: Any = None  # the batch of the current training step
        self._warned = False
        self._outside = ExitStack()  # entered while the module runs outside its training step
        self.distiller.advise(
            "in Lightning, training_step must call the student itself, in training mode and once "
            "for each batch, and return its loss; with manual optimization, it must call "
            "self.manual_backward(loss)"
        )
        # The module's checkpoints must be those of a run without kdhooks.
        self.distiller.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
        self.distiller.register_load_state_dict_pre_hook(_keep)  # type: ignore[no-untyped-call]
        module.add_module(CHILD, self.distiller)
        self._replaced = [
            Replaced(module, "training_step", self._step),
            Replaced(module, "manual_backward", self._backward),
        ]
        self._handles: list[RemovableHandle] = []
        if student is module:
            # DistributedDataParallel runs the training step inside the module's own forward.
            self._handles = [
                module.register_forward_pre_hook(_Outside(self._open), prepend=True),
                module.register_forward_hook(_Outside(self._outside.close), always_call=True),
            ]
        name = self.path or "the LightningModule itself"
        log.info("lightning: the student is %s, a %s", name, type(student).__name__)

    # --- one step ----------------------------------------------------------------------------

    def _step(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the training step, and return its output with the terms added to the loss."""
        self._outside.close()
        self._batch = next(iter((*args, *kwargs.values())), None)
        try:
            output = training_step(*args, **kwargs)
            if not self._module.automatic_optimization:
                return output
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor):
                return output  # None skips the batch
            total = self._extended(loss)
            return {**output, "loss": total} if isinstance(output, Mapping) else total
        finally:
            self._batch = None
            # A forward is still pending if the step was skipped or has raised.
            if self.distiller.pending is not None:
                self.distiller.discard()

    def _backward(
        self, manual_backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Add the terms to the first loss that is backpropagated after the student's forward."""
        if self._batch is not None and self.distiller.pending is not None:
            loss = self._extended(loss)
        return manual_backward(loss, *args, **kwargs)

    def _extended(self, loss: Tensor) -> Tensor:
        """Return the loss of the student's last forward, times task_weight, plus the terms."""
        distiller, settings = self.distiller, self._settings
        images = distiller.pending
        if images is None:
            self._undistilled()
            return loss
        labels = None
        if distiller.labelled:
            labels = labels_in(self._batch, settings.labels).to(images.device)
        theirs = None
        if settings.images is not None:
            theirs = images_in(self._batch, settings.images)
        factor = distiller.task_weight
        task = loss if factor == 1 else loss * factor
        terms = distiller(images, labels, teacher_images=theirs)
        self._log(terms, len(images))
        return sum(terms.values(), start=task)

    def _undistilled(self) -> None:
        if not self.distiller.fired:
            raise KDHooksError(
                f"lightning: training_step returned a loss, but the student '{self.path}' did not "
                "run in training mode; call it as a module, self.model(images) instead of "
                "self.model.forward(images), and in training mode; or name the module that runs "
                "as Distill(…, student='path')"
            )
        if not self._warned:
            self._warned = True
            log.warning("lightning: the student did not run in a training step; it has no terms")

    def _log(self, terms: Mapping[str, Tensor], size: int) -> None:
        metrics = self.distiller.metrics
        values = {f"{CHILD}/{name}": value for name, value in metrics.items()}
        if metrics:  # empty in steps whose terms are not logged
            values |= {f"{CHILD}/{name}/weighted": term.detach() for name, term in terms.items()}
        if self.distiller.skipped:
            values[f"{CHILD}/skipped"] = torch.tensor(float(self.distiller.skipped))
        for name, value in values.items():
            self._module.log(name, value, prog_bar=self._settings.prog_bar, batch_size=size)

    def _open(self) -> None:
        if self._batch is None:
            self._outside.enter_context(self.distiller.paused())

    # --- the end -----------------------------------------------------------------------------

    def remove(self) -> None:
        """Restore the LightningModule."""
        self._outside.close()
        self.distiller.remove()
        for handle in self._handles:
            handle.remove()
        for replaced in self._replaced:
            replaced.restore()
        if getattr(self._module, CHILD, None) is self.distiller:
            delattr(self._module, CHILD)


class Replaced:
    """Replaces a method of an object by another function; a copy has the original method."""

    def __init__(self, owner: object, name: str, through: Callable[..., Any]) -> None:
        self._owner, self._name, self._through = owner, name, through
        self._own = vars(owner).get(name)  # torch.compile, for example, sets an instance attribute
        self._method: Callable[..., Any] = getattr(owner, name)
        update_wrapper(self, self._method)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._through(self._method, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own is not None:
            return _itself, (self._own,)
        return getattr, (self._owner, self._name)  # the method of the copy's class

    def restore(self) -> None:
        if self._own is not None:
            setattr(self._owner, self._name, self._own)
        else:
            vars(self._owner).pop(self._name, None)


def _itself(value: Any) -> Any:
    return value


class _Outside(IdleCopy):
    """A hook of the module that calls a given function without arguments."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def __call__(self, *_: object) -> None:
        self._function()


def _leave_out(kd: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """State dict hook: leaves kd out of the state dict of the module that holds it."""
    if prefix:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]


def _keep(kd: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Load hook: keeps the state of kd when the module that holds it is loaded."""
    if prefix:
        state.update({f"{prefix}{key}": value for key, value in kd.state_dict().items()})
