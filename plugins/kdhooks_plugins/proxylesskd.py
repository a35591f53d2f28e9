"""ProxylessKD, Shi et al., 2020, arXiv:2011.00265.

The teacher's classifier becomes the student's, frozen, and an ordinary margin softmax then pulls
the student into the teacher's embedding space. The objective follows the paper.
Reconstruction: margins and scale (the paper's tables could not be read), the projector for
different widths, the guard that keeps cos(θ + m) falling, and the optional embedding term. Class
means can replace the classifier if the teacher comes without one.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import (
    ClassifierShare,
    ClassShard,
    InheritedClassifier,
    Model,
    Options,
    Scheduled,
    Varying,
    Weight,
    hookimpl,
    option,
)
from kdhooks_plugins._margin import MOST, margin_softmax
from kdhooks_plugins._widths import need_teachers_width


class MarginSoftmax(nn.Module):
    """Cross-entropy of a margin softmax on frozen rows, ψ(θ) = cos(θ + m) - m2 at the own class.

    The mean is over the samples that have a label: labels below 0 are left out.
    """

    def __init__(
        self,
        m: Scheduled,
        m2: Scheduled,
        scale: float,
        *,
        monotone: bool = True,
        straight_through: bool = False,
        fcd_weight: Scheduled = 0.0,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.m, self.m2, self.scale = Varying(m), Varying(m2), scale
        self.monotone = monotone
        self.straight_through = straight_through
        self.fcd_weight = Varying(fcd_weight)
        self.projector = projector or nn.Identity()

    def forward(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        student = self.projector(student)
        loss, cosine = margin_softmax(
            student,
            labels,
            classifier,
            m=student.new_full((), self.m.now),
            m2=self.m2.now,
            scale=self.scale,
            monotone=self.monotone,
            straight_through=self.straight_through,
        )
        if self.fcd_weight.value:
            assert teacher is not None
            gap = 1 - F.cosine_similarity(student, teacher.detach())
            loss = loss + self.fcd_weight.now * gap.mean()
        return loss, {"cosine": cosine}


class ProxylessKD(Options):
    """L = margin softmax of the student's embedding against the teacher's rows."""

    weight: Weight = option(
        1.0, "The factor of the term. With 0 the trainer keeps its own classifier.", least=0
    )
    head: Literal["host", "own"] = option(
        "host",
        "host: the trainer's own margin head, such as arcface_torch's, takes over the teacher's "
        "class rows, frozen, and keeps its own margin; own: kdhooks computes a second loss with "
        "the options below, next to the trainer's. A trainer without such a head gets own.",
    )
    margin_type: Literal["arcface", "cosface", "combined"] = option(
        "arcface", "arcface: cos(θ + m); cosface: cos θ - m; combined: cos(θ + m) - m2."
    )
    m: Scheduled | None = option(
        None,
        "The margin. The default is 0.5, or 0.35 for cosface.",
        least=0,
        most=MOST,
        unit="rad",
    )
    m2: Scheduled = option(0.0, "The second margin, of `combined`.", least=0, most=2)
    scale: float = option(64.0, "σ, the factor of the cosines.", above=0)
    monotone: bool = option(
        True, "Use a straight line for the angles at which cos(θ + m) would rise again."
    )
    straight_through_margin: bool = option(
        False, "Use the gradient of the plain cosine, as arcface_torch's head does."
    )
    projector: bool = option(
        False,
        "Learn a Linear and a BatchNorm1d that map to the teacher's width. They belong to the "
        "student.",
    )
    extra_fcd_weight: Scheduled = option(
        0.0,
        "The factor of a second term, mean(1 - cos) of the student's and the teacher's embeddings.",
        least=0,
    )

    def check(self) -> None:
        if self.m2 and self.margin_type != "combined":
            raise self.refused(
                "m2", f"belongs to margin_type 'combined'; found '{self.margin_type}'"
            )

    @hookimpl
    def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
        d, e = student.embedding_dim, teacher.embedding_dim
        if not self.projector:
            more = ", or set projector = true and head = 'own'"
            need_teachers_width("proxylesskd", student, teacher, more=more)
        m = self.m
        if m is None:
            m = 0.35 if self.margin_type == "cosface" else 0.5
        loss = MarginSoftmax(
            *((0.0, m) if self.margin_type == "cosface" else (m, self.m2)),
            self.scale,
            monotone=self.monotone,
            straight_through=self.straight_through_margin,
            fcd_weight=self.extra_fcd_weight,
            projector=nn.Sequential(nn.Linear(d, e), nn.BatchNorm1d(e)) if self.projector else None,
        )
        needs_teacher = bool(self.extra_fcd_weight)
        if self.head == "own":
            return ClassifierShare("proxylesskd", loss, self.weight, needs_teacher=needs_teacher)
        own = [name for name in self.given() if name not in ("weight", "head")]
        conflict = f"its options {', '.join(own)} ask for kdhooks' own (head = 'own')"
        return InheritedClassifier(
            "proxylesskd",
            loss,
            self.weight,
            needs_teacher=needs_teacher,
            host_conflict=conflict if own else "",
        )
