"""Transformer blocks that prompts can join: of a ViT, which attends to all, or of a Swin."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kdhooks import KDHooksError, Stage
from kdhooks_plugins._windows import check_windows, is_windowed, window_attention

Forward: TypeAlias = Callable[..., Tensor]

SUPPORTED = (
    "blocks with norm1, attn, norm2 and mlp, whose attn has qkv: a ViT's, on tokens (b n k), or a "
    "Swin's, whose attn takes windows ((b w) n k) and a mask (as in arcface_torch, FaceX-Zoo, timm)"
)
_PARTS = ("norm1", "attn", "norm2", "mlp")


def transformer_blocks(teacher: nn.Module) -> dict[str, nn.Module]:
    """What has the parts of a block, by path; each one tried out."""
    blocks = {
        path: module
        for path, module in teacher.named_modules()
        if {name for name, _ in module.named_children()}.issuperset(_PARTS)
    }
    for path, block in blocks.items():
        try:
            _try(block)
        except Exception as error:
            raise KDHooksError(
                f"cakd: prompts can't join the teacher's block '{path}' ({error}); they join "
                f"{SUPPORTED}; set prompts = {{ number = 0 }} to let the teacher run without"
            ) from error
    return blocks


@torch.no_grad()
def _try(block: nn.Module) -> None:
    weight = block.get_parameter("attn.qkv.weight")
    if is_windowed(block.get_submodule("attn")):
        check_windows(block.get_submodule("attn"), weight)
    else:
        block(weight.new_zeros(1, 3, width(block)))  # it must take any number of tokens


def width(block: nn.Module) -> int:
    """k of the block's tokens."""
    return block.get_parameter("attn.qkv.weight").shape[1]


def last_block(blocks: Mapping[str, nn.Module], stage: Stage) -> str:
    """The path of the last block of a stage, or of the stage itself where that is a block."""
    inside = [path for path in blocks if f"{path}.".startswith(f"{stage.path}.")]
    if not inside or width(blocks[inside[-1]]) != stage.shape[-1]:
        raise KDHooksError(
            f"cakd: prompts.in_features needs a stage that ends in a transformer block; found "
            f"'{stage.path}' of shape {stage.shape}; name the last block as the last stage"
        )
    return inside[-1]


def run_prompted(
    block: nn.Module,
    forward: Forward,
    prompts: Tensor,
    x: Tensor,
    *args: object,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """The block's own `forward`, (t k), its input -> its output, and the prompts' (b t k)."""

    def run(x: Tensor) -> Tensor:
        return forward(x, *args, **kwargs)

    copies = prompts.expand(len(x), -1, -1)
    if is_windowed(block.get_submodule("attn")):
        return _run_windows(block, run, copies, x)
    return _run_tokens(run, copies, x)


def _run_tokens(forward: Forward, prompts: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(b t k), (b n k) -> (b n k), (b t k)."""
    out = forward(torch.cat([prompts, x], dim=1))
    t = prompts.shape[1]
    return out[:, t:], out[:, :t]


def _run_windows(
    block: nn.Module, forward: Forward, prompts: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """(b t k), (b … k) -> (b … k), (b t k)."""
    norm1, attn, norm2, mlp = (block.get_submodule(part) for part in _PARTS)
    mixed: list[Tensor] = []

    def attend(windows: Tensor, mask: Tensor | None = None) -> Tensor:
        windows, seen = window_attention(attn, windows, norm1(prompts), mask)
        mixed.append(seen)
        return windows

    with replaced_forward(attn, attend):
        x = forward(x)
    prompts = prompts + mixed.pop()
    return x, prompts + mlp(norm2(prompts))


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    """The module runs this function instead of its own `forward`."""
    attributes = vars(module)
    before = {"forward": attributes["forward"]} if "forward" in attributes else {}
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(before)
