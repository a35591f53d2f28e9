"""Adds the terms to the losses that an MMEngine model returns."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import Tensor, nn

from kdhooks.balance import Balance
from kdhooks.copies import IdleCopy
from kdhooks.errors import KDHooksError, in_one_line, listed
from kdhooks.generators import undisturbed_generators
from kdhooks.recipe import build
from kdhooks.views.entrance import Look
from kdhooks_integrations.mmengine.checkpoints import readable
from kdhooks_integrations.mmengine.epochs import check_numbers, length, running_loop
from kdhooks_integrations.mmengine.forward import Arguments, Forward, mixing_augments
from kdhooks_integrations.mmengine.images import Seen
from kdhooks_integrations.mmengine.models import (
    Conventions,
    own_classifier,
    with_embedding,
    with_teacher,
)
from kdhooks_integrations.mmengine.options import Options

log = logging.getLogger("kdhooks")

CHILD = "kdhooks"  # the name of the student's child, and the prefix of its keys in checkpoints
TERM = "loss_kd_"  # MMEngine sums all values whose names contain 'loss'
_PIXELS = 16.0  # larger values in images mean that they are not normalised


class Distillation(nn.Module):
    """The student's child, which computes the terms from the arguments of the student's forward."""

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, student: nn.Module, options: Options) -> None:
        super().__init__()
        self.forward_of = Forward(student, options.images, options.labels, options.indices)
        recipe = with_embedding(options.recipe, student)
        device = next(student.parameters()).device
        seen = Seen.of(student).but(options.input)
        head, doubt = own_classifier(student, options.classifier)
        with readable():  # a teacher's checkpoint
            with undisturbed_generators(recipe.seed, device):
                recipe = with_teacher(recipe, seen)
            self.distiller = build(
                recipe,
                student,
                head=head,
                learnt_whole=True,  # the Runner saves the state of rank 0
                plugins=[Conventions()],
                run_student=lambda images: self._run(student, images),
            )
        self._counted = not options.indices or options.indices.endswith("sample_idx")
        try:
            self._check_labels(student, doubt)
            self._check_indices(student, options.indices)
        except BaseException:
            self.distiller.remove()
            raise
        self.distiller.view_by(self._viewed)
        self.distiller.advise(
            "in MMEngine, train_step must call the model itself, in training mode and with "
            "mode='loss', and parse_losses must train the sum of all keys with 'loss' in their "
            "names, as BaseModel's do"
        )
        scale, shift, self.bgr = seen.to_recipes()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.register_load_state_dict_pre_hook(self._complete)  # type: ignore[no-untyped-call]
        self.ran = False  # whether this process has distilled a step
        self._others = ""  # the error to raise if the loaded checkpoint has other methods

    def _check_labels(self, student: nn.Module, doubt: str) -> None:
        """Refuse methods for which the student has no suitable labels or logits."""
        for tap in self.distiller.taps:
            if tap.needs_head and doubt:
                raise KDHooksError(f"mmengine: {tap.name} {doubt}")
        mixing = mixing_augments(student)
        if self.distiller.labelled and mixing:
            raise KDHooksError(
                f"mmengine: {listed(self.distiller.labelled)} need one class number for each "
                f"image, but the student's batch_augments ({listed(mixing)}) mix images of two "
                "classes; remove these (train_cfg.augments in mmpretrain), or use methods without "
                "labels, such as fcd"
            )

    def _check_indices(self, student: nn.Module, path: str) -> None:
        """path: the place of the samples' numbers, as the config names it."""
        if path and not self.distiller.by_index:
            raise KDHooksError(
                f"mmengine: indices = '{path}' is the place of the samples' numbers for a table of "
                "embeddings, but no teacher is a table; leave it out, or name the file of a table "
                "as teacher.embeddings"
            )
        if self.distiller.by_index and (mixing := mixing_augments(student)):
            raise KDHooksError(
                "mmengine: a table of embeddings has one row for each sample, but the student's "
                f"batch_augments ({listed(mixing)}) mix images of two; remove these "
                "(train_cfg.augments in mmpretrain), or use the network itself as the teacher"
            )

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that are trained besides the student's."""
        return [p for p in self.parameters() if p.requires_grad]

    def apply(self, fn: Callable[[nn.Module], None]) -> "Distillation":
        """Do nothing: MMEngine applies the student's init_cfg, which would redraw our weights."""
        return self

    def extended(self, losses: object, arguments: Arguments) -> dict[str, Any]:
        """Return the model's losses, with loss_kd_* to be trained and kd/* for the log."""
        if not isinstance(losses, dict):
            raise KDHooksError(
                "mmengine: the student's forward must return a dict of losses in mode 'loss'; "
                f"found {type(losses).__name__}"
            )
        if not self.ran:
            self._set_first_step()
            self._set_epoch()
        images = self._given(arguments)
        labels = None
        if self.distiller.labelled:
            labels = self.forward_of.labels(arguments, len(images), first=not self.ran)
            labels = labels.to(images.device)
        indices = None
        if self.distiller.by_index:
            if self._counted and not self.ran:
                check_numbers(_loop())
            indices = self.forward_of.indices(arguments, len(images))
        task = _times(losses, self.distiller.task_weight)
        seen_by_teacher = self._as_recipe_says(images)
        if not self.ran:
            _check_range(seen_by_teacher)
        terms = self.distiller(images, labels, teacher_images=seen_by_teacher, indices=indices)
        self.ran = True
        ours = {f"{TERM}{name}": term for name, term in terms.items()}
        ours.update({_unsummed(name): value for name, value in self.distiller.metrics.items()})
        for key in ours:
            if key in losses:
                raise KDHooksError(
                    f"mmengine: the student's losses already have the key '{key}', which kdhooks "
                    "uses; rename it"
                )
        return {**task, **ours}

    def compare_gradients(self, losses: Mapping[str, Any]) -> Balance:
        """Compare the gradients of the terms with that of the model's own losses.

        See `Distiller.compare_gradients`. losses: what the model returned in mode 'loss'.
        """
        expected = [f"{TERM}{name}" for name in self.distiller.losses]
        if not isinstance(losses, Mapping) or not losses.keys() >= set(expected):
            found = listed(losses) if isinstance(losses, Mapping) else type(losses).__name__
            raise KDHooksError(
                f"mmengine: compare_gradients needs a dict of losses with {listed(expected)}; "
                f"found {found}; pass what the model returns in mode 'loss', in training mode with "
                "gradients"
            )
        terms = {name: losses[f"{TERM}{name}"] for name in self.distiller.losses}
        own = (
            part.mean()
            for key, value in losses.items()
            if "loss" in key and not key.startswith(TERM)
            for part in (value if isinstance(value, list) else [value])
        )
        task = sum(own, start=torch.zeros(()))  # as BaseModel.parse_losses adds them up
        return self.distiller.compare_gradients(task, terms)

    def _set_first_step(self) -> None:
        """Reset the step if a runner has loaded a checkpoint without resuming it."""
        iteration = MessageHub.get_current_instance().get_info("iter")  # None without a runner
        if iteration == 0:
            self.distiller.set_extra_state(torch.tensor(0))
        elif iteration is not None and self._others:
            raise KDHooksError(self._others)

    def _set_epoch(self) -> None:
        """Set the number of steps per epoch for schedules, unless a script has set it."""
        distiller = self.distiller
        if distiller.steps_per_epoch is not None:
            return
        loop = _loop()
        distiller.steps_per_epoch = None if loop is None else length(loop)
        if distiller.steps_per_epoch is None and distiller.in_epochs:
            why = (
                "no loop of MMEngine runs this step"
                if loop is None
                else "the train_dataloader has no length"
            )
            raise KDHooksError(
                f"mmengine: {listed(distiller.in_epochs)}: a schedule counts epochs, but {why}; "
                "give its start, stop and warmup in iters, without unit='epoch', or set "
                "model.kdhooks.distiller.steps_per_epoch in a script"
            )

    def _as_recipe_says(self, images: Tensor) -> Tensor:
        """Convert the student's images to a recipe's: RGB, (pixel - 127.5) / 127.5."""
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        if self.bgr:
            images = images.flip(1)
        return images

    def _as_student_sees(self, images: Tensor) -> Tensor:
        """Convert a recipe's images to the student's; the inverse of `_as_recipe_says`."""
        if self.bgr:
            images = images.flip(1)
        if self.scale is not None and self.shift is not None:
            images = (images - self.shift) / self.scale
        return images

    # --- the student's view --------------------------------------------------------------------

    def _viewed(
        self, look: Look, images: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Apply the view, which needs a recipe's images, in mode 'loss' only."""
        arguments = self.forward_of.named(args, kwargs)
        if arguments.get("mode") != "loss":
            return None
        if self.forward_of.images(arguments) is not images:
            raise KDHooksError(
                "mmengine: student_view needs the images before all other tensors (b 3 h w) among "
                f"the arguments of the student's forward; found {tuple(images.shape)} before them; "
                "change the order of the arguments"
            )
        if not self.ran:
            self._set_first_step()  # the view's random draws depend on the step
        seen = look(self._as_recipe_says(images))
        return self._as_student_sees(seen).to(images.dtype)

    def _given(self, arguments: Arguments) -> Tensor:
        """Return the trainer's images; with a view, the arguments hold the changed images."""
        images = None if self.distiller.student_view is None else self.distiller.pending
        return self.forward_of.images(arguments) if images is None else images

    def _run(self, student: nn.Module, images: Tensor) -> None:
        """Run the student in mode 'tensor', or in mode 'predict' if 'tensor' returns None."""
        try:
            if self.forward_of.call(student, images, "tensor") is None:
                self.forward_of.call(student, images, "predict")
        except KDHooksError:
            raise
        except Exception as error:
            raise KDHooksError(
                f"mmengine: the student must run on images {tuple(images.shape)} alone, in mode "
                f"'tensor'; found {in_one_line(error)}; set input_shape to the shape of its images"
            ) from error

    def other_methods(self, state: Iterable[str], prefix: str = f"{CHILD}.") -> str:
        """Return an error for a checkpoint with these keys if it has other methods, else ""."""
        trained = [f"{prefix}{name}" for name, p in self.named_parameters() if p.requires_grad]
        found = [key for key in state if key.startswith(prefix)]
        return "" if [key for key in found if key in trained] == trained else refusal(found)

    def _complete(self, _: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
        """Complete a checkpoint that was written without kdhooks."""
        if any(key.startswith(prefix) for key in state):
            self._others = self.other_methods(state, prefix)
            return
        log.warning(
            "checkpoint written without kdhooks: the methods start from their first step%s",
            "; to resume from it, and not only load_from it, add custom_hooks = "
            "[dict(type='kdhooks.ResumeHook')]; otherwise its optimizer state lacks their weights"
            if self.trained()
            else "",
        )
        state.update(self.state_dict(prefix=prefix))


def _loop() -> Any:
    find: Any = running_loop
    if torch.compiler.is_compiling():
        find = torch.compiler.disable(find)  # compiled code cannot inspect frames
    return find()


def _times(losses: dict[str, Any], factor: float) -> dict[str, Any]:
    """Multiply the losses that MMEngine sums; each is a tensor or a list of tensors."""
    if factor == 1:
        return losses
    scaled = dict(losses)
    for key, value in losses.items():
        if "loss" in key and isinstance(value, Tensor):
            scaled[key] = value * factor
        elif "loss" in key and isinstance(value, list | tuple):
            scaled[key] = [one * factor for one in value]
    return scaled


def _check_range(images: Tensor) -> None:
    low, high = (float(bound) for bound in images.aminmax())
    if max(-low, high) > _PIXELS:
        raise KDHooksError(
            f"mmengine: images must be normalised; found values up to {max(-low, high):.0f}; "
            "normalise them in the data_preprocessor, or specify that the student's images are "
            "pixels: input = dict(mean=0, std=1)"
        )
    if low >= 0 and high <= 1:
        log.warning(
            "all images of the first batch are in [0, 1], and are treated as "
            "(pixel - 127.5) / 127.5; if they are pixel / 255, set input = dict(mean=0, std=255)"
        )


def refusal(found: Iterable[str]) -> str:
    weights = (key for key in found if not key.endswith("_extra_state"))
    return (
        "mmengine: this checkpoint was written with other methods, or with methods in another "
        "order, and the optimizer's state has no names that distinguish them; it holds: "
        f"{listed(weights)}; resume with the checkpoint's methods, or use load_from without resume"
    )


def _unsummed(name: str) -> str:
    """Return a name without 'loss', so MMEngine does not add the value to the loss."""
    return f"kd/{name.replace('loss', 'term')}"


class _AddTerms(IdleCopy):
    """The forward hook of the student; it does nothing in a copy, such as EMAHook's."""

    def __init__(self, distillation: Distillation) -> None:
        self._distillation = distillation

    def __call__(
        self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], losses: object
    ) -> dict[str, Any] | None:
        if not (student.training and torch.is_grad_enabled()):
            return None
        arguments = self._distillation.forward_of.named(args, kwargs)
        if arguments.get("mode") != "loss":
            self._distillation.distiller.discard()
            return None
        try:
            return self._distillation.extended(losses, arguments)
        except BaseException:
            # Otherwise the next try would find the outputs of this forward.
            self._distillation.distiller.discard()
            raise


def attach(student: nn.Module, options: Options) -> Distillation:
    """Add distillation to this model, before it is wrapped or its optimizer is built."""
    if not isinstance(student, BaseModel):
        raise KDHooksError(
            "mmengine: the student must be a BaseModel, which computes its own losses; found "
            f"{type(student).__name__}"
        )
    if hasattr(student, CHILD):
        raise KDHooksError(
            "mmengine: this model is distilled already; keep kdhooks.Distill around it or one "
            "kdhooks.DistillHook, and remove the other"
        )
    distillation = Distillation(student, options)
    student.add_module(CHILD, distillation)
    student.register_forward_hook(_AddTerms(distillation), with_kwargs=True)
    return distillation
