"""InsightFace's recognition/arcface_torch: one line in the config file, or in train_v2.py.

    from kdhooks_integrations import arcface_torch
    arcface_torch.install("kd.toml")

The trainer's head (PartialFC) returns its loss plus the distillation terms. The losses' own
parameters are children of the head, so they join its optimizer group, the learning rate schedule
and the checkpoint, while `model.pt` keeps the student's keys alone.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdhooks.declarations import ClassifierShare, Weight
from kdhooks.errors import KDHooksError
from kdhooks.hookspecs import hookimpl
from kdhooks.recipe import Recipe, build
from kdhooks.shards import ClassShard, world
from kdhooks.taps import Removable

log = logging.getLogger("kdhooks")

_CHILD = "kdhooks"  # the head's child, so the prefix of its keys in checkpoints
_NAMES = ("get_model", "PartialFC_V2")


class Backbones:
    """The stages of arcface_torch's backbones, at 1/2, 1/4, 1/8 and 1/16 of the input."""

    @hookimpl
    def model_stages(self, model: nn.Module) -> list[str] | None:
        kind = type(model).__name__
        if kind == "IResNet":
            return ["layer1", "layer2", "layer3", "layer4"]
        if kind == "MobileFaceNet":
            return ["layers.1", "layers.3", "layers.5", "conv_sep"]
        if kind == "VisionTransformer":
            depth = len(model.blocks)  # type: ignore[arg-type]  # a ModuleList
            return [f"blocks.{depth * quarter // 4 - 1}" for quarter in (1, 2, 3, 4)]
        return None


