"""Transformer teachers with prompts, alone and in a Distiller."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

from kdhooks import ClassShard, Distiller
from kdhooks.testing import TinyFaceNet
from kdhooks_plugins._blocks import transformer_blocks
from kdhooks_plugins._prompts import Prompts
from kdhooks_plugins.cakd import CAKD
from tests.maps import normal
from tests.transformers import TinySwin, TinyViT, teacher_of

Maker: TypeAlias = Callable[[], nn.Module]
FlatSwin: Maker = partial(TinySwin, flat=True)
SMALL: dict[str, Any] = {
    "urfm": {"centres": 3, "width": 8, "heads": 2},
    "collapse": {"every": 0},
}

# A factory, the path of its last stage, and the path of the last block in that stage.
VIT = (TinyViT, "blocks.2", "blocks.2")
SWIN = (TinySwin, "layers.2", "layers.2.1")
FLAT = (FlatSwin, "layers.2", "layers.2.1")
TEACHERS = pytest.mark.parametrize(
    ("make", "stage", "last"), [VIT, SWIN, FLAT], ids=["vit", "swin", "flat swin"]
)


def prompts_of(network: nn.Module, t: int = 3, **options: Any) -> Prompts:
    """Return prompts far from 0, so that they change the output."""
    prompts = Prompts(transformer_blocks(network), t, **options)
    with torch.no_grad():
        for place, tokens in enumerate(prompts.prompts):
            tokens.copy_(normal(place, *tokens.shape))
    return prompts


def distiller_of(
    make: Maker, stage: str, student: nn.Module | None = None, **options: Any
) -> Distiller:
    return Distiller(
        student or TinyFaceNet(),
        teacher_of(make),
        [CAKD(**{**SMALL, **options})],
        student_stages=["layer4"],
        teacher_stages=[stage],
        head=ClassShard(torch.zeros(6, 12), 0, 6),
        input_shape=(3, 32, 32),
    )


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
