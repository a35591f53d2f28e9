"""Prompts join blocks like mmpretrain's, and cakd reads the patches after the class token."""

import warnings
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller
from kdhooks.testing import TinyFaceNet, tiny_batch

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from kdhooks_plugins._blocks import run_prompted, transformer_blocks
from kdhooks_plugins._cakd_options import PromptTokens
from kdhooks_plugins.cakd import CAKD
from tests.maps import normal
from tests.mmengine_shapes import EncoderLayer, ShapedSwin, ShapedSwinBlock, VisionTransformer
from tests.prompted import SMALL, prompts_of
from tests.transformers import Block

ViT = partial(VisionTransformer, registers=2)


class Embedding(nn.Module):
    """Makes a teacher of a backbone: its tuple of one map or one token becomes (b 12)."""

    def __init__(self, backbone: nn.Module, k: int) -> None:
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(k, 12)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 32 32) -> (b 12)."""
        (x,) = self.backbone(images)
        embedding: Tensor = self.fc(x.flatten(1))
        return embedding


def test_blocks_are_known_by_their_parts() -> None:
    assert list(transformer_blocks(ViT())) == [f"layers.{number}" for number in range(4)]
    paths = [f"stages.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)]
    assert list(transformer_blocks(ShapedSwin())) == paths


def same_block(block: nn.Module, renamed: dict[str, str]) -> nn.Module:
    """Return a ViT's block with the weights of `block`."""
    same, state = Block(8, 2), {}
    for key, value in block.state_dict().items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        state[key] = value
    same.load_state_dict(state, strict=False)
    return same


def test_an_encoder_layer_treats_prompts_as_tokens() -> None:
    block = EncoderLayer()
    same = same_block(block, {"ln": "norm", "ffn.layers": "mlp"})
    x, prompts = normal(1, 3, 17, 8).float(), normal(2, 2, 8).float()
    expected = same(torch.cat([prompts.expand(3, 2, 8), x], dim=1))
    found, end = run_prompted(block, block.forward, prompts, x)
    assert_close(found, expected[:, 2:])
    assert_close(end, expected[:, :2])


def test_a_swin_block_treats_prompts_as_tokens() -> None:
    """One window without bias is a ViT's block, except that the residual is inside of the ffn."""
    block = ShapedSwinBlock(8)
    with torch.no_grad():
        block.get_parameter("attn.w_msa.relative_position_bias_table").zero_()
    same = same_block(block, {"attn.w_msa": "attn", "ffn.layers": "mlp"})
    x, prompts = normal(1, 3, 4, 8).float(), normal(2, 2, 8).float()
    expected = same(torch.cat([prompts.expand(3, 2, 8), x], dim=1))
    found, end = run_prompted(block, block.forward, prompts, x, (2, 2))
    assert_close(found, expected[:, 2:])
    assert_close(end, expected[:, :2])


@pytest.mark.parametrize(
    ("make", "k", "stage"),
    [(ViT, 8, "backbone.layers.3"), (ShapedSwin, 128, "backbone.stages.1.blocks.1")],
    ids=["vit", "swin"],
)
@pytest.mark.parametrize("tokens", [False, True])
def test_cakd_teaches_with_prompts(make: Any, k: int, stage: str, tokens: bool) -> None:
    torch.manual_seed(0)
    teacher, student = Embedding(make(), k), TinyFaceNet()
    images, labels = tiny_batch()
    expected = teacher(images)
    assert_close(prompts_of(teacher, 0)(teacher, images), expected)
    assert (prompts_of(teacher)(teacher, images) - expected).abs().max() > 0.01
    with Distiller(
        student,
        teacher,
        [CAKD(**SMALL, prompts=PromptTokens(number=3, in_features=tokens))],
        student_stages=["layer4"],
        teacher_stages=[stage],
        input_shape=(3, 32, 32),
    ) as kd:
        side: Any = kd.losses["cakd"].theirs
        seen: list[Tensor] = []
        side.project.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        student(images)
        kd(images, labels)["cakd"].backward()
        assert seen[0].shape == (len(images), 16 + 3 * tokens, 8)  # the patches, and the prompts
        assert kd.adapter is not None
        assert all(p.grad is not None for p in kd.adapter.parameters())
