"""Feature consistency (FCD), as in ShrinkTeaNet, Duong et al., 2019, arXiv:1905.10620.

The baseline of most papers: in the cosine form of ShrinkTeaNet and VarGFaceNet, and in the L2 form
that CoupleFace (Liu et al., ECCV 2022, arXiv:2204.05502) starts from.
Differs from the papers: the default weight. With weight 1 the term is too weak to be seen next to
ArcFace at scale 64; published weights on 1 - cos run from 0.5 to 128.

The embeddings are divided by their root mean square and not by their length, since F.rms_norm is a
single CUDA operator in each direction. F.normalize is about twenty, and a small student's step is
limited by how many operators the host can start. The length becomes √d, so sums over d are means.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, KDHooksError, Model, hookimpl
from kdhooks.declarations import Weight

_LEAST = 1e-12  # added to a length, in squares, so that nothing is divided by 0
DISTANCES = ("cosine", "cosine_squared", "l2", "mse", "raw_mse")


class EmbeddingDistance(nn.Module):
    """The mean distance of student to teacher embeddings."""

    def __init__(self, distance: str = "cosine", projector: nn.Module | None = None) -> None:
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


class FCD:
    """L = mean d(P(s), t), with P the identity, or linear where the widths differ."""

    def __init__(
        self, *, weight: Weight = 32.0, distance: str = "cosine", projector: bool = False
    ) -> None:
        """
        distance: "cosine" 1 - cos; "cosine_squared" (1 - cos)²; "l2" ‖s - t‖² = 2(1 - cos);
            "mse" the mean over (b d) of the same, 2(1 - cos)/d; "raw_mse" without unit length.
        projector: learn a linear map to the teacher's width; it is not part of the student.
        """
        if distance not in DISTANCES:
            raise KDHooksError(f"fcd: distance must be one of {DISTANCES}; found '{distance}'")
        self.weight = weight
        self.distance = distance
        self.projector = projector

    @hookimpl
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
        d, e = student.embedding_dim, teacher.embedding_dim
        if d != e and not self.projector:
            raise KDHooksError(
                f"fcd: student and teacher embeddings must be equally wide; found {d} and {e}; "
                "set projector = true, or give the student the teacher's width"
            )
        projector = nn.Linear(d, e, bias=False) if self.projector else None
        return EmbeddingTap(
            "fcd", EmbeddingDistance(self.distance, projector), self.weight, needs_labels=False
        )
