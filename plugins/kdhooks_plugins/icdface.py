"""ICD-Face, Yu et al., ICCV 2023: intra-class compactness distillation.

With only feature consistency (FCD), a student's embeddings of one person are less similar than the
teacher's. ICD-Face therefore also matches the distribution of the similarities of positive pairs.
Reconstruction: only the abstract could be read. From the abstract: FCD, the similarity distribution
consistency (SDC), and feature banks that provide the positive pairs. Ours, partly from short
descriptions by others: soft histograms with a Gaussian kernel, their divergence KL(teacher ‖
student), banks of 5 images of each class that are valid for 200 steps, and the default weights.
The kernel exp(-γ (x - node)²) with γ = 50 has a width of 0.1 in units of the cosine, as in the
distribution distillation of TFace (Huang et al., ECCV 2020), whose nodes are 0.001 apart. It is so
wide that nodes 0.02 apart lead to the same divergence.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
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
from kdhooks.classes.ranks import gather, world
from kdhooks_plugins._widths import projection


class SimilarityDistributions(PerClass):
    """FCD / 2 + alpha · SDC over the pairs of each sample with its class in the banks."""

    nodes: Tensor
    student_bank: Tensor
    teacher_bank: Tensor
    written_at: Tensor
    written: Tensor
    step: Tensor

    def __init__(
        self,
        split: ClassSplit,
        dim: int,
        *,
        alpha: Scheduled = 0.1,
        slots: int = 5,
        valid_steps: int = 200,
        gamma: float = 50.0,
        nodes: int = 101,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__(split, "icdface")
        self.alpha = Varying(alpha)
        self.slots, self.valid_steps, self.gamma = slots, valid_steps, gamma
        self.projector = projector or nn.Identity()
        self.register_buffer("nodes", torch.linspace(-1, 1, nodes), persistent=False)
        self.keep("student_bank", torch.zeros(len(split), slots, dim))
        self.keep("teacher_bank", torch.zeros(len(split), slots, dim))
        self.keep("written_at", torch.zeros(len(split), slots, dtype=torch.long))
        self.keep("written", torch.zeros(len(split), dtype=torch.long))
        self.register_buffer("step", torch.ones((), dtype=torch.long))  # 0: never written

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b) -> ()."""
        group = self.split.group or world()  # without a group, each rank has all classes
        s, t = gather(self.projector(student), group), gather(teacher, group)
        s, t, labels = F.normalize(s), F.normalize(t.detach()), gather(labels, group)
        fcd = (s - t).square().sum(dim=1).mean()
        sdc, pairs = self._sdc(s, t, labels)
        if self.training:
            self._fill(s, t, labels)
        return fcd / 2 + self.alpha.now * sdc, {"fcd": fcd, "sdc": sdc, "pairs": pairs}

    def _sdc(self, s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """KL(teacher ‖ student) of the similarities of positive pairs, and the number of pairs."""
        own, mine = self.split.places(labels)
        written = self.written_at[own] * mine[:, None]
        valid = (written > 0) & (self.step - written <= self.valid_steps)
        ours = einsum(s, self.student_bank[own].to(s), "b e, b k e -> b k") * mine[:, None]
        theirs = einsum(t, self.teacher_bank[own].to(t), "b e, b k e -> b k") * mine[:, None]
        # Only the rank that holds a class contributes, so the sum is that rank's part.
        ours, theirs, valid = self.split.sum(torch.stack([ours, theirs, valid.to(s)])).unbind()
        valid = valid > 0
        q = log_histogram(ours[..., None], valid[..., None], self.nodes, self.gamma)
        p = log_histogram(theirs[..., None], valid[..., None], self.nodes, self.gamma)
        return (p.exp() * (p - q)).sum(), valid.sum()

    @torch.no_grad()
    def _fill(self, s: Tensor, t: Tensor, labels: Tensor) -> None:
        """Each sample takes the oldest slot of its class."""
        own, known = self.split.places(labels)
        row, slot, sample = places(own.masked_fill(~known, -1), self.written, self.slots)
        some = known.any()
        for bank, new in (
            (self.student_bank, s.to(self.student_bank)),
            (self.teacher_bank, t.to(self.teacher_bank)),
            (self.written_at, self.step.expand(len(labels))),
        ):
            kept = bank[row, slot]
            bank[row, slot] = torch.where(some, new[sample], kept)
        self.written.index_add_(0, own, known.long())
        self.step += 1


class Places(NamedTuple):
    """The places (b) in a bank, and the sample written to each; equal places get the same one."""

    row: Tensor
    slot: Tensor
    sample: Tensor


def places(labels: Tensor, written: Tensor, slots: int) -> Places:
    """(b), (c) how many were written -> the class, its slot, and the sample for it, (b) each.

    The samples of a class in one batch take its slots in turn; the last one for a slot is kept.
    A sample without a class repeats the write of a sample with one.
    """
    ordered, order = labels.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    number = torch.searchsorted(ordered, labels, right=True) - first  # of the class in this batch
    here = torch.arange(len(labels), device=labels.device)
    position = torch.empty_like(order).scatter_(0, order, here)
    turn = position - first
    last = turn + (number - 1 - turn) // slots * slots
    known = labels >= 0
    stand_in = torch.where(known, here, known.int().argmax())
    row = labels.clamp(min=0)
    slot, sample = (written[row] + turn) % slots, order[first + last]
    return Places(row[stand_in], slot[stand_in], sample[stand_in])


def log_histogram(similarity: Tensor, counted: Tensor, nodes: Tensor, gamma: float) -> Tensor:
    """(… 1), (… 1), (r) -> (r): the logarithm of each node's share; without pairs all are equal.

    It uses logarithms because the kernel underflows to 0 in float32 at a distance of 1.4.
    """
    kernel = -gamma * (similarity - nodes.to(similarity)).square()
    kernel = kernel.masked_fill(~counted, torch.finfo(kernel.dtype).min)
    return kernel.flatten(0, -2).logsumexp(dim=0).log_softmax(dim=0)


class ICDFace(Options):
    """L = mean ‖s - t‖² / 2 + alpha · KL(similarities of the teacher's pairs ‖ the student's)."""

    weight: Weight = option(
        32.0,
        "The factor of both terms together, next to the classification loss. 10 corresponds to the "
        "paper, which gives the labels' loss a weight of 0.1.",
        least=0,
    )
    alpha: Scheduled = option(
        0.1, "The factor of the similarity distribution consistency (SDC).", least=0
    )
    slots: int = option(5, "The number of embeddings of each class in the banks.", least=1)
    valid_steps: int = option(
        200, "The number of steps for which an embedding in the banks is valid.", least=1
    )
    gamma: float = option(
        50.0,
        "γ of the histograms' kernel exp(-γ (x - node)²), where x is a cosine. 50 is a width of "
        "0.1.",
        above=0,
        most=1e6,
    )
    nodes: int = option(
        101,
        "The number of nodes of the histograms, evenly spaced from -1 to 1. More than about 3 "
        "nodes in one width of the kernel change nothing.",
        least=2,
    )
    projector: bool = option(
        False,
        "Learn a linear map of the student's embedding to the teacher's width. The map is not "
        "part of the student.",
    )

    @hookimpl
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
        projector = projection("icdface", student, teacher, self.projector)
        if teacher.classifier is None:
            raise KDHooksError(
                "icdface needs the number of classes; found no teacher.classifier"
                f"{teacher.without_rows}; set it to the teacher's classifier, or to class means "
                "made with kdhooks.class_means"
            )
        loss = SimilarityDistributions(
            teacher.tables.split(teacher.classifier.total, learnt=True),
            teacher.embedding_dim,
            alpha=self.alpha,
            slots=self.slots,
            valid_steps=self.valid_steps,
            gamma=self.gamma,
            nodes=self.nodes,
            projector=projector,
        )
        return EmbeddingTap("icdface", loss, self.weight)
