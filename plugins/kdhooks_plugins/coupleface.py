"""CoupleFace, Liu et al., ECCV 2022, arXiv:2204.05502.

Feature consistency, and the mutual relations of a sample with the classes nearest to its own.
Reconstruction: only the paper's abstract could be read. From the abstract: the mining of
informative relations and the relation-aware loss. Ours: the one-sided hinge, its slack q, k, the
weights and the representation of the other class (a frozen prototype, or a bank of the latest
embeddings).
Later work of the group (ICD-Face, ICCV 2023) pairs banks of student and teacher, as
`relations = "bank"` does, and gives the labels' loss a small factor: according to one reader,
`weight` would be about 5 to 100.
"""

import logging
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import (
    ClassSplit,
    EmbeddingTap,
    KDHooksError,
    Model,
    Options,
    PerClass,
    Scheduled,
    Varying,
    Weight,
    hookimpl,
    option,
)
from kdhooks.classes.ranks import gather, mean_of_ranks, world
from kdhooks.classes.relations import relations
from kdhooks.classes.rows import Rows
from kdhooks_plugins._batches import class_sums
from kdhooks_plugins._widths import projection
from kdhooks_plugins.neighbours import mined, nearest_classes

log = logging.getLogger("kdhooks")


class MutualRelations(PerClass):
    """FCD + alpha · RAD over each sample's k mined relations."""

    prototypes: Tensor  # (c e), unit rows
    neighbours: Tensor  # (c k) int32, -1 if a class has fewer than k
    student_bank: Tensor
    teacher_bank: Tensor
    met: Tensor  # (c): whether the banks hold an embedding of the class

    def __init__(
        self,
        split: ClassSplit,
        neighbours: Tensor,
        *,
        alpha: Scheduled = 1.0,
        q: Scheduled = 0.03,
        two_sided: bool = False,
        bank_momentum: float | None = None,
        projector: nn.Module | None = None,
    ) -> None:
        """`neighbours` has one row for each of this rank's classes."""
        super().__init__(split, "coupleface")
        self.alpha, self.q, self.two_sided = Varying(alpha), Varying(q), two_sided
        self.bank_momentum = bank_momentum
        self.projector = projector or nn.Identity()
        self.keep_frozen("neighbours", neighbours)

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b) -> ()."""
        s, t = F.normalize(self.projector(student)), F.normalize(teacher.detach())
        fcd = (s - t).square().sum(dim=1).mean()
        rad, active = self._rad(s, t, labels)
        loss = fcd + self.alpha.now * rad
        if self.training and self.bank_momentum is not None:
            group = self.split.group or world()  # without a group, each rank has all classes
            s, t, labels = (gather(x, group) for x in (s, t, labels))
            self._advance(s, t, labels, self.bank_momentum)
        return loss, {"fcd": fcd, "rad": rad, "active": active}

    def _rad(self, s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean hinge of the relations' excess, and the share of active relations."""
        excess, valid = self._excess(s, t, labels)
        hinge = excess.abs() if self.two_sided else (excess + self.q.now).relu()
        counts = torch.stack([valid.sum(), ((hinge > 0) & valid).sum()])
        count, active = mean_of_ranks(counts, self.split.group or world()).to(hinge)
        count = torch.where(count > 0, count, 1)
        return (hinge * valid).sum() / count, active / count

    def _excess(self, s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(b e), (b e), (b) -> (b k), (b k): R_s - R_t, and which of these relations exist.

        Each rank computes the relations of all ranks' samples with its own classes. The sum over
        the ranks then has all relations.
        """
        split, size = self.split, len(labels)
        places, mine = split.places(split.of_all(labels))
        near = split.sum((self.neighbours[places] + 1) * mine[:, None]) - 1
        valid = split.own(near, size) >= 0
        if self.bank_momentum is None:  # then both sides are compared with the same rows
            part = relations(split.of_all(s - t), self.prototypes, near, split)
            return split.own(split.sum(part), size), valid
        ours = relations(split.of_all(s), self.student_bank, near, split, moving=True)
        theirs = relations(split.of_all(t), self.teacher_bank, near, split, moving=True)
        places, mine = split.places(near)
        met = (self.met[places] & mine).to(s)
        excess, met = split.own(split.sum(torch.stack([ours - theirs, met], dim=1)), size).unbind(1)
        return excess, valid & (met > 0)

    @torch.no_grad()
    def _advance(self, s: Tensor, t: Tensor, labels: Tensor, momentum: float) -> None:
        """Update the banks with the batches of all ranks."""
        places, mine = self.split.places(labels)
        for bank, embedding in ((self.student_bank, s), (self.teacher_bank, t)):
            _update(bank, embedding.to(bank), places, mine, momentum)
        self.met.scatter_reduce_(0, places, mine, "amax")


def _update(bank: Tensor, embedding: Tensor, places: Tensor, mine: Tensor, momentum: float) -> None:
    """(c e), (b e), (b), (b): bank[y] <- norm(momentum · bank[y] + (1 - momentum) · y's unit mean).

    A sample that is not `mine` adds nothing: it repeats the write of a sample that is.
    """
    here = torch.arange(len(mine), device=mine.device)
    places = places[torch.where(mine, here, mine.int().argmax())]
    mean = F.normalize(class_sums(embedding.masked_fill(~mine[:, None], 0), places))
    moved = F.normalize(momentum * bank[places] + (1 - momentum) * mean)
    bank[places] = torch.where(mine.any(), moved, bank[places])


class CoupleFace(Options):
    """L = mean ‖s - t‖² + alpha · mean max(s·e_m - t·r_m + q, 0), m the classes nearest to y's."""

    weight: Weight = option(
        16.0,
        "The factor of both terms together, relative to the classification loss; 1/β in the paper.",
        least=0,
    )
    alpha: Scheduled = option(1.0, "The factor of the loss of relations (RAD).", least=0)
    k: int = option(100, "The number of relations of each class.", least=1)
    q: Scheduled = option(
        0.03,
        "The slack: a relation of the student should be lower than the teacher's by this much.",
        least=-2,
        most=2,
    )
    two_sided: bool = option(False, "Use |R_s - R_t| instead of the hinge.")
    relations: Literal["static", "bank"] = option(
        "static",
        "static: e_m = r_m, the prototypes; bank: the latest embeddings of each class, the "
        "student's and the teacher's.",
    )
    bank_momentum: float = option(
        0.0,
        "With 0, the latest embedding of a class replaces the one in the bank; above 0, the bank "
        "averages over time.",
        least=0,
        below=1,
    )
    max_neighbour_sim: float | None = option(
        None,
        "Skip neighbours with a higher cosine than this, which are probably the same person with "
        "another label. About 0.7 is usual; by default no neighbour is skipped.",
        above=-1,
        most=1,
    )
    prototypes: Tensor | Path | None = option(
        None,
        "One embedding of each class (c e), or a file of them. The default is the teacher's "
        "classifier, which may hold classifier rows or class means.",
    )
    neighbours: Path | None = option(
        None,
        "The folder that `python -m kdhooks_plugins.neighbours` created from the prototypes. By "
        "default the neighbours are searched when the training starts.",
    )
    projector: bool = option(
        False,
        "Learn a linear map of the student's embedding to the teacher's width. The map is not "
        "part of the student.",
    )

    def check(self) -> None:
        if self.bank_momentum and self.relations != "bank":
            raise self.refused(
                "bank_momentum", f"belongs to relations 'bank'; found '{self.relations}'"
            )

    def described(self) -> str:
        """Also the prototypes, of which each rank reads only its own classes."""
        options = super().described()
        if self.prototypes is None:
            return options
        return f"{options}, prototypes: {Rows.open(self.prototypes).described()}"

    @hookimpl
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
        projector = projection("coupleface", student, teacher, self.projector)
        rows, bank = self._prototypes(teacher), self.relations == "bank"
        split = teacher.tables.split(rows.total, learnt=bank)
        loss = MutualRelations(
            split,
            self._neighbours(rows, split),
            alpha=self.alpha,
            q=self.q,
            two_sided=self.two_sided,
            bank_momentum=self.bank_momentum if bank else None,
            projector=projector,
        )
        own = rows.slice(split.start, split.stop)
        if bank:
            loss.recognise("neighbours", own)
            for side in ("student_bank", "teacher_bank"):
                loss.keep(side, torch.zeros(len(split), rows.dim))
            loss.keep("met", torch.zeros(len(split), dtype=torch.bool))
        else:
            loss.keep_rows("prototypes", own, teacher.tables.frozen, unit=True)
        return EmbeddingTap("coupleface", loss, self.weight)

    def _prototypes(self, teacher: Model) -> Rows:
        rows = teacher.classifier if self.prototypes is None else Rows.open(self.prototypes)
        if rows is None:
            raise KDHooksError(
                f"coupleface needs a prototype per class; found none{teacher.without_rows}; set "
                "teacher.classifier to the teacher's classifier, or to class means made with "
                "kdhooks.class_means"
            )
        if rows.dim != teacher.embedding_dim:
            raise KDHooksError(
                f"coupleface: prototypes must be as wide as the teacher's embedding; found "
                f"{rows.dim} and {teacher.embedding_dim}"
            )
        return rows

    def _neighbours(self, rows: Rows, split: ClassSplit) -> Tensor:
        """(c k) of this rank's classes."""
        others = rows.total - 1
        if others < 1:
            raise KDHooksError("coupleface needs at least two classes; found 1")
        if self.k > others:
            log.warning("coupleface: k = %d, but there are only %d other classes", self.k, others)
        k = min(self.k, others)
        own = slice(split.start, split.stop)
        if self.neighbours is None:
            found = nearest_classes(rows, k, self.max_neighbour_sim, own=own)
        else:
            found = mined(self.neighbours, rows, k, self.max_neighbour_sim, own)
        if not split.on_any_rank(bool((found.index >= 0).any())):
            raise KDHooksError(
                "coupleface: no class has a neighbour below max_neighbour_sim = "
                f"{self.max_neighbour_sim}; raise it (about 0.7)"
            )
        if self.max_neighbour_sim is not None:
            log.info(
                "coupleface: %d classes have others above max_neighbour_sim", found.passed_over
            )
        return found.index
