"""Grouped KD from its equations: one sample at a time, whole softmaxes, sorted classes."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.references.kd import logits, softmax, z_scores

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def group(scores: Sequence[float], label: int, tau: float, largest: int) -> set[int]:
    """The sample's own class, then the most likely others, until their probabilities reach tau."""
    p = softmax(scores)
    others = sorted((c for c in range(len(p)) if c != label), key=lambda c: -p[c])
    order = ([label] if label >= 0 else []) + others
    chosen = set[int]()
    for c in order[:largest]:
        chosen.add(c)
        if tau < 1 and sum(p[c] for c in chosen) >= tau:
            break
    return chosen


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def parts(
    student: Matrix,
    teacher: Matrix,
    labels: Labels,
    student_rows: Matrix,
    teacher_rows: Matrix,
    *,
    tau: float = 0.93,
    largest: int = 10_000,
    temperature: float = 4.0,
    scale: float = 64.0,
    margin: float = 0.0,
    standardize: bool = False,
) -> tuple[float, float, float]:
    """(b d), (b e), (b), (c d), (c e) -> primary and binary KL, mean size of a group."""
    primary = binary = size = 0.0
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        ours = logits(z_s, int(label), student_rows, scale, margin)
        theirs = logits(z_t, int(label), teacher_rows, scale, margin)
        chosen = sorted(group(ours, int(label), tau, largest))
        if standardize:
            ours, theirs = z_scores(ours), z_scores(theirs)
        p_s = softmax([score / temperature for score in ours])
        p_t = softmax([score / temperature for score in theirs])
        in_s, in_t = sum(p_s[c] for c in chosen), sum(p_t[c] for c in chosen)
        primary += divergence([p_t[c] / in_t for c in chosen], [p_s[c] / in_s for c in chosen])
        if len(chosen) < len(p_s):
            rest = [c for c in range(len(p_s)) if c not in chosen]
            binary += divergence(
                [in_t, sum(p_t[c] for c in rest)], [in_s, sum(p_s[c] for c in rest)]
            )
        size += len(chosen)
    b = len(student)
    return primary / b, binary / b, size / b
