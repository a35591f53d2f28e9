"""Finds the student of a LightningModule, and the class weights of its classifier."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.errors import KDHooksError, in_one_line, listed, near_miss
from kdhooks.generators import undisturbed_generators
from kdhooks.modes import evaluating
from kdhooks.paths import find, split_path, submodules
from kdhooks.recipe import Recipe

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def find_student(
    module: "LightningModule", path: str | None, recipe: Recipe
) -> tuple[str, nn.Module]:
    """Return the path of the student, "" for the LightningModule itself, and the student.

    By default, the student is the one child that returns an embedding (b d) for images. If no child
    does, it is the LightningModule itself, if that returns an embedding.
    """
    if path is not None:
        return path, find(module, path, "lightning: the LightningModule")
    children = {
        name: child
        for name, child in module.named_children()
        if any(parameter.requires_grad for parameter in child.parameters())
    }
    named = split_path(recipe.taps.student.embedding or "", "student").name
    holders = [name for name, child in children.items() if named in submodules(child)]
    if len(holders) == 1:
        return holders[0], children[holders[0]]
    outputs = {name: _output(child, recipe) for name, child in children.items()}
    found = [name for name, output in outputs.items() if _is_embedding(output)]
    if len(found) == 1:
        return found[0], children[found[0]]
    if found:
        raise KDHooksError(
            f"lightning: one child of {type(module).__name__} must be the student; several return "
            f"(b d) for images: {listed(found)}; name it as Distill(…, student='{found[0]}')"
        )
    outputs["its own forward"] = _output(module, recipe)
    if _is_embedding(outputs["its own forward"]):
        return "", module
    raise KDHooksError(
        f"lightning: {type(module).__name__} must have a child that returns an embedding (b d) for "
        f"images (b {' '.join(map(str, recipe.input_shape))}); found: "
        f"{listed(f'{name}: {_described(output)}' for name, output in outputs.items())}; name the "
        "student as Distill(…, student='path'), or set input_shape in the recipe to that of the "
        "images"
    )


def _output(model: Callable[..., object] | nn.Module, recipe: Recipe) -> object:
    """Return the output of a module for images, or the error that it raises."""
    assert isinstance(model, nn.Module)
    first = next(model.parameters())
    with undisturbed_generators(recipe.seed, first.device), evaluating(model), torch.no_grad():
        images = torch.zeros(2, *recipe.input_shape, dtype=first.dtype, device=first.device)
        try:
            return model(images)
        except Exception as error:  # of any kind, since a child need not be a network
            return error


def _is_embedding(output: object) -> bool:
    parts = output if isinstance(output, tuple | list) else [output]
    return any(isinstance(one, Tensor) and one.ndim == 2 for one in parts)


def _described(output: object) -> str:
    if isinstance(output, Exception):
        return in_one_line(output)
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def classifier_rows(module: "LightningModule", path: str | None) -> ClassShard | None:
    """Return the parameter (c d) at a path; every rank holds all of its rows."""
    if path is None:
        return None
    known = dict(module.named_parameters())
    if path not in known:
        inside = [name for name in known if name.startswith(f"{path}.")]
        hint = f"inside of it are: {listed(inside)}" if inside else near_miss(path, known)
        raise KDHooksError(
            f"lightning: classifier = '{path}': the LightningModule has no such parameter; {hint}"
            f"{'' if inside else f'it has {len(known)}'}"
        )
    rows = known[path]
    if rows.ndim != 2:
        raise KDHooksError(
            f"lightning: classifier = '{path}' must have one row for each class (c d); found shape "
            f"{tuple(rows.shape)}; name such a parameter"
        )
    return ClassShard(rows, 0, len(rows))
