"""Scores standardized over the classes: minus their mean, divided by their standard deviation.

Sun et al., CVPR 2024, arXiv:2403.01731, use such z-scores before the softmax.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks import ClassShard, Wanted
from kdhooks_plugins._margin import scores

_LEAST = 1e-6  # the lower bound of a standard deviation


class Standard(NamedTuple):
    """The constants (b 1) that standardize the scores (b k) of a chunk on both sides.

    The centre does not affect a softmax, and only keeps the numbers small. The deviation does, and
    it depends on the student: `change` carries that part of the gradient.
    """

    centres: tuple[Tensor, Tensor]
    factors: tuple[Tensor, Tensor]  # 1 / (T · deviation)

    def __call__(self, z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        by_s, by_t = self.factors
        return (z_s - self.centres[0]) * by_s, (z_t - self.centres[1]) * by_t

    def moments(self, z_s: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Request the moments of the student's scores, which `change` needs, in the main pass.

        A separate pass would compute all scores and both of their gradients once more.
        """
        return _moments(z_s - self.centres[0])

    def change(self, mean: Tensor, square: Tensor) -> Tensor:
        """-> (b): zero, with the gradient of the logarithm of the student's factor."""
        deviation = _deviation(mean, square)
        return deviation.detach().log() - deviation.log()


@torch.no_grad()
def standard(
    student: tuple[Tensor, ClassShard],
    teacher: tuple[Tensor, ClassShard],
    labels: Tensor,
    *,
    scale: float,
    margin: float,
    temperature: float,
) -> Standard:
    """Compute the constants of both sides from their embeddings (b d) and class rows."""
    centres, factors = [], []
    for embedding, rows in (student, teacher):
        centre = _centre(embedding, rows, scale)

        def moments(embedding: Tensor, chunk: ClassShard, centre: Tensor = centre) -> Wanted:
            z = scores(embedding, labels, chunk, scale, margin)
            return Wanted(logs=[], means=_moments(z - centre))

        _, (mean, square) = rows.over_classes(moments, embedding)
        centres.append(centre)
        factors.append(1 / (temperature * _deviation(mean, square)[:, None]))
    return Standard((centres[0], centres[1]), (factors[0], factors[1]))


def _centre(embedding: Tensor, rows: ClassShard, scale: float) -> Tensor:
    """(b e), rows -> (b 1): scale times the mean cosine with the classes of all ranks."""
    total = embedding.new_zeros(embedding.shape[1])
    for chunk in rows.chunks(embedding):
        total += F.normalize(chunk.weight.to(embedding.dtype)).sum(dim=0)
    mean = rows.sum(total) * (scale / rows.total)
    return (F.normalize(embedding) @ mean)[:, None]


def _moments(z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(b k) near 0 -> the pairs from which `over_classes` computes the means of z and z²."""
    alike = torch.zeros_like(z)  # every class counts equally
    return [(z, alike), (z.square(), alike)]


def _deviation(mean: Tensor, square: Tensor) -> Tensor:
    return (square - mean.square()).clamp(min=_LEAST**2).sqrt()
