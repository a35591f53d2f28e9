"""ProxylessKD, Shi et al., 2020, arXiv:2011.00265.

The teacher's classifier becomes the student's, frozen, so that an ordinary margin softmax pulls
the student into the teacher's embedding space; the objective follows the paper.
Reconstruction: margins and scale (the paper's tables could not be read), the projector for
different widths, the margin's warm-up, the guard that keeps cos(θ + m) falling, and the optional
embedding term. Class means stand in for the classifier of a teacher that comes without one.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import (
    ClassifierShare,
    ClassShard,
    InheritedClassifier,
    KDHooksError,
    Model,
    hookimpl,
)
from kdhooks.declarations import Weight
from kdhooks_plugins._margin import margin_softmax
from kdhooks_plugins._warmup import WarmUp
from kdhooks_plugins._widths import need_teachers_width

MARGINS = ("arcface", "cosface", "combined")


class MarginSoftmax(nn.Module):
    """Cross-entropy of a margin softmax on frozen rows, ψ(θ) = cos(θ + m) - m2 at the own class.

    The mean over the samples that have a label: those below 0 are left out.
    """

    def __init__(
        self,
        m: float,
        m2: float,
        scale: float,
        *,
        monotone: bool = True,
        straight_through: bool = False,
        margin_warmup_steps: int = 0,
        fcd_weight: float = 0.0,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.m, self.m2, self.scale = m, m2, scale
        self.monotone = monotone
        self.straight_through = straight_through
        self.warmup = WarmUp(margin_warmup_steps)
        self.fcd_weight = fcd_weight
        self.projector = projector or nn.Identity()

    def forward(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        student = self.projector(student)
        ramp = self.warmup(student.new_ones(()))
        loss, cosine = margin_softmax(
            student,
            labels,
            classifier,
            m=self.m * ramp,
            m2=self.m2 * ramp,
            scale=self.scale,
            monotone=self.monotone,
            straight_through=self.straight_through,
        )
        if self.fcd_weight:
            assert teacher is not None
            gap = 1 - F.cosine_similarity(student, teacher.detach())
            loss = loss + self.fcd_weight * gap.mean()
        return loss, {"cosine": cosine}


class ProxylessKD:
    """L = margin softmax of the student's embedding against the teacher's rows."""

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        head: str = "host",
        margin_type: str = "arcface",
        m: float | None = None,
        m2: float = 0.0,
        scale: float = 64.0,
        monotone: bool = True,
        straight_through_margin: bool = False,
        margin_warmup_steps: int = 0,
        projector: bool = False,
        extra_fcd_weight: float = 0.0,
    ) -> None:
        """
        head: "host": a trainer's own margin head (arcface_torch's) takes the teacher's rows,
            frozen, and its own margin holds; "own", and where there is no such head: the options
            below hold, and the trainer's loss stays beside this one.
        margin_type: "arcface" cos(θ + m), "cosface" cos θ - m, "combined" cos(θ + m) - m2.
        m: by default 0.5, for cosface 0.35; angles in radians.
        monotone: go on along a line where cos(θ + m) would rise again.
        straight_through_margin: gradient of the plain cosine, as in arcface_torch's head.
        margin_warmup_steps: let the margins grow from 0 over so many steps.
        projector: Linear and BatchNorm1d to the teacher's width; they belong to the student.
        extra_fcd_weight: add this times mean(1 - cos) to the teacher's embedding.
        """
        _one_of("margin_type", margin_type, MARGINS)
        _one_of("head", head, ("host", "own"))
        if m2 and margin_type != "combined":
            raise KDHooksError(
                f"proxylesskd: m2 belongs to margin_type 'combined'; found '{margin_type}'"
            )
        own_options = {
            "margin_type": margin_type != "arcface",
            "m": m is not None,
            "scale": scale != 64.0,
            "monotone": not monotone,
            "straight_through_margin": straight_through_margin,
            "margin_warmup_steps": margin_warmup_steps > 0,
            "projector": projector,
            "extra_fcd_weight": extra_fcd_weight > 0,
        }
        self.own_options = [name for name, given in own_options.items() if given]
        m = m if m is not None else (0.35 if margin_type == "cosface" else 0.5)
        if not 0 <= m <= math.pi:
            raise KDHooksError(
                f"proxylesskd: m must be from 0 to {math.pi:.5f}, in radians; found {m}"
            )
        if scale <= 0:
            raise KDHooksError(f"proxylesskd: scale must be above 0; found {scale}")
        _not_negative("margin_warmup_steps", margin_warmup_steps)
        _not_negative("extra_fcd_weight", extra_fcd_weight)
        self.weight, self.head, self.projector = weight, head, projector
        self.angular, self.additive = (0.0, m) if margin_type == "cosface" else (m, m2)
        self.scale = scale
        self.monotone = monotone
        self.straight_through = straight_through_margin
        self.margin_warmup_steps = margin_warmup_steps
        self.fcd_weight = extra_fcd_weight

    @hookimpl
    def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
        d, e = student.embedding_dim, teacher.embedding_dim
        if not self.projector:
            more = ", or set projector = true"
            need_teachers_width("proxylesskd", student, teacher, more=more)
        loss = MarginSoftmax(
            self.angular,
            self.additive,
            self.scale,
            monotone=self.monotone,
            straight_through=self.straight_through,
            margin_warmup_steps=self.margin_warmup_steps,
            fcd_weight=self.fcd_weight,
            projector=nn.Sequential(nn.Linear(d, e), nn.BatchNorm1d(e)) if self.projector else None,
        )
        needs_teacher = self.fcd_weight > 0
        if self.head == "own":
            return ClassifierShare("proxylesskd", loss, self.weight, needs_teacher=needs_teacher)
        conflict = f"its options {', '.join(self.own_options)} ask for kdhooks' own (head = 'own')"
        return InheritedClassifier(
            "proxylesskd",
            loss,
            self.weight,
            needs_teacher=needs_teacher,
            host_conflict=conflict if self.own_options else "",
        )


def _one_of(option: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise KDHooksError(f"proxylesskd: {option} must be one of {known}; found '{found}'")


def _not_negative(option: str, found: float) -> None:
    if found < 0:
        raise KDHooksError(f"proxylesskd: {option} must be at least 0; found {found}")
