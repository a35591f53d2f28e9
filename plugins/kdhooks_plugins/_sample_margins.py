"""Margins of each sample, which depend on the image's quality and on the student's lag."""

from math import pi
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import Scheduled, Varying

MarginType: TypeAlias = Literal["arcface", "cosface", "adaface"]

_EPS = 1e-3  # added to the standard deviation of the lengths
_MOMENTUM = 0.99  # the share of the old value in a running estimate


class SampleMargins(nn.Module):
    """(m, m2) of ψ(θ) = cos(θ + m) - m2, by q = clip(quality · z + geometry · g, -1, 1).

    arcface: (m (1 + q), 0). cosface: (0, m (1 + q)). adaface: (-m q, m (1 + q)). z is the length
    of the student's embedding relative to those of other samples; g = max(f - cos(s, t), 0) · f,
    where f is the teacher's cosine with the class, or 0 if that is negative.
    """

    def __init__(
        self, margin_type: MarginType, m: Scheduled, quality: Scheduled, geometry: Scheduled
    ) -> None:
        super().__init__()
        self.margin_type = margin_type
        self.m, self.quality, self.geometry = Varying(m), Varying(quality), Varying(geometry)
        self.lengths = RelativeLengths() if margin_type == "adaface" else None

    @property
    def by_lag(self) -> bool:
        return self.geometry.changes or self.geometry.now > 0

    @property
    def differ(self) -> bool:
        return self.by_lag or self.lengths is not None

    @torch.no_grad()
    def forward(
        self, student: Tensor, teacher: Tensor, fit: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(b d), (b d), (b) the teacher's cosine with the class, (n) lengths of the embeddings of
        all ranks -> m, m2 and q, (b) each.
        """
        q = student.new_zeros(len(student))
        if self.lengths is not None:
            assert lengths is not None
            q = q + self.quality.now * self.lengths(student, lengths)
        if fit is not None:
            fit = fit.clamp(min=0)
            lag = (fit - F.cosine_similarity(student, teacher)).relu()
            q = q + self.geometry.now * lag * fit
        q = q.clamp(-1, 1)
        m, none = self.m.now * (1 + q), torch.zeros_like(q)
        if self.margin_type == "arcface":
            return m.clamp(max=pi), none, q
        return (-self.m.now * q if self.margin_type == "adaface" else none), m, q


class RelativeLengths(nn.Module):
    """(‖s‖ - μ) / δ with running estimates of the lengths' mean and standard deviation.

    AdaFace, Kim et al., CVPR 2022, arXiv:2204.00964, uses it as the quality of an image. The
    estimates start at 20 and 100, as in its code, so no sample stands out at first.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("deviation", torch.tensor(100.0))

    def buffers_by_rank(self) -> set[str]:
        """Every rank updates them with the lengths of all ranks, so they need no averaging."""
        return {"mean", "deviation"}

    def forward(self, student: Tensor, lengths: Tensor) -> Tensor:
        """(b d), (n) lengths of all ranks -> (b)."""
        if self.training:
            mean = lengths.mean()
            squares = (lengths - mean).square().sum() / max(len(lengths) - 1, 1)
            self.mean.lerp_(mean.to(self.mean), 1 - _MOMENTUM)
            self.deviation.lerp_(squares.sqrt().to(self.deviation), 1 - _MOMENTUM)
        relative: Tensor = (student.norm(dim=1) - self.mean) / (self.deviation + _EPS)
        return relative
