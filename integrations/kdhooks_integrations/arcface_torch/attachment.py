"""Adds the terms to the loss of the trainer's heads, in each step, and reports them."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from kdhooks.classes.ranks import world
from kdhooks.copies import IdleCopy
from kdhooks.errors import KDHooksError
from kdhooks.recipe import Recipe, build
from kdhooks.teacher_rows import Inherited
from kdhooks_integrations.arcface_torch.arguments import (
    check_kinds,
    checked_heads,
    refuse_late,
)
from kdhooks_integrations.arcface_torch.heads import refuse_other_split, shard_of, weight_of
from kdhooks_integrations.arcface_torch.interval import Interval, ScalarWriter
from kdhooks_integrations.arcface_torch.joining import Joined
from kdhooks_integrations.arcface_torch.networks import Backbones, teacher_factories

log = logging.getLogger("kdhooks")


class Attachment:
    """The distillation of one backbone and its heads, until `remove`."""

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module],
        optimizer: Optimizer,
        schedule: LRScheduler,
        recipe: Recipe,
        get_model: Callable[..., nn.Module] | None,
        accumulation: int | None,
        steps_per_epoch: int | None,
    ) -> None:
        shards = [shard_of(head) for head in heads]
        self.distiller = build(
            recipe,
            backbone,
            network=teacher_factories(get_model, recipe),
            head=shards[0] if len(shards) == 1 else None,
            host_head="margin",
            plugins=[Backbones()],
            steps_per_epoch=steps_per_epoch or _steps_per_epoch(),
        )
        self.distiller.accumulation = accumulation or _gradient_acc()
        self.distiller.advise(
            "in arcface_torch, each batch must go through all attached heads in their order, by "
            "calls that run the hooks of the backbone and of the heads"
        )
        self._images: Tensor | None = None  # images of the batch that some heads have not seen yet
        self._labels: list[Tensor] = []  # labels of this batch from the heads that have run so far
        self._losses: list[Tensor] = []  # losses of these heads
        self._handles: list[RemovableHandle] = []
        self._interval = Interval()
        self._start: int | None = None  # the schedule's last_epoch at the first batch
        self._warned = False
        self.rank = 0 if world() is None else dist.get_rank()
        try:
            self._share_classifier(heads)
        except KDHooksError:
            self.distiller.remove()  # otherwise its hooks would keep every batch in memory
            raise
        self._joined = Joined(self.distiller, optimizer, schedule)
        offset = 0
        for head, shard in zip(heads, shards, strict=True):
            hook = _Terms(self, offset)
            self._handles.append(head.register_forward_hook(hook, with_kwargs=True))
            self._handles.append(head.register_load_state_dict_pre_hook(refuse_other_split))
            offset += shard.total

    # --- the classifier ----------------------------------------------------------------------

    def _share_classifier(self, heads: Sequence[nn.Module]) -> None:
        inherited = self.distiller.inherited
        names = [tap.name for tap in self.distiller.taps if tap.needs_classifier]
        names += [inherited.name] if inherited else []
        if names and len(heads) > 1:
            raise KDHooksError(
                f"{names[0]} uses one classifier, and the trainer has {len(heads)} heads; "
                f"leave {names[0]} out, or train with one head"
            )
        if inherited:
            self._inherit(inherited, heads[0])

    def _inherit(self, inherited: Inherited, head: nn.Module) -> None:
        """Copy the teacher's rows into the head's weight and freeze it.

        The head's own margin loss is then the term.
        """
        weight = weight_of(head)
        if not isinstance(weight, nn.Parameter):
            raise KDHooksError(
                f"{inherited.name}: the head must have a parameter 'weight' to hold the teacher's "
                f"rows; found {type(weight).__name__}; set head = 'own'"
            )
        weight.requires_grad_(False)

        def hold(*_: object) -> None:
            weight.data.copy_(inherited.rows())

        def hold_once(*_: object) -> None:
            hold()
            first.remove()

        # A checkpoint of a run without kdhooks has another classifier than the teacher's. Heads
        # from before 2023 load it without calling hooks, so the rows are copied again at the first
        # forward.
        first = head.register_forward_pre_hook(hold_once)
        self._handles += [first, head.register_load_state_dict_post_hook(hold)]
        hold()
        log.info("%s: the head holds the teacher's %d rows, frozen", inherited.name, len(weight))

    # --- one step ----------------------------------------------------------------------------

    @property
    def task_weight(self) -> float:
        """The factor of the head's loss in this step."""
        inherited = self.distiller.inherited
        return inherited.weight if inherited else self.distiller.task_weight

    def add_terms(self, head: nn.Module, loss: Tensor, labels: Tensor) -> Tensor | None:
        """Return the head's loss; for the last head of the batch, with all terms added."""
        images = self.distiller.pending
        if images is None:
            if head.training and torch.is_grad_enabled():
                self._undistilled()
            return None
        task_weight = self.task_weight
        task = loss * task_weight
        if (batch := self._whole_batch(images, labels, loss.detach())) is None:
            return task
        together, whole = batch
        if self._start is None:
            self._start = self._joined.schedule.last_epoch
        terms = self.distiller(images, together)
        if self.distiller.metrics or not terms:  # otherwise this step's terms are left out
            inherited = self.distiller.inherited
            name = inherited.name if inherited else "" if task_weight == 1 else "task"
            own = {name: whole} if name else {}
            weighted = {name: whole * task_weight} if name else {}
            self._interval.add({**own, **self.distiller.metrics}, {**weighted, **terms})
        return sum(terms.values(), start=task)

    def _undistilled(self) -> None:
        """Refuse or report a training batch on which no hook of the backbone ran."""
        if not self.distiller.fired:
            raise KDHooksError(
                "arcface_torch: the head ran, but the backbone's hooks did not; call the backbone "
                "that was attached, in training mode; if it is compiled, attach before its first "
                "call"
            )
        if not self._warned:
            self._warned = True
            log.warning(
                "arcface_torch: the head ran on a batch without distillation: the backbone was in "
                "eval mode, or a head ran twice for one batch"
            )

    def _whole_batch(
        self, images: Tensor, labels: Tensor, loss: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return all labels and the sum of the losses once all heads have run, until then None."""
        if self._images is not images:  # the previous batch was not completed
            self._images, self._labels, self._losses = images, [], []
        self._labels.append(labels)
        self._losses.append(loss)
        if sum(map(len, self._labels)) < len(images):
            return None
        together, losses = torch.cat(self._labels), self._losses
        self._images, self._labels, self._losses = None, [], []
        return together, losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    # --- the log -----------------------------------------------------------------------------

    def report(self, global_step: int, writer: ScalarWriter | None = None) -> None:
        """Log the means since the last report, and write them to TensorBoard as `kdhooks/…`."""
        self.distiller.check_finite()
        means = self._interval.means()
        log.info("kdhooks, step %d: %s", global_step, self._described(means))
        if writer is not None:
            for name, mean in means.items():
                writer.add_scalar(f"kdhooks/{name}", mean, global_step)

    def summary(self) -> None:
        """Log the means of the whole run."""
        means = self._interval.overall()
        log.info("kdhooks, all %d steps: %s", self.distiller.step, self._described(means))

    def _described(self, means: Mapping[str, float]) -> str:
        terms = [name for name in means if f"{name}/weighted" in means]
        notes = [name for name in means if name not in terms and not name.endswith("/weighted")]
        parts = [
            f"{name} {means[name]:.4f} (weighted {means[f'{name}/weighted']:.4f})" for name in terms
        ]
        parts += [f"{name} {means[name]:.4f}" for name in notes]
        parts += [f"{self.skipped} optimizer steps skipped"] if self.skipped else []
        left_out = self.distiller.skipped
        parts += [f"{left_out} steps without terms that were not finite"] if left_out else []
        return ", ".join(parts) or "no terms"

    @property
    def skipped(self) -> int:
        """The number of steps that a GradScaler skipped because gradients overflowed.

        Fused optimizers skip inside their own step; these skips are not counted.
        """
        if self._start is None:
            return 0
        each, now = self.distiller.accumulation, self._joined.schedule.last_epoch
        return max(0, now // each - self._start // each - self._joined.steps)

    def adopt(self, schedule: LRScheduler) -> None:
        """Add another schedule of the same optimizer, which was created later."""
        self._joined.adopt(schedule)

    def remove(self) -> None:
        """Remove all hooks. An inherited classifier keeps the teacher's rows."""
        self.distiller.remove()
        self._joined.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Terms(IdleCopy):
    """The forward hook of a head; it does nothing in a copy of the head."""

    def __init__(self, attachment: Attachment, offset: int) -> None:
        self._attachment = attachment
        self._offset = offset  # the number of classes of the heads before it

    def __call__(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: object
    ) -> Tensor | None:
        given = [*args, *kwargs.values()]
        if len(given) < 2 or not isinstance(given[1], Tensor) or not isinstance(loss, Tensor):
            raise KDHooksError(
                f"arcface_torch: {type(head).__name__} must be called with embeddings and labels "
                f"and return its loss; found {len(given)} arguments and a {type(loss).__name__}"
            )
        if loss.ndim:
            raise KDHooksError(
                f"arcface_torch: {type(head).__name__} must return its loss as a scalar, to which "
                f"the terms are added; found shape {tuple(loss.shape)}; attach to the module that "
                "returns the mean loss, not to one that returns logits or a loss for each sample"
            )
        labels = given[1].reshape(-1).long()
        if self._offset:
            labels = torch.where(labels < 0, labels, labels + self._offset)
        return self._attachment.add_terms(head, loss, labels)


def attach(
    backbone: nn.Module,
    head: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer,
    schedule: LRScheduler,
    recipe: "Recipe | Mapping[str, Any] | str | Path",
    *,
    get_model: Callable[..., nn.Module] | None = None,
    accumulation: int | None = None,
    steps_per_epoch: int | None = None,
) -> Attachment:
    """Add distillation to these objects of a trainer.

    Call it after creating the LR schedule and before resuming from a checkpoint.

    head: one head, or several that each see a part of a batch, in their order. The terms are added
        to the loss of the head that completes the batch. The classes of a head are numbered after
        those of the heads before it.
    get_model: the trainer's factory for the teacher's network, by default `backbones.get_model`.
    accumulation: batches per optimizer step, by default the config's gradient_acc.
    steps_per_epoch: batches in an epoch, for schedules that count epochs; by default the config's
        num_image, divided by the batch size of all ranks together.
    """
    heads = checked_heads(head)
    check_kinds(backbone, optimizer, get_model, accumulation)
    if any(isinstance(hook, _Terms) for one in heads for hook in one._forward_hooks.values()):
        raise KDHooksError(
            "arcface_torch: this head is distilled already; remove() the other attachment first"
        )
    refuse_late(backbone, optimizer, schedule)
    recipe = Recipe.read(recipe)
    recipe.refuse_tables("arcface_torch")
    return Attachment(
        backbone,
        heads,
        optimizer,
        schedule,
        recipe,
        get_model,
        accumulation,
        steps_per_epoch,
    )


def _of_config(key: str) -> object:
    """Return a value of the config; main() has already merged the user's config into its base."""
    return getattr(getattr(sys.modules.get("configs.base"), "config", None), key, None)


def _gradient_acc() -> int:
    found = _of_config("gradient_acc")
    if found is not None and not (type(found) is int and found >= 1):
        raise KDHooksError(
            f"arcface_torch: config.gradient_acc must be a whole number, at least 1; found "
            f"{found!r}; correct it in the config, or call attach(…, accumulation=…)"
        )
    return found or 1


def _steps_per_epoch() -> int | None:
    """Compute it as the trainer does for its LR schedule."""
    images, batch = _of_config("num_image"), _of_config("batch_size")
    if not (isinstance(images, int) and isinstance(batch, int) and batch > 0):
        return None
    ranks = 1 if world() is None else dist.get_world_size()
    return images // (batch * ranks) or None
