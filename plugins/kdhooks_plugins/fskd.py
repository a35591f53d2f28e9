"""Feature-similarity KD (F-SKD), Shin, Yu and Lee, 2023, arXiv:2303.04681.

From the authors' code: the outputs of the stages are flattened, and the mean over the stages of
1 - cos has the factor 20. Student and teacher have the same architecture there, and the student
sees low-resolution images that are resized to the teacher's size.
Ours: `center` and its consequences. The mean over images makes up most of an uncentred cosine, and
a student can raise the cosine by matching only that mean. The teacher's running mean over images is
therefore subtracted by default; `center = false` is the authors' form. A bias-free 1 x 1
convolution precedes each comparison if the numbers of channels differ. If centred, it is always
used, since the student's features after a ReLU are never negative, and centred features can be.
Maps of different sizes are average-pooled to the smaller size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdhooks import FeatureTap, Model, Options, Weight, hookimpl, option
from kdhooks_plugins._hints import centred, cosine_distance
from kdhooks_plugins._maps import Grid, paired_grids, to_smaller


class FeatureSimilarity(nn.Module):
    """The mean over the stages of 1 - cos between both sides' flattened features."""

    def __init__(
        self, ours: Sequence[Grid], theirs: Sequence[Grid], *, center: bool = True
    ) -> None:
        super().__init__()
        self.ours, self.theirs = tuple(ours), tuple(theirs)
        pairs = list(zip(ours, theirs, strict=True))
        self.connectors = nn.ModuleList(
            nn.Conv2d(s.channels, t.channels, 1, bias=False)
            if center or s.channels != t.channels
            else nn.Identity()
            for s, t in pairs
        )
        self.means = nn.ModuleList(
            centred(t.channels, s.size, t.size) if center else nn.Identity() for s, t in pairs
        )

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        ours = [grid(x) for grid, x in zip(self.ours, student, strict=True)]
        theirs = [grid(x.detach()) for grid, x in zip(self.theirs, teacher, strict=True)]
        parts = zip(self.connectors, self.means, ours, theirs, strict=True)
        terms = [self._term(connector, mean, s, t) for connector, mean, s, t in parts]
        notes = {f"stage{k}": term.detach() for k, term in enumerate(terms, start=1)}
        return torch.stack(terms).mean(), notes

    @staticmethod
    def _term(connector: nn.Module, mean: nn.Module, ours: Tensor, theirs: Tensor) -> Tensor:
        s, t = to_smaller(ours, theirs)
        return cosine_distance(connector(s), mean(t))


class FSKD(Options):
    """L = mean_k (1 - cos(C_k(F_k), F'_k - m_k)), m_k the teacher's mean over images."""

    weight: Weight = option(20.0, "The factor of the term.", least=0)
    center: bool = option(
        True,
        "Subtract the teacher's running mean over images, and learn a 1 x 1 convolution of the "
        "student's features in each stage; false, the authors' form: do not subtract it, and use a "
        "convolution only if the numbers of channels differ.",
    )

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours, theirs = paired_grids("fskd", student, teacher)
        return FeatureTap(
            "fskd",
            FeatureSimilarity(ours, theirs, center=self.center),
            self.weight,
            student=tuple(stage.path for stage in student.stages),
            teacher=tuple(stage.path for stage in teacher.stages),
            needs_labels=False,
        )
