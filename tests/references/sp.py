"""Similarity preservation from its equations: one pair of samples at a time."""

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit

Matrix = npt.NDArray[np.float64]


def similarities(x: Matrix, form: str) -> list[list[float]]:
    """(b d) -> (b b). "cosine": from unit rows. "gram": from raw rows, each line scaled to
    length 1.
    """
    if form == "cosine":
        return [[dot(unit(a), unit(b)) for b in x] for a in x]
    return [unit([dot(a, b) for b in x]) for a in x]


def similarity_preservation(student: Matrix, teacher: Matrix, form: str = "cosine") -> float:
    """(b d), (b e) -> (1/b²) Σ_ij (G_s - G_t)²."""
    ours, theirs = similarities(student, form), similarities(teacher, form)
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            total += (ours[i][j] - theirs[i][j]) ** 2
    return total / len(student) ** 2
