"""Scores standardized over the classes: less their mean, over their deviation.

Sun et al., CVPR 2024, arXiv:2403.01731, take such z-scores before the softmax.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks import ClassShard, Wanted

Both: TypeAlias = Callable[[Tensor, ClassShard], tuple[Tensor, Tensor]]
"""(student (b d), a chunk of the student's classes) -> its scores and the teacher's, (b k) each."""

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
    both: Both,
    student: Tensor,
    head: ClassShard,
    centres: tuple[Tensor, Tensor],
    temperature: float,
) -> Standard:
    """centres: about the means of the scores, (b 1) each, as `centre` finds them."""

    def moments(student: Tensor, chunk: ClassShard) -> Wanted:
        z_s, z_t = (z - mean for z, mean in zip(both(student, chunk), centres, strict=True))
        alike = torch.zeros_like(z_t)  # every class counts equally
        return Wanted(logs=[], means=[(z, alike) for z in (z_s, z_s.square(), z_t, z_t.square())])

    _, (mean_s, square_s, mean_t, square_t) = head.over_classes(moments, student)
    by_s, by_t = _deviation(mean_s, square_s), _deviation(mean_t, square_t)
    change = by_s.detach().log() - by_s.log()
    factor_s, factor_t = (1 / (temperature * by.detach()[:, None]) for by in (by_s, by_t))
    return Standard(centres, (factor_s, factor_t), change)


@torch.no_grad()
def centre(embedding: Tensor, rows: ClassShard, scale: float) -> Tensor:
    """(b e), rows -> (b 1): scale times the mean cosine with the classes of all ranks."""
    total = embedding.new_zeros(embedding.shape[1])
    for chunk in rows.chunks(embedding):
        total += F.normalize(chunk.weight.to(embedding.dtype)).sum(dim=0)
    mean = rows.sum(total) * (scale / rows.total)
    return (F.normalize(embedding) @ mean)[:, None]


def _deviation(mean: Tensor, square: Tensor) -> Tensor:
    return (square - mean.square()).clamp(min=_LEAST**2).sqrt()
