"""Attention to pixels (b 1 h w) and channels (b k 1 1), from a stage or from the gates of CBAM."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import KDHooksError, Model
from kdhooks_plugins._maps import Grid

_SHORTEST = 1e-6  # a shorter map counts as empty
_EPS = 1e-6  # a sigmoid's output is clamped by it before its logit is taken


@dataclass(frozen=True)
class Energy:
    """The activity of a stage at each pixel: mean |F|^p over its channels."""

    grid: Grid
    p: float = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        """(b k h w), or tokens (b n k) -> (b 1 h w)."""
        return self.grid(x).abs().pow(self.p).mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Squeeze:
    """The activity of each channel of a stage: its mean over the pixels."""

    grid: Grid

    def __call__(self, x: Tensor) -> Tensor:
        """(b k h w), or tokens (b n k) -> (b k 1 1)."""
        return self.grid(x).mean(dim=(2, 3), keepdim=True)


@dataclass(frozen=True)
class Logits:
    """The logits of a gate of CBAM, before its sigmoid; its kind is "channel" or "spatial"."""

    name: str
    kind: str
    channels: int  # those of the stage that the gate belongs to
    undo_sigmoid: bool  # the tapped module is the sigmoid itself

    @staticmethod
    def at(path: str, kind: str, model: Model, owner: str, channels: int) -> "Logits":
        known = dict(model.module.named_modules()) if model.module is not None else {}
        module = known.get(path)  # the tap refuses an unknown path
        name = f"{owner} {kind} gate '{path}'"
        return Logits(name, kind, channels, isinstance(module, nn.Sigmoid))

    def __call__(self, x: Tensor) -> Tensor:
        """(b 1 h w) -> (b 1 h w), or of channels (b k), (b k 1 1) -> (b k 1 1)."""
        logits = x.logit(eps=_EPS) if self.undo_sigmoid else x
        if self.kind == "spatial":
            if x.ndim != 4 or x.shape[1] != 1 or x.shape[2:].numel() == 1:
                raise KDHooksError(
                    f"{self.name} must return one map (b 1 h w); found {tuple(x.shape)}; name "
                    "the convolution of CBAM's spatial gate, or the nn.Sigmoid after it"
                )
            return logits
        if x.ndim < 2 or x.shape[2:].numel() != 1:
            raise KDHooksError(
                f"{self.name} must return one number per channel (b k 1 1); found "
                f"{tuple(x.shape)}; name the nn.Sigmoid of CBAM's channel gate, or a submodule "
                "that adds its logits"
            )
        if x.shape[1] != self.channels:
            raise KDHooksError(
                f"{self.name} must have as many channels as its stage, {self.channels}; found "
                f"{x.shape[1]}; name the end of the block that the gate belongs to as the stage"
            )
        return logits.reshape(*x.shape[:2], 1, 1)


def refuse_single_pixels(grids: Sequence[Grid]) -> None:
    """Refuse maps of one pixel, which are always 1 at unit length."""
    for grid in grids:
        if grid.size == (1, 1):
            raise KDHooksError(
                f"{grid.name}: an attention map needs more than one pixel; leave the stage out, "
                "or name a submodule before its pooling"
            )


def unit(x: Tensor, shortest: float = _SHORTEST) -> Tensor:
    """(b k h w) -> (b k h w): each sample at length 1, or less if it is shorter than `shortest`."""
    return F.normalize(x.flatten(1), eps=shortest).view_as(x)
