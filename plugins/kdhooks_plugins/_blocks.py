"""Transformer blocks that prompts can join: a ViT's, which attend to all tokens, or a Swin's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kdhooks import KDHooksError, Stage
from kdhooks_plugins._windows import check_windows, is_windowed, window_attention

Forward: TypeAlias = Callable[..., Tensor]

SUPPORTED = (
    "blocks with norm1 or ln1, attn, norm2 or ln2, and mlp or ffn, whose attn has qkv: a ViT's, on "
    "tokens (b n k), or a Swin's, whose attn takes windows ((b w) n k) and a mask (as in "
    "arcface_torch, FaceX-Zoo, timm, mmpretrain)"
)
_PARTS = (
    ("norm1", "attn", "norm2", "mlp"),
    ("norm1", "attn", "norm2", "ffn"),  # mmpretrain's Swin
    ("ln1", "attn", "ln2", "ffn"),  # its ViT
)


def transformer_blocks(teacher: nn.Module) -> dict[str, nn.Module]:
    """Find all modules that have the parts of a block, by path, and try to run each of them."""
    blocks = {path: module for path, module in teacher.named_modules() if _parts(module)}
    for path, block in blocks.items():
        try:
            _try(block)
        except Exception as error:
            raise KDHooksError(
                f"cakd: prompts can't join the teacher's block '{path}' ({error}); they join "
                f"{SUPPORTED}; set prompts = {{ number = 0 }} to run the teacher without prompts"
            ) from error
    return blocks


def _parts(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a block's parts, or none if the module is not a block."""
    names = {name for name, _ in module.named_children()}
    return next((parts for parts in _PARTS if names.issuperset(parts)), ())


def _attention(block: nn.Module) -> nn.Module:
    """Return the module that has qkv; in mmpretrain's Swin it is a submodule of `attn`."""
    attn = block.get_submodule("attn")
    return dict(attn.named_children()).get("w_msa", attn)


@torch.no_grad()
def _try(block: nn.Module) -> None:
    attn = _attention(block)
    weight = attn.get_parameter("qkv.weight")
    if is_windowed(attn):
        check_windows(attn, weight)
    else:
        block(weight.new_zeros(1, 3, width(block)))  # it must take any number of tokens


def width(block: nn.Module) -> int:
    """Return k, the width of the block's tokens."""
    return _attention(block).get_parameter("qkv.weight").shape[1]


def last_block(blocks: Mapping[str, nn.Module], stage: Stage) -> str:
    """Return the path of the last block of a stage, or of the stage itself if it is a block."""
    inside = [path for path in blocks if f"{path}.".startswith(f"{stage.path}.")]
    if not inside or width(blocks[inside[-1]]) != stage.shape[-1]:
        raise KDHooksError(
            f"cakd: prompts are pixel features of a stage that ends in a transformer block; found "
            f"'{stage.path}' of shape {stage.shape}; name the last block as the last stage, or set "
            "prompts = { in_features = false }"
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
    """The block's own `forward`, prompts (t k), its input -> its output, the prompts' (b t k)."""

    def run(x: Tensor) -> Tensor:
        return forward(x, *args, **kwargs)

    copies = prompts.expand(len(x), -1, -1)
    if is_windowed(_attention(block)):
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
    norm1, _, norm2, mlp = (block.get_submodule(part) for part in _parts(block))
    attn = _attention(block)
    mixed: list[Tensor] = []

    def attend(windows: Tensor, mask: Tensor | None = None) -> Tensor:
        windows, seen = window_attention(attn, windows, norm1(prompts), mask)
        mixed.append(seen)
        return windows

    with replaced_forward(attn, attend):
        x = forward(x)
    prompts = prompts + mixed.pop()
    if getattr(mlp, "add_identity", False):  # mmcv's FFN
        return x, mlp(norm2(prompts), identity=prompts)
    return x, prompts + mlp(norm2(prompts))


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Make the module run this function instead of its own `forward`."""
    attributes = vars(module)
    before = {"forward": attributes["forward"]} if "forward" in attributes else {}
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(before)
