"""The distillation of one backbone and its heads: taps, terms, the trainer's loss."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdhooks.declarations import ClassifierShare, Weight
from kdhooks.errors import KDHooksError
from kdhooks.recipe import Recipe, build
from kdhooks.replicas import synchronise
from kdhooks.taps import Removable
from kdhooks_integrations.arcface_torch.heads import refuse_other_split, shard_of, weight_of
from kdhooks_integrations.arcface_torch.interval import Interval, ScalarWriter
from kdhooks_integrations.arcface_torch.joining import Joined
from kdhooks_integrations.arcface_torch.networks import Backbones, teacher_factory

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
    ) -> None:
        shards = [shard_of(head) for head in heads]
        self.distiller = build(
            recipe,
            backbone,
            network=teacher_factory(get_model, recipe),
            head=shards[0] if len(shards) == 1 else None,
            plugins=[Backbones()],
        )
        self.distiller.accumulation = accumulation or _gradient_acc()
        self.task_weight: Weight = 1.0
        self._images: Tensor | None = None  # of the batch that some heads have seen
        self._labels: list[Tensor] = []  # what they were given
        self._handles: list[Removable] = []
        self._interval = Interval()
        self._batches = 0
        try:
            self._share_classifier(heads)
        except KDHooksError:
            self.distiller.remove()  # or its hooks would hold on to every batch
            raise
        self._joined = Joined(self.distiller, optimizer, schedule)
        offset = 0
        for head, shard in zip(heads, shards, strict=True):
            self._handles.append(head.register_forward_hook(_Terms(self, offset)))
            self._handles.append(head.register_load_state_dict_pre_hook(refuse_other_split))
            offset += shard.total
        self._handles += synchronise(self.distiller)  # DDP, which would do this, knows it not

    # --- the classifier ----------------------------------------------------------------------

    def _share_classifier(self, heads: Sequence[nn.Module]) -> None:
        shares = [tap for tap in self.distiller.taps if isinstance(tap, ClassifierShare)]
        if shares and len(heads) > 1:
            raise KDHooksError(
                f"{shares[0].name} shares one classifier, and the trainer has {len(heads)} heads; "
                "leave it out, or train with one head"
            )
        for tap in shares:
            if tap.mode == "inherit" and tap.weight != 0:
                self._inherit(tap, heads[0])

    def _inherit(self, tap: ClassifierShare, head: nn.Module) -> None:
        """The teacher's rows become the head's weight, frozen; its margin loss is the term."""
        rows = self.distiller.hand_over(tap)
        weight = weight_of(head)
        if not isinstance(weight, nn.Parameter):
            raise KDHooksError(
                f"{tap.name}: the head must train a parameter 'weight' to take the teacher's rows; "
                f"found {type(weight).__name__}; set head = 'own'"
            )
        weight.requires_grad_(False)

        def hold(*_: object) -> None:
            weight.data.copy_(rows())

        def hold_once(*_: object) -> None:
            hold()
            first.remove()

        # A checkpoint of a run without kdhooks holds a classifier that is not the teacher's, and
        # old heads load theirs without calling hooks.
        first = head.register_forward_pre_hook(hold_once)
        self._handles += [first, head.register_load_state_dict_post_hook(hold)]
        hold()
        self.task_weight = tap.weight
        log.info("%s: the head holds the teacher's %d rows, frozen", tap.name, len(weight))

    # --- one step ----------------------------------------------------------------------------

    def add_terms(self, head: nn.Module, loss: Tensor, labels: Tensor) -> Tensor | None:
        """The loss of a head, and, with the last head of the batch, the terms of all methods."""
        images = self.distiller.pending
        if images is None:
            if head.training and torch.is_grad_enabled() and not self.distiller.fired:
                raise KDHooksError(
                    "arcface_torch: the head ran, but the backbone's hooks did not; attach to the "
                    "backbone in training, before the first call of a compiled one"
                )
            return None
        task = loss * self._task_factor()
        if (together := self._all_labels(images, labels)) is None:
            return task
        terms = self.distiller(images, together)
        self._batches += 1
        self._interval.add(self.distiller.metrics, terms)
        return sum(terms.values(), start=task)

    def _all_labels(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """The whole batch's, once all heads have seen their parts of it."""
        if self._labels and self._images is not images:
            raise KDHooksError(
                f"arcface_torch: the heads were given {sum(map(len, self._labels))} labels for a "
                "batch, fewer than it has images; each batch must go through all heads in their "
                "order; attach to those that are used"
            )
        self._images = images
        self._labels.append(labels)
        if sum(map(len, self._labels)) < len(images):
            return None
        together = torch.cat(self._labels)
        self._images, self._labels = None, []
        return together

    def _task_factor(self) -> float:
        weight = self.task_weight
        return weight(self.distiller.step) if callable(weight) else weight

    # --- the log -----------------------------------------------------------------------------

    def report(self, global_step: int, writer: ScalarWriter | None = None) -> None:
        """Means since the last report: into the log, and as `kdhooks/…` to TensorBoard."""
        means = self._interval.means()
        if not means:
            return
        terms = [name for name in means if f"{name}/weighted" in means]
        notes = [name for name in means if name not in terms and not name.endswith("/weighted")]
        parts = [
            f"{name} {means[name]:.4f} (weighted {means[f'{name}/weighted']:.4f})" for name in terms
        ]
        parts += [f"{name} {means[name]:.4f}" for name in notes]
        parts += [f"{self.skipped} optimizer steps skipped"] if self.skipped else []
        left_out = self.distiller.skipped
        parts += [f"{left_out} steps without terms that were not finite"] if left_out else []
        log.info("kdhooks, step %d: %s", global_step, ", ".join(parts))
        if writer is not None:
            for name, mean in means.items():
                writer.add_scalar(f"kdhooks/{name}", mean, global_step)

    @property
    def skipped(self) -> int:
        """Steps that the optimizer did not take; a GradScaler skips where gradients overflow."""
        due = self._batches // self.distiller.accumulation
        return max(0, due - self._joined.steps)

    def remove(self) -> None:
        """Take every hook off. An inherited classifier stays as it is."""
        self.distiller.remove()
        self._joined.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Terms:
    """A head's forward hook."""

    def __init__(self, attachment: Attachment, offset: int) -> None:
        self._attachment = attachment
        self._offset = offset  # of its classes among those of all heads

    def __call__(self, head: nn.Module, args: tuple[Any, ...], loss: Tensor) -> Tensor | None:
        labels = args[1].reshape(-1).long()
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
) -> Attachment:
    """Distil with these very objects: after the schedule is made, before anything is resumed.

    head: several share a batch in their order; the terms join the last one's loss, and the labels
        of each count on from those of the heads before.
    get_model: the trainer's factory for the teacher's network, by default `backbones.get_model`.
    accumulation: batches an optimizer step, by default the config's gradient_acc.
    """
    heads = [head] if isinstance(head, nn.Module) else list(head)
    if any(isinstance(hook, _Terms) for one in heads for hook in one._forward_hooks.values()):
        raise KDHooksError("arcface_torch: this head is distilled already; remove() that first")
    return Attachment(
        backbone, heads, optimizer, schedule, Recipe.read(recipe), get_model, accumulation
    )


def _gradient_acc() -> int:
    """What the trainer's config says, into whose base main() has merged the user's by now."""
    config = getattr(sys.modules.get("configs.base"), "config", None)
    return int(getattr(config, "gradient_acc", 1))
