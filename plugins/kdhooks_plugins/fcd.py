"""Feature consistency (FCD), as in ShrinkTeaNet, Duong et al., 2019, arXiv:1905.10620.

The baseline of most papers. The options include the cosine form of ShrinkTeaNet and VarGFaceNet,
and the L2 form that CoupleFace (Liu et al., ECCV 2022, arXiv:2204.05502) is based on.
Differs from the papers: the default weight. With weight 1 the term has no visible effect next to
ArcFace at scale 64; published weights on 1 - cos range from 0.5 to 128.

The embeddings are divided by their root mean square and not by their length, since F.rms_norm is a
single CUDA operator in each direction. F.normalize is about twenty, and a small student's step is
limited by how many operators the host can launch. The length becomes √d, so sums over d are means.
"""

from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, Model, Options, Weight, hookimpl, option
from kdhooks_plugins._widths import projection

_LEAST = 1e-12  # added to a length, in squares, so that nothing is divided by 0
Distance: TypeAlias = Literal["cosine", "cosine_squared", "l2", "mse", "raw_mse"]


class EmbeddingDistance(nn.Module):
    """The mean distance of student to teacher embeddings."""

    def __init__(self, distance: Distance = "cosine", projector: nn.Module | None = None) -> None:
        super().__init__()
        self.distance = distance
        self.projector = projector

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        teacher = teacher.detach()
        if self.projector is not None:
            student = self.projector(student)
        if self.distance == "raw_mse":
            return F.mse_loss(student, teacher)
        s, t = _root_mean_square_one(student), _root_mean_square_one(teacher)
        if self.distance == "cosine_squared":
            return (1 - (s * t).mean(dim=1)).square().mean()
        squared = F.mse_loss(s, t)  # ‖s - t‖² at length 1, which is 2(1 - cos)
        if self.distance == "l2":
            return squared
        return squared / (2 if self.distance == "cosine" else s.shape[1])


def _root_mean_square_one(x: Tensor) -> Tensor:
    """(b d) -> (b d)."""
    return F.rms_norm(x, x.shape[1:], eps=_LEAST**2 / x.shape[1])


class FCD(Options):
    """L = mean d(P(s), t), with P the identity, or a linear map with `projector`."""

    weight: Weight = option(32.0, "The factor of the term.", least=0)
    distance: Distance = option(
        "cosine",
        "cosine: 1 - cos; cosine_squared: (1 - cos)²; l2: ‖s - t‖² = 2(1 - cos); mse: the mean "
        "square over (b d), 2(1 - cos)/d; raw_mse: mse without unit length.",
    )
    projector: bool = option(
        False,
        "Learn a linear map of the student's embedding to the teacher's width. The map is not "
        "part of the student.",
    )

    @hookimpl
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
        projector = projection("fcd", student, teacher, self.projector)
        return EmbeddingTap(
            "fcd", EmbeddingDistance(self.distance, projector), self.weight, needs_labels=False
        )
