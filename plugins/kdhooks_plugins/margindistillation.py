"""MarginDistillation, Svitov and Alyamkin, 2020, arXiv:2003.02586.

From the paper and its code: ArcFace on the teacher's frozen classifier. Each sample's margin grows
with the similarity of the teacher's embedding to its own class.
Differs from the code: similarities below 0 count as 0, because otherwise a batch of samples that
the teacher does not know gets margins without any bound; and ψ is a straight line beyond θ = π - m.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from kdhooks import (
    ClassifierShare,
    ClassShard,
    KDHooksError,
    Model,
    Options,
    Schedule,
    Scheduled,
    Varying,
    Weight,
    hookimpl,
    option,
)
from kdhooks.classes.ranks import gather, world
from kdhooks_plugins._margin import MOST, margin_softmax
from kdhooks_plugins._widths import need_teachers_width


class TeacherMargins(nn.Module):
    """Cross-entropy of cos(θ + m_i), m_i = low + (high - low) · d_i / max d, d = cos(t, w_y)."""

    def __init__(self, low: Scheduled = 0.2, high: Scheduled = 0.5, scale: float = 64.0) -> None:
        super().__init__()
        self.low, self.high, self.scale = Varying(low), Varying(high), scale

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        m = self.margins(teacher, labels, classifier)
        loss, cosine = margin_softmax(student, labels, classifier, m=m, scale=self.scale)
        return loss, {"cosine": cosine, "margin": m.mean()}

    @torch.no_grad()
    def margins(self, teacher: Tensor, labels: Tensor, classifier: ClassShard) -> Tensor:
        """(b e), (b), classifier -> (b): from low to high, the margin of all ranks' best sample."""
        fit = classifier.own(teacher, labels).clamp(min=0)
        low, high = self.low.now, self.high.now
        if low > high:  # possible with two schedules, or with a function
            raise KDHooksError(
                f"margindistillation: low must be at most `high`; found {low} and {high} in a step"
            )
        all_ranks = fit if classifier.group else gather(fit, world())
        return low + (high - low) * fit / all_ranks.max().clamp(min=1e-6)


def _reached(margin: Scheduled) -> Collection[float]:
    """Return the numbers between which the margin lies; none for a function."""
    if isinstance(margin, Schedule):
        assert margin.initial is not None
        return margin.value, margin.initial
    return () if callable(margin) else (margin,)


class MarginDistillation(Options):
    """L = cross-entropy of ArcFace on the teacher's rows, with a separate margin per sample."""

    weight: Weight = option(1.0, "The factor of the term.", least=0)
    low: Scheduled = option(
        0.2,
        "The margin of a sample whose class the teacher does not recognise.",
        least=0,
        most=MOST,
        unit="rad",
    )
    high: Scheduled = option(
        0.5,
        "The margin of the sample in a batch with the highest teacher cosine to its class.",
        least=0,
        most=MOST,
        unit="rad",
    )
    scale: float = option(64.0, "σ, the factor of the cosines.", above=0)

    def check(self) -> None:
        low, high = _reached(self.low), _reached(self.high)
        one_is_constant = not (callable(self.low) and callable(self.high))
        if one_is_constant and low and high and max(low) > min(high):
            raise self.refused("low", f"must be at most `high`; found {max(low)} and {min(high)}")

    @hookimpl
    def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
        need_teachers_width("margindistillation", student, teacher)
        loss = TeacherMargins(self.low, self.high, self.scale)
        return ClassifierShare("margindistillation", loss, self.weight)
