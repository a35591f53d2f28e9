"""Attention in windows, as in Swin; prompts are additional tokens of every window."""

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from kdhooks import KDHooksError


class WindowAttention(Protocol):
    """The attributes of an attention module that are used here.

    Its dropout is not among them, since a teacher is in eval mode.
    """

    qkv: nn.Linear
    proj: nn.Linear
    scale: float
    relative_position_bias_table: Tensor  # (m heads)
    relative_position_index: Tensor  # (n n)


_READ = tuple(WindowAttention.__annotations__)


def is_windowed(module: nn.Module) -> bool:
    """Whether this attention has a position bias, which fits only a window."""
    return hasattr(module, "relative_position_bias_table")


def window_attention(
    module: nn.Module, windows: Tensor, prompts: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """((b w) n k), (b t k), (w n n) -> ((b w) n k), (b t k), the mean over the windows.

    Windows are ordered by sample. Between prompts and pixels there is neither bias nor mask.
    """
    attn = cast(WindowAttention, module)
    b, t, _ = prompts.shape
    copies = prompts.repeat_interleave(len(windows) // b, dim=0)
    bias = attn.relative_position_bias_table
    query, key, value = rearrange(
        attn.qkv(torch.cat([copies, windows], dim=1)),
        "b n (three h d) -> three b h n d",
        three=3,
        h=bias.shape[1],
    )
    bias = rearrange(bias[attn.relative_position_index], "n m h -> 1 h n m")
    if mask is not None:
        bias = bias + repeat(mask, "w n m -> (b w) 1 n m", b=b)
    bias = F.pad(bias, (t, 0, t, 0)).to(query)
    mixed = F.scaled_dot_product_attention(query, key, value, bias, scale=attn.scale)
    out = attn.proj(rearrange(mixed, "b h n d -> b n (h d)"))
    return out[:, t:], reduce(out[:, :t], "(b w) t k -> b t k", "mean", b=b)


def check_windows(module: nn.Module, like: Tensor) -> None:
    """Check that the module has these attributes, and that without prompts its result is ours."""
    missing = [name for name in _READ if not hasattr(module, name)]
    if missing:
        raise KDHooksError(f"its attention has no {', '.join(missing)}")
    n = len(cast(WindowAttention, module).relative_position_index)
    k = like.shape[1]
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(2, n, k, generator=generator).to(like)
    found, _ = window_attention(module, windows, windows.new_empty(1, 0, k))
    if not torch.allclose(found, module(windows), rtol=1e-3, atol=1e-4):
        raise KDHooksError("its attention does not compute that of a Swin window")
