"""Correlation congruence from its equations: one pair of samples and one power at a time."""

import math

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit

Matrix = npt.NDArray[np.float64]


def correlations(x: Matrix, gamma: float, terms: int) -> list[list[float]]:
    """(b d) -> (b b): Σ_p e^(-2γ) (2γ)^p / p! cos^p, over p = 0 … terms - 1."""
    out = []
    for a in x:
        row = []
        for b in x:
            cosine, total = dot(unit(a), unit(b)), 0.0
            for p in range(terms):
                total += math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosine**p
            row.append(total)
        out.append(row)
    return out


def correlation_congruence(
    student: Matrix, teacher: Matrix, gamma: float = 0.4, terms: int = 3
) -> float:
    """(b d), (b e) -> (1/b²) Σ_ij (K_s - K_t)²."""
    ours, theirs = correlations(student, gamma, terms), correlations(teacher, gamma, terms)
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            total += (ours[i][j] - theirs[i][j]) ** 2
    return total / len(student) ** 2