class Attachment:
    """The distillation of one head and one backbone, until `remove`."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        recipe: Recipe,
        get_model: Callable[..., nn.Module] | None,
        classes: int | None,
    ) -> None:
        if hasattr(head, _CHILD):
            raise KDHooksError("arcface_torch: this head is distilled already; remove() that first")
        self.head = head
        self.distiller = build(
            recipe,
            backbone,
            network=_teacher_factory(get_model, recipe),
            head=_head_shard(head, classes),
            plugins=[Backbones()],
        )
        self.task_weight: Weight = 1.0
        for tap in self.distiller.taps:
            if isinstance(tap, ClassifierShare) and tap.mode == "inherit" and tap.weight != 0:
                self._inherit(tap)
        head.add_module(_CHILD, self.distiller)
        self._handles: list[Removable] = [head.register_forward_hook(self._add_terms)]
        if world() is not None:
            self._handles += [p.register_hook(_mean) for p in self.distiller.parameters()]

    def _inherit(self, tap: ClassifierShare) -> None:
        """The teacher's rows become the head's weight, frozen; its margin loss is the term."""
        rows = self.distiller.hand_over(tap)
        weight = self.head.weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            weight.copy_(rows)
        weight.requires_grad_(False)
        self.task_weight = tap.weight
        log.info("%s: the head holds the teacher's %d rows, frozen", tap.name, len(rows))

    def _add_terms(self, head: nn.Module, args: tuple[Any, ...], loss: Tensor) -> Tensor | None:
        images = self.distiller.pending
        if images is None:
            if head.training and torch.is_grad_enabled() and not self.distiller.fired:
                raise KDHooksError(
                    "arcface_torch: the head ran, but the backbone's hooks did not; attach to the "
                    "backbone in training, before the first call of a compiled one"
                )
            return None
        task = loss * self._task_factor()
        return sum(self.distiller(images, args[1].reshape(-1).long()).values(), start=task)

    def _task_factor(self) -> float:
        weight = self.task_weight
        return weight(self.distiller.step) if callable(weight) else weight

    def remove(self) -> None:
        """Take every hook off. An inherited classifier stays as it is."""
        self.distiller.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(self.head, _CHILD, None) is self.distiller:
            delattr(self.head, _CHILD)


def attach(
    backbone: nn.Module,
    head: nn.Module,
    recipe: "Recipe | Mapping[str, Any] | str | Path",
    *,
    get_model: Callable[..., nn.Module] | None = None,
    classes: int | None = None,
) -> Attachment:
    """Distil with these very objects: after the head is made, before the optimizer.

    get_model: the trainer's factory for the teacher's network, by default `backbones.get_model`.
    classes: of all ranks together, by default what the heads hold.
    """
    return Attachment(backbone, head, Recipe.read(recipe), get_model, classes)


class Installation:
    """The script's `get_model` and `PartialFC_V2`, wrapped, until `remove`."""

    def __init__(self, recipe: Recipe, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._originals = {name: namespace[name] for name in _NAMES}
        self._recipe = recipe
        self._backbone: nn.Module | None = None
        self.attachment: Attachment | None = None
        namespace.update(get_model=self._get_model, PartialFC_V2=self._partial_fc)

    def _get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = self._originals["get_model"](*args, **kwargs)
        self._backbone = self._backbone or model
        return model

    def _partial_fc(self, *args: Any, **kwargs: Any) -> nn.Module:
        head: nn.Module = self._originals["PartialFC_V2"](*args, **kwargs)
        if self._backbone is None:
            raise KDHooksError("arcface_torch: the head was made before get_model made a backbone")
        classes = kwargs.get("num_classes", args[2] if len(args) > 2 else None)
        get_model = self._originals["get_model"]
        self.attachment = Attachment(self._backbone, head, self._recipe, get_model, classes)
        return head

    def remove(self) -> None:
        self._namespace.update(self._originals)
        if self.attachment is not None:
            self.attachment.remove()


def install(
    recipe: "Recipe | Mapping[str, Any] | str | Path", namespace: dict[str, Any] | None = None
) -> Installation:
    """Distil in train_v2.py: a line in its config file, or below its own imports.

    namespace: the script's globals, found by themselves where it runs as the main program.
    """
    checked = Recipe.read(recipe)
    if namespace is None:
        namespace = vars(sys.modules["__main__"])
    missing = [name for name in _NAMES if name not in namespace]
    if missing:
        raise KDHooksError(
            f"arcface_torch: the main program has no {' and no '.join(missing)}; put the line into "
            "the config file that train_v2.py is started with, or below its imports, or use attach"
        )
    earlier = getattr(namespace["get_model"], "__self__", None)
    if isinstance(earlier, Installation):
        earlier.remove()
    return Installation(checked, namespace)


def _teacher_factory(
    get_model: Callable[..., nn.Module] | None, recipe: Recipe
) -> Callable[[Any, Mapping[str, Tensor]], nn.Module]:
    """The trainer's own get_model, with the embedding width that the checkpoint has."""

    def make(network: Any, state: Mapping[str, Tensor]) -> nn.Module:
        factory = get_model or _trainers_get_model()
        # All of its backbones end in a BatchNorm1d of the embedding's width.
        width = next(len(tensor) for tensor in reversed(list(state.values())) if tensor.ndim == 1)
        half = recipe.teacher.get("dtype", "float32") != "float32"
        try:
            return factory(network, dropout=0.0, fp16=half, num_features=width)
        except ValueError as error:
            raise KDHooksError(
                f"teacher network '{network}' is unknown to arcface_torch's get_model, which "
                f"takes names like r50, r100, mbf, vit_b ({error})"
            ) from error

    return make


def _trainers_get_model() -> Callable[..., nn.Module]:
    try:
        import backbones  # type: ignore[import-not-found]  # arcface_torch's own package
    except ImportError as error:
        raise KDHooksError(
            "arcface_torch: its package 'backbones' can't be imported; run in its folder, or give "
            "attach(…, get_model=…)"
        ) from error
    factory: Callable[..., nn.Module] = backbones.get_model
    return factory


def _head_shard(head: nn.Module, classes: int | None) -> ClassShard:
    weight, offset = head.weight, getattr(head, "class_start", 0)
    assert isinstance(weight, Tensor)
    if classes is None:
        counts: list[Any] = [len(weight)]
        if world() is not None:
            counts = [None] * dist.get_world_size()
            dist.all_gather_object(counts, len(weight))
        classes = sum(counts)
    return ClassShard(weight, offset, classes, world())


def _mean(gradient: Tensor) -> Tensor:
    """Over the ranks: the head is outside DDP, which would do this."""
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()
