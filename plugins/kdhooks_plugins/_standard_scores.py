"""Scores over their standard deviation among the classes: logit standardisation.

Sun et al., CVPR 2024, arXiv:2403.01731, take z-scores before the softmax. A softmax does not see
the mean that a z-score takes off, so that the deviation is all that is needed.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kdhooks import ClassShard, Wanted

Both: TypeAlias = Callable[[Tensor, ClassShard], tuple[Tensor, Tensor]]
"""(student (b d), a chunk of the student's classes) -> its scores and the teacher's, (b k) each."""

_LEAST = 1e-6  # of a deviation


class Sharpness(NamedTuple):
    """1 / (T · deviation) of each sample's scores, (b 1) for each side, as constants."""

    student: Tensor
    teacher: Tensor
    change: Tensor  # (b): zero, with the gradient of the logarithm of `student`

    @classmethod
    def of(cls, both: Both, student: Tensor, head: ClassShard, temperature: float) -> "Sharpness":
        def moments(student: Tensor, chunk: ClassShard) -> Wanted:
            z_s, z_t = both(student, chunk)
            alike = torch.zeros_like(z_t)  # every class counts equally
            means = [(z, alike) for z in (z_s, z_s.square(), z_t, z_t.square())]
            return Wanted(logs=[], means=means)

        _, (mean_s, square_s, mean_t, square_t) = head.over_classes(moments, student)
        by_s, by_t = _deviation(mean_s, square_s), _deviation(mean_t, square_t)
        change = by_s.detach().log() - by_s.log()
        factors = [1 / (temperature * by.detach()[:, None]) for by in (by_s, by_t)]
        return cls(*factors, change)


def _deviation(mean: Tensor, square: Tensor) -> Tensor:
    return (square - mean.square()).clamp(min=_LEAST**2).sqrt()
