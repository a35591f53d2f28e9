"""The position of a pixel on an aligned face: the bucket of its distance to an anchor point."""

import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kdhooks import Options, option
from kdhooks_plugins._maps import pool
from kdhooks_plugins.saliency import load_saliency

_SIDE = 112  # pixels of the ArcFace template, in which all coordinates (x, y) are given
_LANDMARKS = ((38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20))
NOSE = _LANDMARKS[2]
_SPAN = 14  # half-cells of a 7 x 7 grid across the face: the unit of every distance here


class FacialPositions(Options, subject="cakd: positions"):
    """I(D(i, anchor)), D = |i - anchor| + gamma · D_face, in half-cells of a 7 x 7 grid.

    The unit is the same for every grid, so a place on the face has the same position in the
    student's map and in the teacher's tokens. The anchor is the pixel that contains that point.
    """

    distance: Literal["relative", "saliency"] = option(
        "relative",
        "D_face, the difference between a pixel and the anchor. relative: of their distances to "
        "the five landmarks of an aligned face; saliency: of the teacher's activity at both.",
    )
    saliency: Tensor | Path | None = option(
        None,
        "For the distance saliency: a map (h w) from `saliency.saliency_map`, or a file of one.",
    )
    gamma: float = option(1.0, "The factor of D_face.", least=0)
    anchor: tuple[float, float] = option(
        NOSE,
        "The point (x, y) in the 112 x 112 template from which positions are measured; by default "
        "the tip of the nose.",
        least=0,
        below=_SIDE,
        unit="pixels",
    )
    pieces: tuple[float, float, float] = option(
        (4.0, 12.0, 24.0),
        "α, β and γ' of the piecewise index: buckets are half a cell wide up to α and wider beyond "
        "it; the last bucket, β, starts at γ'.",
        above=0,
    )

    def check(self) -> None:
        alpha, beta, reach = self.pieces
        if alpha > beta or alpha >= reach:
            raise self.refused(
                "pieces",
                "must be alpha, beta and the distance that reaches beta, with alpha <= beta and "
                f"alpha < reach; found {self.pieces}",
            )
        if (self.distance == "saliency") != (self.saliency is not None):
            found = "no" if self.saliency is None else "a"
            raise self.refused(
                "saliency",
                "must be set with distance 'saliency', and only with it; found distance "
                f"'{self.distance}' and {found} map; kdhooks_plugins.saliency.saliency_map creates "
                "one",
            )
        if self.saliency is not None:
            object.__setattr__(self, "saliency", load_saliency(self.saliency))

    @property
    def rows(self) -> int:
        """The number of buckets."""
        alpha, beta, _ = self.pieces
        return max(round(alpha), int(beta)) + 1

    def buckets(self, size: tuple[int, int]) -> Tensor:
        """(h, w) -> (n), row by row."""
        return piecewise_index(self.distances(size), *self.pieces)

    def distances(self, size: tuple[int, int]) -> Tensor:
        """(h, w) -> (n): D of each pixel."""
        h, w = size
        x, y = self.anchor
        anchor = int(y / _SIDE * h) * w + int(x / _SIDE * w)
        points = _centres(size)
        plain: Tensor = torch.linalg.vector_norm(points - points[anchor], dim=1)
        salient = self.distance == "saliency"
        facial = self._salient(size, anchor) if salient else _relative(points, anchor)
        return plain + self.gamma * facial

    def _salient(self, size: tuple[int, int], anchor: int) -> Tensor:
        """(h, w) -> (n): the difference in saliency from the anchor, scaled to at most the span."""
        assert isinstance(self.saliency, Tensor)
        map_ = pool(self.saliency[None, None], size).flatten()
        return _SPAN * (map_ - map_[anchor]).abs()


def piecewise_index(x: Tensor, alpha: float, beta: float, reach: float) -> Tensor:
    """(…) -> (…): iRPE's buckets, one per unit up to alpha, then wider; beta from reach on."""
    beyond = (x.clamp(min=alpha) / alpha).log() / math.log(reach / alpha)
    far = (alpha + beyond * (beta - alpha)).round().clamp(max=beta)
    return torch.where(x <= alpha, x.round(), far).long()


def _relative(points: Tensor, anchor: int) -> Tensor:
    """(n 2) -> (n): rms difference of each pixel's and the anchor's distances to the landmarks."""
    landmarks = torch.tensor(_LANDMARKS, dtype=points.dtype) * _SPAN / _SIDE
    away = torch.cdist(points, landmarks)
    return (away - away[anchor]).square().mean(dim=1).sqrt()


def _centres(size: tuple[int, int]) -> Tensor:
    """(h, w) -> (n 2): x and y of the pixels' centres."""
    h, w = ((torch.arange(n, dtype=torch.float64) + 0.5) * _SPAN / n for n in size)
    y, x = torch.meshgrid(h, w, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
