"""Finds the stages of the trainer's backbones, and creates teachers by the trainer's factory."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from kdhooks.backbones import known_stages
from kdhooks.errors import KDHooksError
from kdhooks.hookspecs import hookimpl
from kdhooks.recipe import Recipe
from kdhooks.teacher.table import NetworkFactory


class Backbones:
    """Finds the stages of arcface_torch's backbones, and of others that kdhooks knows."""

    @hookimpl
    def model_stages(self, model: nn.Module) -> list[str] | None:
        return known_stages(model)


def teacher_factories(
    get_model: Callable[..., nn.Module] | None, recipe: Recipe
) -> list[NetworkFactory]:
    """Return, for each teacher, a factory that calls get_model with the checkpoint's width."""
    return [partial(_make, get_model, teacher.dtype) for teacher in recipe.teachers]


def _make(
    get_model: Callable[..., nn.Module] | None,
    dtype: str,
    network: Any,
    state: Mapping[str, Tensor],
) -> nn.Module:
    factory = get_model or _trainers_get_model()
    width = embedding_width(state)
    if dtype == "bfloat16":
        raise KDHooksError(
            "arcface_torch: teacher.dtype must be 'float16' or 'float32' for the trainer's own "
            "networks, whose forward sets its own autocast on a GPU, so 'bfloat16' would have no "
            "effect; found 'bfloat16'; use dtype = 'float16'"
        )
    half = dtype == "float16"
    try:
        return factory(network, dropout=0.0, fp16=half, num_features=width or 512)
    except ValueError as error:
        raise KDHooksError(
            f"teacher network '{network}' is unknown to arcface_torch's get_model, which "
            f"accepts names such as r50, r100, mbf, vit_b ({error})"
        ) from error


def embedding_width(state: Mapping[str, Tensor]) -> int | None:
    """Return the width of the embedding, which is that of the last BatchNorm1d of a backbone.

    In the trainer's backbones, its name contains "feature"; this distinguishes it from a head in
    the same file.
    """
    vectors = {key: len(tensor) for key, tensor in state.items() if tensor.ndim == 1}
    features = [length for key, length in vectors.items() if "feature" in key]
    lengths = features or list(vectors.values())
    return lengths[-1] if lengths else None


def _trainers_get_model() -> Callable[..., nn.Module]:
    try:
        import backbones  # type: ignore[import-not-found]  # arcface_torch's own package
    except ImportError as error:
        raise KDHooksError(
            "arcface_torch: its package 'backbones' can't be imported; run in its folder, "
            "specify that folder as --trainer of a kdhooks command, or call attach(…, get_model=…)"
        ) from error
    factory: Callable[..., nn.Module] = backbones.get_model
    return factory
