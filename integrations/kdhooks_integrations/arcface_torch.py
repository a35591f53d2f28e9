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
    """The stages of arcface_torch's backbones, at 1/2, 1/4, 1/8 and 1/16 of the input.

    A vision transformer keeps one size throughout; its stages are the quarters of its depth.
    """

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
        accumulation: int | None,
    ) -> None:
        if hasattr(head, _CHILD):
            raise KDHooksError("arcface_torch: this head is distilled already; remove() that first")
        self.head = head
        self.distiller = build(
            recipe,
            backbone,
            network=teacher_factory(get_model, recipe),
            head=_head_shard(head, classes),
            plugins=[Backbones()],
        )
        self.distiller.accumulation = accumulation or _gradient_acc()
        register = self.distiller.register_load_state_dict_pre_hook
        register(self._complete)  # type: ignore[no-untyped-call]  # torch's
        self.task_weight: Weight = 1.0
        self._handles: list[Removable] = []
        for tap in self.distiller.taps:
            if isinstance(tap, ClassifierShare) and tap.mode == "inherit" and tap.weight != 0:
                try:
                    self._inherit(tap)
                except KDHooksError:
                    self.distiller.remove()  # or its hooks would hold on to every batch
                    raise
        head.add_module(_CHILD, self.distiller)
        self._handles.append(head.register_forward_hook(self._add_terms))
        if world() is not None:
            for parameter in self.distiller.parameters():
                dist.broadcast(parameter.data, 0)
                if parameter.requires_grad:
                    self._handles.append(parameter.register_hook(_mean))

    def _inherit(self, tap: ClassifierShare) -> None:
        """The teacher's rows become the head's weight, frozen; its margin loss is the term."""
        rows = self.distiller.hand_over(tap)
        weight = self.head.weight
        if not isinstance(weight, nn.Parameter):
            raise KDHooksError(
                f"{tap.name}: the head must train a parameter 'weight' to take the teacher's rows; "
                f"found {type(weight).__name__}; set head = 'own'"
            )
        weight.requires_grad_(False)
        self._hold_rows()
        self.task_weight = tap.weight
        # A checkpoint of a run without kdhooks holds a classifier that is not the teacher's.
        self._handles.append(self.head.register_load_state_dict_post_hook(self._hold_rows))
        log.info("%s: the head holds the teacher's %d rows, frozen", tap.name, len(rows))

    def _hold_rows(self, *_: object) -> None:
        assert isinstance(self.head.weight, nn.Parameter)
        self.head.weight.data.copy_(self.distiller.teacher_rows)

    def _complete(self, _: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
        """Let a run begin from a checkpoint that was written without kdhooks."""
        if any(key.startswith(prefix) for key in state):
            return
        if any(True for _ in self.distiller.parameters()):
            raise KDHooksError(
                "arcface_torch: this checkpoint was written without kdhooks, and the optimizer's "
                "state in it has no place for the methods' own weights; resume with methods that "
                "have none (no projector), or start a new run"
            )
        log.warning("checkpoint written without kdhooks: the methods start from their first step")
        state.update(self.distiller.state_dict(prefix=prefix))

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
    accumulation: int | None = None,
) -> Attachment:
    """Distil with these very objects: after the head is made, before the optimizer.

    get_model: the trainer's factory for the teacher's network, by default `backbones.get_model`.
    classes: of all ranks together, by default what the heads hold.
    accumulation: batches an optimizer step, by default the config's gradient_acc.
    """
    return Attachment(backbone, head, Recipe.read(recipe), get_model, classes, accumulation)


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
        backbone, self._backbone = self._backbone, None
        if backbone is None:
            raise KDHooksError(
                "arcface_torch: install expects one get_model and then one PartialFC_V2; found a "
                "head with no backbone of its own; use attach for another arrangement"
            )
        classes = kwargs.get("num_classes", args[2] if len(args) > 2 else None)
        get_model = self._originals["get_model"]
        self.attachment = Attachment(backbone, head, self._recipe, get_model, classes, None)
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


def teacher_factory(
    get_model: Callable[..., nn.Module] | None, recipe: Recipe
) -> Callable[[Any, Mapping[str, Tensor]], nn.Module]:
    """The trainer's own get_model, with the embedding width that the checkpoint has."""

    def make(network: Any, state: Mapping[str, Tensor]) -> nn.Module:
        factory = get_model or _trainers_get_model()
        # All of its backbones end in a BatchNorm1d of the embedding's width.
        widths = [len(tensor) for tensor in state.values() if tensor.ndim == 1]
        dtype = recipe.teacher.get("dtype", "float32")
        if dtype == "bfloat16":
            raise KDHooksError(
                "arcface_torch: its networks know float32 and float16 alone; found teacher.dtype "
                "'bfloat16'"
            )
        half = dtype == "float16"
        try:
            return factory(
                network, dropout=0.0, fp16=half, num_features=widths[-1] if widths else 512
            )
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
    weight, offset = getattr(head, "weight", None), getattr(head, "class_start", 0)
    if not isinstance(weight, Tensor):
        raise KDHooksError(
            "arcface_torch: the head must hold its classes as rows of 'weight'; found none in "
            f"{type(head).__name__}"
        )
    if classes is None:
        counts: list[Any] = [len(weight)]
        if world() is not None:
            counts = [None] * dist.get_world_size()
            dist.all_gather_object(counts, len(weight))
        classes = sum(counts)
    return ClassShard(weight, offset, classes, world())


def _gradient_acc() -> int:
    """What the trainer's config says, into whose base main() has merged the user's by now."""
    config = getattr(sys.modules.get("configs.base"), "config", None)
    return int(getattr(config, "gradient_acc", 1))


def _mean(gradient: Tensor) -> Tensor:
    """Over the ranks: the head is outside DDP, which would do this."""
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
