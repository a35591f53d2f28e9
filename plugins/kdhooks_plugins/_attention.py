"""Attention maps (b 1 h w): the energy of a stage, or the logits of its CBAM."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import KDHooksError, Model
from kdhooks_plugins._maps import Grid

_SHORTEST = 1e-6  # a map's length, below which it counts as empty
_EPS = 1e-6  # of a sigmoid's output: its logit is cut off there


@dataclass(frozen=True)
class Energy:
    """Where a stage is active: mean |F|^p over its channels."""

    grid: Grid
    p: float = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        """(b k h w), or tokens (b n k) -> (b 1 h w)."""
        return self.grid(x).abs().pow(self.p).mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Logits:
    """What CBAM attends to, in front of its sigmoid: "cbam_spatial", or "cbam_channel"."""

    name: str
    kind: str
    undo_sigmoid: bool  # the tapped module is the sigmoid itself

    @staticmethod
    def at(path: str, kind: str, model: Model, owner: str) -> "Logits":
        known = dict(model.module.named_modules()) if model.module is not None else {}
        module = known.get(path)  # a path that is not there is refused where it is tapped
        return Logits(f"{owner} attention '{path}'", kind, isinstance(module, nn.Sigmoid))

    def __call__(self, x: Tensor) -> Tensor:
        """(b 1 h w) -> (b 1 h w), or of channels (b k), (b k 1 1) -> (b k 1 1)."""
        logits = x.logit(eps=_EPS) if self.undo_sigmoid else x
        if self.kind == "cbam_spatial":
            if x.ndim != 4 or x.shape[1] != 1:
                raise KDHooksError(
                    f"{self.name} must put out one map (b 1 h w); found {tuple(x.shape)}; name "
                    "the convolution of CBAM's spatial gate, or the nn.Sigmoid behind it"
                )
            return logits
        if x.ndim < 2 or x.shape[2:].numel() != 1:
            raise KDHooksError(
                f"{self.name} must put out one number a channel (b k 1 1); found "
                f"{tuple(x.shape)}; name the nn.Sigmoid of CBAM's channel gate, or a submodule "
                "that adds up its logits"
            )
        return logits.reshape(*x.shape[:2], 1, 1)


def refuse_single_pixels(grids: Sequence[Grid]) -> None:
    """A map of one pixel, brought to unit length, is 1 whatever it was."""
    for grid in grids:
        if grid.size == (1, 1):
            raise KDHooksError(
                f"{grid.name}: an attention map needs more than one pixel; leave the stage out, "
                "or name a submodule in front of its pooling"
            )


def unit(x: Tensor, center: bool = False) -> Tensor:
    """(b k h w) -> (b n), of length 1; centred first, so that products are Pearson's r."""
    flat = x.flatten(1)
    return F.normalize(flat - flat.mean(dim=1, keepdim=True) if center else flat, eps=_SHORTEST)
