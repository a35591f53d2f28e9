"""MMEngine's models: how they are built, and where they keep embedding, stages and classifier."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.hookspecs import hookimpl
from kdhooks.recipe import Recipe, with_module
from kdhooks.teacher.checkpoints import load_checkpoint, load_strictly
from kdhooks.teacher.input_transform import channels
from kdhooks_integrations.arcface_torch import Backbones
from kdhooks_integrations.mmengine.checkpoints import readable

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
    if recipe.taps.student.embedding is not None:
        return recipe
    children = dict(student.named_children())
    path = _embedding_of(student)
    if path is None:
        raise KDHooksError(
            f"mmengine: the student has no child {' or '.join(_EMBEDDING)} to take its embedding "
            "from; name one as taps.student.embedding; its children are: "
            f"{listed(name for name in children if name != 'data_preprocessor')}"
        )
    student_taps = replace(recipe.taps.student, embedding=path)
    return replace(recipe, taps=replace(recipe.taps, student=student_taps))


def _embedding_of(model: nn.Module) -> str | None:
    children = dict(model.named_children())
    return next((name for name in _EMBEDDING if name in children), None)


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


def with_teacher(recipe: Recipe) -> Recipe:
    """A teacher of MMEngine's kind: built, found to be given what it expects, its embedding named.

    Its embedding is looked for where the student's is; `embedding=''` is what its forward returns.
    """
    # Beside state_dict, EMAHook keeps those weights that are not the ones to be used.
    teacher = with_module(
        recipe.teacher,
        lambda config, _: built(config, "teacher.network"),
        preferred="state_dict",
    )
    taps = recipe.taps
    if isinstance(teacher.module, BaseModel):
        _check_images(teacher.module, teacher.input.given())
        if taps.teacher.embedding is None:
            embedding = _embedding_of(teacher.module) or ""
            taps = replace(taps, teacher=replace(taps.teacher, embedding=embedding))
    return replace(recipe, teacher=teacher, taps=taps)


def initialised(config: Mapping[str, Any]) -> nn.Module:
    """A teacher that its own init_cfg gives its weights: all of them, where it names a file."""
    model: nn.Module = built(config, "teacher.module")
    init = getattr(model, "init_cfg", None)
    if not init:
        return model
    file = init.get("checkpoint", "") if isinstance(init, dict) else ""
    if not Path(file).is_file():
        model.init_weights()  # type: ignore[operator]  # of mmengine's BaseModule
        return model
    prefix = f"{init.get('prefix', '')}.".lstrip(".")
    with readable():
        checkpoint = load_checkpoint(file)
    state = checkpoint.largest()
    of_it = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    return load_strictly(model, replace(checkpoint, content=of_it))


def _check_images(model: nn.Module, said: Mapping[str, Any]) -> None:
    """What the teacher's own data_preprocessor would do is said in teacher.input."""
    mean, std = _normalisation(model)
    usual = (mean == 127.5).all() and (std == 127.5).all()
    if not usual and not {"mean", "std"} <= set(said):
        raise KDHooksError(
            "mmengine: the teacher's data_preprocessor normalises with mean "
            f"{mean.flatten().tolist()} and std {std.flatten().tolist()}; say the same as "
            "teacher.input = dict(mean=…, std=…)"
        )
    _check_order(model, said, "teacher", "teacher.input")


def _check_order(model: nn.Module, said: Mapping[str, Any], whose: str, key: str) -> None:
    preprocessor: Any = getattr(model, "data_preprocessor", None)
    if getattr(preprocessor, "_channel_conversion", False) and "order" not in said:
        raise KDHooksError(
            f"mmengine: the {whose}'s data_preprocessor turns the channels round; say how they "
            f"come out: {key} = dict(order='rgb') after bgr_to_rgb, 'bgr' after rgb_to_bgr"
        )


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
        torch.tensor(channels(given[key], f"mmengine: input.{key}"), dtype=torch.float32).reshape(
            -1, 1, 1
        )
        if key in given
        else own
        for key, own in zip(("mean", "std"), _normalisation(student), strict=True)
    )
    if not (std > 0).all():
        raise KDHooksError(f"mmengine: input.std must be positive; found {given['std']!r}")
    _check_order(student, given, "student", "input")
    order = given.get("order", "rgb")
    if order not in ("rgb", "bgr"):
        raise KDHooksError(f"mmengine: input.order must be 'rgb' or 'bgr'; found '{order}'")
    bgr = order == "bgr"
    if (mean == 127.5).all() and (std == 127.5).all():
        return None, None, bgr
    return std / 127.5, (mean - 127.5) / 127.5, bgr
