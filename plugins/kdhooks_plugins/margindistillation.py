"""MarginDistillation, Svitov and Alyamkin, 2020, arXiv:2003.02586.

From the paper and what its code computes: ArcFace on the teacher's frozen classifier, where each
sample's margin grows with how well the teacher's embedding fits its own class.
Differs from the code: similarities below 0 count as 0, without which a batch of samples that the
teacher does not know gives margins beyond all bounds; and the line past θ = π - m.
"""

import torch
from torch import Tensor, nn

from kdhooks import ClassifierShare, ClassShard, KDHooksError, Model, hookimpl
from kdhooks.classes.shards import gather, world
from kdhooks.declarations import Weight
from kdhooks_plugins._margin import margin_softmax
from kdhooks_plugins._widths import need_teachers_width


class TeacherMargins(nn.Module):
    """Cross-entropy of cos(θ + m_i), m_i = low + (high - low) · d_i / max d, d = cos(t, w_y)."""

    def __init__(self, low: float = 0.2, high: float = 0.5, scale: float = 64.0) -> None:
        super().__init__()
        self.low, self.high, self.scale = low, high, scale

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        m = self.margins(teacher, labels, classifier)
        loss, cosine = margin_softmax(student, labels, classifier, m=m, scale=self.scale)
        return loss, {"cosine": cosine, "margin": m.mean()}

    @torch.no_grad()
    def margins(self, teacher: Tensor, labels: Tensor, classifier: ClassShard) -> Tensor:
        """(b e), (b), classifier -> (b), from low to high, which the best of all ranks has."""
        fit = classifier.own(teacher, labels).clamp(min=0)
        all_ranks = fit if classifier.group else gather(fit, world())
        return self.low + (self.high - self.low) * fit / all_ranks.max().clamp(min=1e-6)


class MarginDistillation:
    """L = cross-entropy of ArcFace on the teacher's rows, with a margin of each sample's own."""

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        low: float = 0.2,
        high: float = 0.5,
        scale: float = 64.0,
    ) -> None:
        """low, high: of the margins, in radians; the best sample of a batch has high. scale: σ."""
        if not 0 <= low <= high:
            raise KDHooksError(
                f"margindistillation: low and high must rise from 0; found {low} and {high}"
            )
        if scale <= 0:
            raise KDHooksError(f"margindistillation: scale must be above 0; found {scale}")
        self.weight, self.low, self.high, self.scale = weight, low, high, scale

    @hookimpl
    def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
        need_teachers_width("margindistillation", student, teacher)
        loss = TeacherMargins(self.low, self.high, self.scale)
        return ClassifierShare("margindistillation", loss, self.weight)
