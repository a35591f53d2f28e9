"""AdaDistill, Boutros et al., ECCV 2024, arXiv:2407.01332.

From the paper and its code: a margin softmax of the student's embedding against class centres,
which follow the teacher's embeddings of the batch, quickly at first and then more and more slowly.
Differs from the code: the samples of a class in one batch are averaged, centres keep unit length,
all ranks use the same centres, and the margin becomes a straight line beyond θ = π - m.
Two additions come from a public re-run, rayyichen310/adadistill_with_adaface_loss: AdaFace's
margin, which depends on the length of the embedding, and a margin that grows if the student lags
behind the teacher. The re-run has the second only with AdaFace's margin; its use in the other two
margins is ours.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks import (
    ClassifierShare,
    ClassShard,
    ClassSplit,
    Model,
    Options,
    PerClass,
    Scheduled,
    Weight,
    hookimpl,
    option,
)
from kdhooks.classes.ranks import gather, world
from kdhooks_plugins._batches import class_sums
from kdhooks_plugins._margin import MOST, margin_softmax
from kdhooks_plugins._sample_margins import MarginType, SampleMargins
from kdhooks_plugins._widths import need_teachers_width

_LEAST = 1e-6  # the lower bound of alpha
_M = {"arcface": 0.45, "cosface": 0.35, "adaface": 0.4}
_QUALITY = 0.333


class AdaptiveCentres(PerClass):
    """w_y <- α w_y + (1 - α) t, then cross-entropy of a margin softmax against w / ‖w‖."""

    centres: Tensor

    def __init__(self, margins: SampleMargins, scale: float = 64.0, weighted: bool = True) -> None:
        super().__init__(ClassSplit.whole(0), "adadistill")
        self.margins, self.scale, self.weighted = margins, scale, weighted

    def prepare(self, classifier: ClassShard) -> None:
        """Start the centres at the teacher's class rows, split over the ranks in the same way."""
        self.split = ClassSplit.of(classifier)
        self.keep("centres", F.normalize(classifier.weight.detach()))

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        if not self.split.total:
            self.prepare(classifier)
        rows = replace(classifier, weight=self.centres)
        m, m2, q = self._margins(student, teacher, labels, rows)
        alpha = self._follow(student, teacher, labels, rows) if self.training else None
        loss, cosine = margin_softmax(student, labels, rows, m=m, m2=m2, scale=self.scale)
        notes = {"cosine": cosine, **({"q": q.mean()} if self.margins.differ else {})}
        return loss, notes if alpha is None else {**notes, "alpha": alpha}

    @torch.no_grad()
    def _margins(
        self, student: Tensor, teacher: Tensor, labels: Tensor, rows: ClassShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each sample's m, m2 and q, from the centres before this batch moves them."""
        fit = rows.own(teacher, labels) if self.margins.by_lag else None
        lengths = None
        if self.margins.lengths is not None:
            lengths = student.norm(dim=1)
            if rows.group is None:
                lengths = gather(lengths, world())
        found: tuple[Tensor, Tensor, Tensor] = self.margins(student, teacher, fit, lengths)
        return found

    @torch.no_grad()
    def _follow(self, student: Tensor, teacher: Tensor, labels: Tensor, rows: ClassShard) -> Tensor:
        """Move the centres of the batch's classes, equally on all ranks; return the mean of α."""
        if rows.group is None:
            student, teacher, labels = (gather(x, world()) for x in (student, teacher, labels))
        s, t = F.normalize(student), F.normalize(teacher)
        own, index, mine = rows.own_rows(labels)
        alpha = (s * t).sum(dim=1)
        if self.weighted:
            alpha = alpha * rows.own(teacher, labels).clamp(_LEAST, 1.0)
        alpha = alpha.clamp(_LEAST, 1.0)
        moved = alpha[:, None] * own + (1 - alpha)[:, None] * t
        moved = F.normalize(class_sums(moved, labels))
        # A sample of another rank's class repeats the write of one whose class is here, if any.
        source = torch.where(mine, torch.arange(len(mine), device=mine.device), mine.int().argmax())
        self.centres[index[source]] = torch.where(mine.any(), moved, own)[source].to(self.centres)
        return alpha.mean()


class AdaDistill(Options):
    """L = cross-entropy of cos(θ + m) - m2 against the centres, at scale σ."""

    weight: Weight = option(1.0, "The factor of the term.", least=0)
    m: Scheduled | None = option(
        None,
        "The margin. The default is 0.45 for arcface, 0.35 for cosface and 0.4 for adaface.",
        least=0,
        most=MOST,
        unit="rad",
    )
    margin_type: MarginType = option(
        "arcface",
        "arcface: cos(θ + m); cosface: cos θ - m; adaface: cos(θ - m q) - m (1 + q), where q "
        "depends on the length of the student's embedding.",
    )
    quality: Scheduled | None = option(
        None,
        "h, only with adaface: how much a sample's length, in standard deviations from the mean, "
        "adds to q. The default is 0.333.",
        least=0,
    )
    geometry: Scheduled = option(
        0.0,
        "k: add k · max(cos(w_y, t) - cos(s, t), 0) · cos(w_y, t) to q. The margin is m (1 + q), "
        "so it grows for samples on which the student lags behind the teacher. The re-run reaches "
        "3 over the first epoch.",
        least=0,
    )
    scale: float = option(64.0, "σ, the factor of the cosines.", above=0)
    weighted: bool = option(
        True,
        "Multiply α by the cosine of the teacher and the centre: α = cos(s, t) · cos(w_y, t); "
        "false: α = cos(s, t).",
    )

    def check(self) -> None:
        if self.quality is not None and self.margin_type != "adaface":
            raise self.refused(
                "quality", f"belongs to margin_type 'adaface'; found '{self.margin_type}'"
            )
        for name in ("quality", "geometry"):
            if self.m == 0 and getattr(self, name):
                raise self.refused(name, "changes the margin m, which is 0; leave it out")

    @hookimpl
    def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
        need_teachers_width("adadistill", student, teacher, theirs="the teacher's")
        margins = SampleMargins(
            self.margin_type,
            _M[self.margin_type] if self.m is None else self.m,
            _QUALITY if self.quality is None else self.quality,
            self.geometry,
        )
        loss = AdaptiveCentres(margins, scale=self.scale, weighted=self.weighted)
        return ClassifierShare("adadistill", loss, self.weight)
