"""Attention transfer (AT), Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928.

Activation-based AT with the maps F_mean^p of section 3.1: at the end of each stage, the student's
map of mean |F|^p over the channels should match the teacher's, both at unit length.
Differs from the paper: the squared distance is averaged over the pixels, as in the authors' code
(with weight 1000, as in RepDistiller); |F|^p also for odd p. Maps of different sizes are pooled to
the smaller size, not interpolated; RepDistiller pools the features before it computes their energy.
Ours: the cosine form, which counts all stages equally, whatever their number of pixels.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from kdhooks import FeatureTap, Model, Options, Weight, hookimpl, option
from kdhooks_plugins._attention import Energy, refuse_single_pixels, unit
from kdhooks_plugins._maps import paired_grids, to_smaller

Distance: TypeAlias = Literal["mse", "cosine"]
_WEIGHTS = {"mse": 1000.0, "cosine": 5.0}


class AttentionMaps(nn.Module):
    """Σ over the stages of the distance between unit-length energy maps (eq. 2)."""

    def __init__(
        self, ours: Sequence[Energy], theirs: Sequence[Energy], distance: Distance = "mse"
    ) -> None:
        super().__init__()
        self.ours, self.theirs = tuple(ours), tuple(theirs)
        self.distance = distance

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        ours = [energy(x) for energy, x in zip(self.ours, student, strict=True)]
        theirs = [energy(x.detach()) for energy, x in zip(self.theirs, teacher, strict=True)]
        terms = torch.stack([self._term(a, b) for a, b in zip(ours, theirs, strict=True)])
        notes = {f"stage{k}": term for k, term in enumerate(terms.detach(), start=1)}
        return terms.sum(), notes

    def _term(self, ours: Tensor, theirs: Tensor) -> Tensor:
        ours, theirs = to_smaller(ours, theirs)
        s, t = unit(ours), unit(theirs)
        if self.distance == "cosine":
            return 1 - (s * t).flatten(1).sum(dim=1).mean()
        return (s - t).square().mean()


class AT(Options):
    """L = Σ_k mean (A_k / ‖A_k‖ - A'_k / ‖A'_k‖)², A = mean_c |F|^p."""

    weight: Weight | None = option(
        None,
        "The factor of the term. The default is 1000, or 5 if the distance is cosine.",
        least=0,
    )
    p: float = option(
        2.0,
        "The power of the features. 1 compares whole maps; larger powers emphasise their peaks. "
        "Powers below 1 have no gradient at a zero.",
        least=1,
    )
    distance: Distance = option(
        "mse",
        "mse: the squared difference, averaged over the batch and the n pixels; cosine: 1 - cos, "
        "which is n/2 times as large.",
    )

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours, theirs = paired_grids("at", student, teacher)
        refuse_single_pixels([*ours, *theirs])
        loss = AttentionMaps(
            [Energy(grid, self.p) for grid in ours],
            [Energy(grid, self.p) for grid in theirs],
            self.distance,
        )
        return FeatureTap(
            "at",
            loss,
            _WEIGHTS[self.distance] if self.weight is None else self.weight,
            student=tuple(stage.path for stage in student.stages),
            teacher=tuple(stage.path for stage in teacher.stages),
            needs_labels=False,
        )
