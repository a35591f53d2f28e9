"""Logit distillation from its equation: one sample and one class at a time."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def logits(x: Matrix, label: int, rows: Matrix, scale: float, margin: float) -> list[float]:
    """scale·cos, with the margin subtracted from the own class's cosine (CosFace)."""
    return [
        scale * (dot(unit(x), unit(row)) - (margin if c == label else 0.0))
        for c, row in enumerate(rows)
    ]


def softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def log_softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - total for score in scores]


def z_scores(scores: Sequence[float]) -> list[float]:
    """Subtract the mean over all classes and divide by the population standard deviation."""
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / len(scores)
    return [(score - mean) / math.sqrt(variance) for score in scores]


def distillation(
    student: Matrix,
    teacher: Matrix,
    labels: Labels,
    student_rows: Matrix,
    teacher_rows: Matrix,
    *,
    temperature: float = 4.0,
    scale: float = 64.0,
    margin: float = 0.0,
    standardize: bool = False,
) -> float:
    """(b d), (b e), (b), (c d), (c e) -> T²·mean over the batch of KL(p_t ‖ p_s)."""
    total = 0.0
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        ours = logits(z_s, int(label), student_rows, scale, margin)
        theirs = logits(z_t, int(label), teacher_rows, scale, margin)
        if standardize:
            ours, theirs = z_scores(ours), z_scores(theirs)
        log_s = log_softmax([score / temperature for score in ours])
        log_t = log_softmax([score / temperature for score in theirs])
        for a, b in zip(log_s, log_t, strict=True):
            total += math.exp(b) * (b - a)
    return (scale if standardize else 1.0) * temperature**2 * total / len(student)


def entropy(teacher: Matrix, labels: Labels, rows: Matrix, temperature: float = 4.0) -> float:
    """The mean of the teacher's -Σ p log p, at scale 64 without a margin."""
    total = 0.0
    for z, label in zip(teacher, labels, strict=True):
        scores = [score / temperature for score in logits(z, int(label), rows, 64.0, 0.0)]
        total -= sum(p * math.log(p) for p in softmax(scores) if p > 0)
    return total / len(teacher)
