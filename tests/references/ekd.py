"""Evaluation-oriented KD from its equations: one pair of samples and one threshold at a time."""

import math
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit

Matrix = npt.NDArray[np.float64]
Pairs = list[tuple[float, float]]  # similarity to the student, and to the teacher


@dataclass
class EKD:
    one_in: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
    temperature: float = 0.01
    momentum: float = 0.99
    bias_correction: bool = True
    hard_negatives: int = 2000
    positive_weight: float = 0.02
    negative_weight: float = 0.01
    history: list[tuple[list[float], list[float]]] = field(default_factory=list)  # per batch

    def step(self, student: Matrix, teacher: Matrix, labels: list[int]) -> None:
        """Record the thresholds of a batch, the student's first, before its loss is computed."""
        negatives = pairs_of(student, teacher, labels, same=False)
        if negatives:
            ours = sorted((s for s, _ in negatives), reverse=True)
            theirs = sorted((t for _, t in negatives), reverse=True)
            ranks = [len(negatives) // a for a in self.one_in]
            self.history.append(([ours[r] for r in ranks], [theirs[r] for r in ranks]))

    def loss(self, student: Matrix, teacher: Matrix, labels: list[int]) -> float:
        positives, negatives = self.terms(student, teacher, labels)
        return self.positive_weight * positives + self.negative_weight * negatives

    def terms(self, student: Matrix, teacher: Matrix, labels: list[int]) -> tuple[float, float]:
        if not self.history:
            return 0.0, 0.0
        negatives = pairs_of(student, teacher, labels, same=False)
        hard = sorted(negatives, reverse=True)[: self.hard_negatives]
        return self.gap(pairs_of(student, teacher, labels, same=True)), self.gap(hard)

    def gap(self, pairs: Pairs) -> float:
        """The mean of (r_s - r_t)², and 0 without pairs."""
        ours, theirs = self.thresholds(0), self.thresholds(1)
        gaps = [self.rank(s, ours) - self.rank(t, theirs) for s, t in pairs]
        return sum(gap * gap for gap in gaps) / len(gaps) if gaps else 0.0

    def rank(self, similarity: float, thresholds: list[float]) -> float:
        total = 0.0
        for threshold in thresholds:
            exponent = -(similarity - threshold) / self.temperature
            total += 1 / (1 + math.exp(max(-50.0, min(50.0, exponent))))
        return total

    def thresholds(self, side: int) -> list[float]:
        """Σ (1 - m) m^age · new over all batches, divided by the sum of weights if corrected."""
        weights = [(1 - self.momentum) * self.momentum**age for age in range(len(self.history))]
        whole = sum(weights) if self.bias_correction else 1.0
        return [
            sum(w * past[side][k] for w, past in zip(weights, reversed(self.history), strict=True))
            / whole
            for k in range(len(self.one_in))
        ]


def pairs_of(student: Matrix, teacher: Matrix, labels: list[int], *, same: bool) -> Pairs:
    """All pairs of labelled samples with the same label, or with different ones."""
    return [
        (dot(unit(student[i]), unit(student[j])), dot(unit(teacher[i]), unit(teacher[j])))
        for i, j in combinations(range(len(labels)), 2)
        if labels[i] >= 0 and labels[j] >= 0 and (labels[i] == labels[j]) == same
    ]
