"""The callback `Distill`, which attaches the distillation during a Trainer's fit."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError, listed
from kdhooks.kinds import Option
from kdhooks.options import check_arguments
from kdhooks.recipe import Recipe
from kdhooks_integrations.lightning.attachment import Attachment, Replaced, Settings
from kdhooks_integrations.lightning.batches import Place
from kdhooks_integrations.lightning.joining import Joined
from kdhooks_integrations.lightning.packages import Callback, package_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

log = logging.getLogger("kdhooks")

_ARGUMENTS = {
    "student": Option(str | None, None),
    "images": Option(str | int | None, None),
    "labels": Option(str | int | None, None),
    "classifier": Option(str | None, None),
    "prog_bar": Option(bool, False),
}


class Distill(Callback):  # type: ignore[misc]  # lightning may not be installed
    """Distil the student of a LightningModule while a Trainer fits it.

    Trainer(callbacks=[Distill("kd.toml")])
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, Any] | str | Path,
        *,
        student: str | None = None,
        images: Place | None = None,
        labels: Place | None = None,
        classifier: str | None = None,
        prog_bar: bool = False,
    ) -> None:
        """
        recipe: a TOML file, or its keys as a dict, in which `teacher` may be a module.
        student: path of the submodule that is the student, such as "model"; "" is the
            LightningModule itself. By default, the one child that returns an embedding (b d).
        images: place of the teacher's images in a batch, such as 0 or "image"; by default, the
            teacher sees the images that the student was given in the training step.
        labels: place of the class numbers (b) in a batch, such as 1 or "label"; by default, the
            second part of a list or tuple, or "labels", "label", "targets", "target" or "y".
        classifier: path of the student's own class weights (c d), such as "head.weight", for
            methods that compare its logits.
        prog_bar: whether the progress bar shows the terms, too.
        """
        super().__init__()
        given = check_arguments("lightning: Distill", _ARGUMENTS, locals())
        checked = Recipe.read(recipe)
        checked.refuse_tables("lightning")
        self._settings = Settings(checked, **given)
        self.distiller: Distiller | None = None  # the distiller of this fit or of the last one
        self._state: dict[str, Any] | None = None  # a state that was loaded before the distiller
        self._attachment: Attachment | None = None
        self._joined: Joined | None = None
        self._late: Replaced | None = None

    # --- the fit -----------------------------------------------------------------------------

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Attach after the module has created its layers, and before the optimizers exist."""
        if stage != "fit":
            return
        _check(trainer, self)
        self._remove()
        averaged = _averaging(trainer) is not None  # it copies the module immediately after this
        if _overrides(trainer, pl_module, "configure_model"):
            self._late = Replaced(pl_module, "configure_model", self._after)
        elif _overrides(trainer, pl_module, "setup") and not averaged:
            self._late = Replaced(pl_module, "setup", self._after)
        else:
            self._attach(pl_module)

    def _after(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        hook(*args, **kwargs)
        if self._attachment is None:
            # Lightning may call this hook in another default dtype and on another device.
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                with torch.device("cpu"):
                    self._attach(hook.__self__)  # type: ignore[attr-defined]  # a method
            finally:
                torch.set_default_dtype(before)

    def _attach(self, module: "LightningModule") -> None:
        # A second fit continues from the state of the first one, as the module does.
        state = self._state if self.distiller is None else self.distiller.state_dict()
        self._attachment = Attachment(module, self._settings)
        self.distiller = self._attachment.distiller
        if state is not None:
            self.load_state_dict(state)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Join the optimizer before its state is loaded."""
        attachment = self._attachment
        if attachment is None:
            raise KDHooksError(
                f"lightning: {type(pl_module).__name__} overrides setup or configure_model, but "
                "Lightning called neither; create its layers in __init__"
            )
        if any(parameter.requires_grad for parameter in attachment.distiller.parameters()):
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._joined = Joined(
                attachment.distiller, attachment.student, trainer.optimizers, schedules
            )

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Set the number of steps per epoch, for schedules that count epochs."""
        assert self.distiller is not None
        batches = trainer.num_training_batches
        if isinstance(batches, int):
            self.distiller.steps_per_epoch = batches or None
        elif self.distiller.in_epochs:
            raise KDHooksError(
                f"lightning: {listed(self.distiller.in_epochs)}: a schedule counts epochs, and the "
                "training data has no length; give its start, stop and warmup in steps, without "
                "unit = 'epoch', or set limit_train_batches of the Trainer"
            )

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Check that the numbers of the last step were finite."""
        if self.distiller is not None:
            self.distiller.check_finite()

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        if stage == "fit":
            self._detach()

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        """Restore the module. The optimizer keeps its groups: a checkpoint may still be saved."""
        if self._late is not None:
            self._late.restore()
            self._late = None
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def _remove(self) -> None:
        """Remove everything that an earlier fit has left."""
        self._detach()
        if self._joined is not None:
            self._joined.remove()
            self._joined = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the attachments, so that a copy or a pickle is attached to nothing."""
        return {**vars(self), "_attachment": None, "_joined": None, "_late": None}

    # --- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the losses' parameters and state and the step, but not the teacher."""
        if self.distiller is None:
            return self._state or {}
        return dict(self.distiller.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.distiller is None:
            self._state = state_dict
            return
        try:
            self.distiller.load_state_dict(state_dict)
        except RuntimeError as error:
            raise KDHooksError(
                "lightning: this checkpoint was written with other methods than the recipe's; "
                f"resume with the checkpoint's methods, or start a new run; {error}"
            ) from error

    def on_load_checkpoint(
        self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        if self._attachment is not None and self.state_key not in checkpoint["callbacks"]:
            log.warning(
                "checkpoint written without kdhooks: the methods start from their first step"
            )


# --- requirements of a fit -------------------------------------------------------------------


def _check(trainer: "Trainer", callback: Distill) -> None:
    strategies = package_of(trainer).strategies
    strategy = trainer.strategy
    known = isinstance(strategy, strategies.SingleDeviceStrategy | strategies.DDPStrategy)
    if not known or strategy.handles_gradient_accumulation:
        raise KDHooksError(
            "lightning: the strategy must keep the whole student on each device, as 'auto' and "
            f"'ddp' do; found {type(strategy).__name__}; choose one of these"
        )
    averaging = _averaging(trainer)
    order = _callbacks(trainer)
    if averaging is not None and order.index(averaging) < order.index(callback):
        raise KDHooksError(
            f"lightning: Distill must stand before {type(averaging).__name__} among the callbacks, "
            "since that callback copies the LightningModule with all its children; found it after; "
            "change their order"
        )


def _averaging(trainer: "Trainer") -> Callback | None:
    """Return Lightning's callback that averages the weights, if the Trainer has it."""
    kind = getattr(package_of(trainer).callbacks, "WeightAveraging", ())  # since Lightning 2.6
    return next((one for one in _callbacks(trainer) if isinstance(one, kind)), None)


def _callbacks(trainer: "Trainer") -> list[Callback]:
    found: list[Callback] = vars(trainer)["callbacks"]  # Lightning does not declare its type
    return found


def _overrides(trainer: "Trainer", module: "LightningModule", hook: str) -> bool:
    return getattr(type(module), hook) is not getattr(package_of(trainer).LightningModule, hook)
