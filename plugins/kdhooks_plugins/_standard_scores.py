"""Scores standardized over the classes: less their mean, over their deviation.

Sun et al., CVPR 2024, arXiv:2403.01731, take such z-scores before the softmax.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks import ClassShard, Wanted
from kdhooks_plugins._margin import scores

_LEAST = 1e-6  # of a deviation


class Standard(NamedTuple):
    """What standardizes the scores (b k) of a chunk on both sides, as constants (b 1).

    A softmax does not see the centre, which only keeps the numbers small. It does see the
    deviation, which depends on the student: that part of the gradient goes by `change`.
    """

    centres: tuple[Tensor, Tensor]
    factors: tuple[Tensor, Tensor]  # 1 / (T · deviation)
    change: Tensor  # (b): zero, with the gradient of the logarithm of the student's factor

    def __call__(self, z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        by_s, by_t = self.factors
        return (z_s - self.centres[0]) * by_s, (z_t - self.centres[1]) * by_t


def standard(
    student: tuple[Tensor, ClassShard],
    teacher: tuple[Tensor, ClassShard],
    labels: Tensor,
    *,
    scale: float,
    margin: float,
    temperature: float,
) -> Standard:
    """student, teacher: the embedding (b d) and the rows of each side."""
    centre_s, centre_t = _centre(*student, scale), _centre(*teacher, scale)
    by_s = _deviation(*student, labels, scale, margin, centre_s)
    by_t = _deviation(*teacher, labels, scale, margin, centre_t)
    change = by_s.detach().log() - by_s.log()
    factor_s, factor_t = (1 / (temperature * by.detach()[:, None]) for by in (by_s, by_t))
    return Standard((centre_s, centre_t), (factor_s, factor_t), change)


@torch.no_grad()
def _centre(embedding: Tensor, rows: ClassShard, scale: float) -> Tensor:
    """(b e), rows -> (b 1): scale times the mean cosine with the classes of all ranks."""
    total = embedding.new_zeros(embedding.shape[1])
    for chunk in rows.chunks(embedding):
        total += F.normalize(chunk.weight.to(embedding.dtype)).sum(dim=0)
    mean = rows.sum(total) * (scale / rows.total)
    return (F.normalize(embedding) @ mean)[:, None]


def _deviation(
    embedding: Tensor,
    rows: ClassShard,
    labels: Tensor,
    scale: float,
    margin: float,
    centre: Tensor,
) -> Tensor:
    """(b e), rows, (b), (b 1) near the mean -> (b): of the scores with the classes of all ranks."""

    def moments(embedding: Tensor, chunk: ClassShard) -> Wanted:
        z = scores(embedding, labels, chunk, scale, margin) - centre
        alike = torch.zeros_like(z)  # every class counts equally
        return Wanted(logs=[], means=[(z, alike), (z.square(), alike)])

    _, (mean, square) = rows.over_classes(moments, embedding)
    return (square - mean.square()).clamp(min=_LEAST**2).sqrt()
