"""Evaluation-oriented KD (EKD), Huang et al., CVPR 2022.

A face recogniser is judged by how many pairs pass a threshold at given false accept rates. The
thresholds at these rates are therefore estimated for each side, and a pair should pass as many of
the student's thresholds as it passes of the teacher's.
Follows the code that the authors published in TFace: thresholds, soft ranks, hard negatives and
the two factors.
Differs from the code: the running thresholds are divided by the weight that they have accumulated,
because they would otherwise be near 0 in the first steps (bias_correction = false is the code's
form); the code fails on a batch without positive or negative pairs, which contributes nothing here;
a sample without a label belongs to no pair; and the default weight is 4 and not 1.
The paper's sampler, which draws several images of each person for half of the batch, is left to the
trainer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, Options, Scheduled, Varying, Weight, hookimpl, option
from kdhooks.classes.ranks import gather, world

_NO_PAIR = -2.0  # below every cosine


class SimilarityRanks(nn.Module):
    """The mean square difference of the two sides' soft ranks among their own thresholds."""

    one_in: Tensor
    student_thresholds: Tensor
    teacher_thresholds: Tensor
    gathered: Tensor

    def __init__(
        self,
        thresholds: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000, 1_000_000),
        *,
        temperature: Scheduled = 0.01,
        momentum: float = 0.99,
        bias_correction: bool = True,
        hard_negatives: int = 2000,
        positive_weight: Scheduled = 0.02,
        negative_weight: Scheduled = 0.01,
        global_batch: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = Varying(temperature)
        self.positive_weight = Varying(positive_weight)
        self.negative_weight = Varying(negative_weight)
        self.momentum, self.bias_correction = momentum, bias_correction
        self.hard_negatives, self.global_batch = hard_negatives, global_batch
        self.register_buffer("one_in", torch.tensor(thresholds), persistent=False)
        self.register_buffer("student_thresholds", torch.zeros(len(thresholds)))
        self.register_buffer("teacher_thresholds", torch.zeros(len(thresholds)))
        self.register_buffer("gathered", torch.zeros(()))  # 1 - momentum^steps

    def buffers_by_rank(self) -> set[str]:
        """With a global batch, all ranks compute the same values; otherwise they are averaged."""
        moved = {"student_thresholds", "teacher_thresholds", "gathered"}
        return moved if self.global_batch else set()

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b) -> ()."""
        teacher = teacher.detach()
        if self.global_batch:
            student, teacher, labels = (gather(x, world()) for x in (student, teacher, labels))
        i, j = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
        s, t = _similarities(student)[i, j], _similarities(teacher)[i, j]
        known = (labels[i] >= 0) & (labels[j] >= 0)
        same = labels[i] == labels[j]
        positive, negative = known & same, known & ~same

        hardest, order = s.masked_fill(~negative, _NO_PAIR).sort(descending=True)
        if self.training and len(s):
            theirs = t.masked_fill(~negative, _NO_PAIR).sort(descending=True).values
            self._follow(hardest.detach(), theirs, negative.sum())
        order = order[: self.hard_negatives]
        gap_of_positives = _mean(self._rank_gap(s, t), positive)
        gap_of_negatives = _mean(self._rank_gap(s[order], t[order]), negative[order])
        loss = self.positive_weight.now * gap_of_positives
        loss = loss + self.negative_weight.now * gap_of_negatives
        notes = {"positives": gap_of_positives, "negatives": gap_of_negatives}
        return loss, {**notes, "positive_pairs": positive.sum()}

    @torch.no_grad()
    def _follow(self, student: Tensor, teacher: Tensor, negatives: Tensor) -> None:
        """(n), (n) in falling order: move the thresholds towards the values at their ranks."""
        rank = negatives // self.one_in  # 0, the hardest pair, if there are fewer than one_in
        running = self.student_thresholds, self.teacher_thresholds, self.gathered
        found = student[rank], teacher[rank], torch.ones_like(self.gathered)
        for kept, new in zip(running, found, strict=True):
            kept.lerp_(torch.where(negatives > 0, new.to(kept), kept), 1 - self.momentum)

    def _rank_gap(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(n), (n) -> (n): 0 until the first thresholds are known."""
        ours, theirs = self.student_thresholds, self.teacher_thresholds
        if self.bias_correction:
            weight = self.gathered.clamp(min=torch.finfo(self.gathered.dtype).tiny)
            ours, theirs = ours / weight, theirs / weight
        gap = self._ranks(student, ours) - self._ranks(teacher, theirs)
        return gap.square() * (self.gathered > 0)

    def _ranks(self, similarity: Tensor, thresholds: Tensor) -> Tensor:
        """(n), (k) -> (n): the soft number of thresholds that each similarity passes."""
        above = (similarity[:, None] - thresholds.to(similarity)) / self.temperature.now
        return above.sigmoid().sum(dim=1)


def _similarities(x: Tensor) -> Tensor:
    """(b d) -> (b b)."""
    x = F.normalize(x)
    return x @ x.T


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """(n), (n) -> (): 0 if nothing is counted."""
    return (values * counted).sum() / counted.sum().clamp(min=1)


class EKD(Options):
    """L = positive_weight · mean_pos (r_s - r_t)² + negative_weight · mean_neg (r_s - r_t)²."""

    weight: Weight = option(4.0, "The factor of both terms together.", least=0)
    thresholds: tuple[int, ...] = option(
        (10, 100, 1_000, 10_000, 100_000, 1_000_000),
        "The thresholds, each specified as a number of negative pairs of which one passes: 10 is a "
        "false accept rate of 0.1.",
        least=2,
    )
    temperature: Scheduled = option(
        0.01, "The width of a threshold, in units of the cosine.", above=0
    )
    momentum: float = option(
        0.99, "The share of the running thresholds that each step keeps.", least=0, below=1
    )
    bias_correction: bool = option(
        True,
        "Divide the running thresholds, which start at 0, by the weight that they have "
        "accumulated. The authors' code does not.",
    )
    hard_negatives: int = option(
        2000, "The number of negative pairs to use, those most similar for the student.", least=1
    )
    positive_weight: Scheduled = option(0.02, "The factor of the term of positive pairs.", least=0)
    negative_weight: Scheduled = option(0.01, "The factor of the term of negative pairs.", least=0)
    global_batch: bool = option(
        True,
        "Compare pairs across the batches of all ranks, and not only within each rank's batch.",
    )

    def check(self) -> None:
        if not self.thresholds:
            raise self.refused("thresholds", "must name at least one threshold; found none")
        if self.positive_weight == self.negative_weight == 0:
            raise self.refused(
                "positive_weight", "or negative_weight must be above 0; found 0 twice"
            )

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        loss = SimilarityRanks(
            self.thresholds,
            temperature=self.temperature,
            momentum=self.momentum,
            bias_correction=self.bias_correction,
            hard_negatives=self.hard_negatives,
            positive_weight=self.positive_weight,
            negative_weight=self.negative_weight,
            global_batch=self.global_batch,
        )
        return EmbeddingTap("ekd", loss, self.weight)
