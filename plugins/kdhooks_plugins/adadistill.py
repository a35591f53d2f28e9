"""AdaDistill, Boutros et al., ECCV 2024, arXiv:2407.01332.

From the paper and what its code computes: a margin softmax of the student's embedding against class
centres that follow the teacher's embeddings of the batch, fast at first and ever more slowly.
Differs from the code: the samples of a class in one batch are averaged, centres keep unit length,
all ranks hold the same centres, and the margin goes on along a line past θ = π - m.
"""

from dataclasses import replace
from math import pi
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import (
    ClassifierShare,
    ClassShard,
    Model,
    Options,
    Scheduled,
    Varying,
    Weight,
    hookimpl,
    option,
)
from kdhooks.classes.shards import gather, world
from kdhooks_plugins._batches import class_sums
from kdhooks_plugins._margin import margin_softmax
from kdhooks_plugins._widths import need_teachers_width

_LEAST = 1e-6  # of alpha


class AdaptiveCentres(nn.Module):
    """w_y <- α w_y + (1 - α) t, then cross-entropy of a margin softmax against w / ‖w‖."""

    centres: Tensor

    def __init__(
        self, m: Scheduled = 0.45, m2: Scheduled = 0.0, scale: float = 64.0, weighted: bool = True
    ) -> None:
        super().__init__()
        self.m, self.m2 = Varying(m), Varying(m2)
        self.scale, self.weighted = scale, weighted
        self.register_buffer("centres", torch.empty(0))  # (c e) from `prepare` on
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]

    def buffers_by_rank(self) -> set[str]:
        """Each rank holds its own classes, or moves all of them by the batches of all ranks."""
        return {"centres"}

    def prepare(self, classifier: ClassShard) -> None:
        """The centres start at the teacher's rows."""
        self.centres = F.normalize(classifier.weight.detach().clone())

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor, classifier: ClassShard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier -> ()."""
        if not len(self.centres):
            self.prepare(classifier)
        rows = replace(classifier, weight=self.centres)
        alpha = self._follow(student, teacher, labels, rows) if self.training else None
        m, m2 = student.new_full((), self.m.now), self.m2.now
        loss, cosine = margin_softmax(student, labels, rows, m=m, m2=m2, scale=self.scale)
        return loss, {"cosine": cosine, **({} if alpha is None else {"alpha": alpha})}

    @torch.no_grad()
    def _follow(self, student: Tensor, teacher: Tensor, labels: Tensor, rows: ClassShard) -> Tensor:
        """Move the centres of the batch's classes, on all ranks alike; the mean of α."""
        if rows.group is None:
            student, teacher, labels = (gather(x, world()) for x in (student, teacher, labels))
        s, t = F.normalize(student), F.normalize(teacher)
        own, index, mine = rows.own_rows(labels)
        alpha = (s * t).sum(dim=1)
        if self.weighted:  # by how well the teacher itself fits the centre
            alpha = alpha * rows.own(teacher, labels).clamp(_LEAST, 1.0)
        alpha = alpha.clamp(_LEAST, 1.0)
        moved = alpha[:, None] * own + (1 - alpha)[:, None] * t
        moved = F.normalize(class_sums(moved, labels))
        # What another rank holds writes the same as a sample whose class is here, if there is one.
        source = torch.where(mine, torch.arange(len(mine), device=mine.device), mine.int().argmax())
        self.centres[index[source]] = torch.where(mine.any(), moved, own)[source]
        return alpha.mean()


def _make_room(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """A fresh loss has no centres yet, and takes those of a checkpoint, however many."""
    saved = state.get(f"{prefix}centres")
    if saved is not None and not len(module.get_buffer("centres")):
        module.centres = saved.new_empty(saved.shape, device=module.get_buffer("centres").device)


class AdaDistill(Options):
    """L = cross-entropy of cos(θ + m) - m2 against the centres, at scale σ."""

    weight: Weight = option(1.0, "The factor of the term.", least=0)
    m: Scheduled | None = option(
        None, "The margin. The default is 0.45, and 0.35 for cosface.", least=0, most=pi, unit="rad"
    )
    margin_type: Literal["arcface", "cosface"] = option(
        "arcface", "arcface: cos(θ + m); cosface: cos θ - m."
    )
    scale: float = option(64.0, "σ, the factor of the cosines.", above=0)
    weighted: bool = option(
        True,
        "Weigh α by how well the teacher fits the centre, α' = cos(s, t) · cos(w_y, t); false: "
        "α = cos(s, t).",
    )

    @hookimpl
    def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
        need_teachers_width("adadistill", student, teacher, theirs="the teacher's")
        arcface = self.margin_type == "arcface"
        m: Scheduled = (0.45 if arcface else 0.35) if self.m is None else self.m
        m, m2 = (m, 0.0) if arcface else (0.0, m)
        loss = AdaptiveCentres(m, m2, scale=self.scale, weighted=self.weighted)
        return ClassifierShare("adadistill", loss, self.weight)
