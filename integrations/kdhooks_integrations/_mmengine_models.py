"""MMEngine's models: how they are built, and where they keep embedding, stages and classifier."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.hookspecs import hookimpl
from kdhooks.recipe import Recipe
from kdhooks.shards import ClassShard
from kdhooks_integrations.arcface_torch import Backbones

_BACKBONES = ("backbone", "img_backbone")
_EMBEDDING = ("neck", *_BACKBONES)  # the first of these puts it out
_CLASSIFIER = ("head.weight", "head.fc.weight")
_STAGES = ("layer{}", "stage{}")


def built(config: object, what: str) -> Any:
    if not isinstance(config, dict) or "type" not in config:
        raise KDHooksError(
            f"mmengine: {what} must be a model's config, dict(type=…); found {config!r}"
        )
    try:
        return MODELS.build(config)
    except KeyError as error:
        raise KDHooksError(f"mmengine: {what}: {error.args[0]}") from error


class Conventions:
    """The stages of a backbone, on its own or as the child of a model."""

    @hookimpl
    def model_stages(self, model: nn.Module) -> list[str] | None:
        children = dict(model.named_children())
        name = next((name for name in _BACKBONES if name in children), "")
        backbone = children.get(name, model)
        stages = Backbones().model_stages(backbone)
        inside = dict(backbone.named_children())
        for pattern in _STAGES:
            numbered = [pattern.format(number) for number in (1, 2, 3, 4)]
            if stages is None and all(stage in inside for stage in numbered):
                stages = numbered
        if stages is None and isinstance(inside.get("stages"), nn.ModuleList | nn.Sequential):
            stages = [f"stages.{number}" for number, _ in inside["stages"].named_children()]
        return None if stages is None else [f"{name}.{stage}".lstrip(".") for stage in stages]


def with_embedding(recipe: Recipe, student: nn.Module) -> Recipe:
    if recipe.embedding("student"):
        return recipe
    children = dict(student.named_children())
    path = next((name for name in _EMBEDDING if name in children), None)
    if path is None:
        raise KDHooksError(
            f"mmengine: the student has no child {' or '.join(_EMBEDDING)} to take its embedding "
            "from; name one as taps.student.embedding; its children are: "
            f"{listed(name for name in children if name != 'data_preprocessor')}"
        )
    taps = {**recipe.taps, "student": {**recipe.taps.get("student", {}), "embedding": path}}
    return replace(recipe, taps=taps)


def own_classifier(student: nn.Module, path: str) -> ClassShard | None:
    known = dict(student.named_parameters())
    if path and path not in known:
        raise KDHooksError(
            f"mmengine: classifier = '{path}': the student has no such parameter; "
            f"{near_miss(path, known)}it has {len(known)}"
        )
    rows = next((known[name] for name in ([path] if path else _CLASSIFIER) if name in known), None)
    if rows is None or (rows.ndim != 2 and not path):
        return None
    if rows.ndim != 2:
        raise KDHooksError(
            f"mmengine: classifier = '{path}' must be rows (c d); found shape {tuple(rows.shape)}"
        )
    return ClassShard(rows, 0, len(rows))


def network_factory(recipe: Recipe) -> Callable[[Any, Mapping[str, Tensor]], nn.Module]:
    def make(network: Any, state: Mapping[str, Tensor]) -> nn.Module:
        model: nn.Module = built(network, "teacher.network")
        mean, std = _normalisation(model)
        usual = (mean == 127.5).all() and (std == 127.5).all()
        if not usual and not {"mean", "std"} <= set(recipe.teacher.get("input", {})):
            raise KDHooksError(
                "mmengine: the teacher's data_preprocessor normalises with mean "
                f"{mean.flatten().tolist()} and std {std.flatten().tolist()}; say the same as "
                "teacher.input = dict(mean=…, std=…)"
            )
        return model

    return make


def _normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    """mean and std (3 1 1) of a model's data_preprocessor, the recipe's own where it has none."""
    preprocessor: Any = getattr(model, "data_preprocessor", None)
    if getattr(preprocessor, "_enable_normalize", False):
        return preprocessor.mean, preprocessor.std
    usual = torch.full((3, 1, 1), 127.5)
    return usual, usual


def to_recipes_images(
    student: nn.Module, given: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None, bool]:
    """scale, shift (3 1 1) and whether to flip: from the student's images to the recipe's."""
    mean, std = (
        torch.as_tensor(given[key], dtype=torch.float32).reshape(-1, 1, 1) if key in given else own
        for key, own in zip(("mean", "std"), _normalisation(student), strict=True)
    )
    order = given.get("order", "rgb")
    if order not in ("rgb", "bgr"):
        raise KDHooksError(f"mmengine: input.order must be 'rgb' or 'bgr'; found '{order}'")
    bgr = order == "bgr"
    if (mean == 127.5).all() and (std == 127.5).all():
        return None, None, bgr
    return std / 127.5, (mean - 127.5) / 127.5, bgr
