"""Where a pixel lies on an aligned face: its distance to an anchor, and the bucket of that."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdhooks import KDHooksError
from kdhooks_plugins._maps import pool

_SIDE = 112  # pixels of the ArcFace template, in which all coordinates (x, y) are given
_LANDMARKS = ((38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20))
NOSE = _LANDMARKS[2]
_SPAN = 14  # half-cells of a 7 x 7 grid across the face: the unit of every distance here


@dataclass(frozen=True)
class FacialPositions:
    """I(D(i, anchor)), D = |i - anchor| + gamma · D_face, in half-cells of a 7 x 7 grid.

    The unit is the same for every grid, so that a place on the face has one position, whether a
    student's map or a teacher's tokens show it. The anchor is the pixel that holds that point.
    """

    distance: str = "relative"
    gamma: float = 1.0
    anchor: tuple[float, float] = NOSE
    pieces: tuple[float, float, float] = (4.0, 12.0, 24.0)
    saliency: Tensor | None = None  # (h w) of any size, from 0 to 1

    def __post_init__(self) -> None:
        alpha, beta, reach = self.pieces
        if not 0 < alpha <= beta or alpha >= reach:
            raise KDHooksError(
                "cakd: pieces are alpha, beta and where beta is reached, with 0 < alpha <= beta "
                f"and alpha < reach; found {tuple(self.pieces)}"
            )
        if not all(0 <= coordinate < _SIDE for coordinate in self.anchor):
            raise KDHooksError(
                f"cakd: anchor must be a point (x, y) of the {_SIDE} x {_SIDE} template; found "
                f"{tuple(self.anchor)}"
            )

    @property
    def rows(self) -> int:
        """How many buckets there are."""
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
        """(h, w) -> (n): how much more or less salient than the anchor; at most the span."""
        assert self.saliency is not None
        map_ = pool(self.saliency[None, None], size).flatten()
        return _SPAN * (map_ - map_[anchor]).abs()


def piecewise_index(x: Tensor, alpha: float, beta: float, reach: float) -> Tensor:
    """(…) -> (…): iRPE's buckets, one a unit up to alpha, then wider; beta from reach on."""
    beyond = (x.clamp(min=alpha) / alpha).log() / math.log(reach / alpha)
    far = (alpha + beyond * (beta - alpha)).round().clamp(max=beta)
    return torch.where(x <= alpha, x.round(), far).long()


def _relative(points: Tensor, anchor: int) -> Tensor:
    """(n 2) -> (n): how far the landmarks are, next to how far they are from the anchor (rms)."""
    landmarks = torch.tensor(_LANDMARKS, dtype=points.dtype) * _SPAN / _SIDE
    away = torch.cdist(points, landmarks)
    return (away - away[anchor]).square().mean(dim=1).sqrt()


def _centres(size: tuple[int, int]) -> Tensor:
    """(h, w) -> (n 2): x and y of the pixels' centres."""
    h, w = ((torch.arange(n, dtype=torch.float64) + 0.5) * _SPAN / n for n in size)
    y, x = torch.meshgrid(h, w, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
