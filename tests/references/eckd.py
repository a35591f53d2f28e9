"""EC-KD from its equations: one pair of filters, or one sample, at a time."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.references.fcd import unit

Matrix = npt.NDArray[np.float64]


def overlap(left: Sequence[float], right: Sequence[float]) -> float:
    """χ_r = ‖ f_i ⊙ f_j ‖_1."""
    return sum(abs(a * b) for a, b in zip(left, right, strict=True))


def exclusivity(
    filters: Matrix, *, normalize_rows: bool = False, mean_overlap: bool = True
) -> float:
    """(n d) -> Σ over ordered pairs i ≠ j of χ_r, by default divided by n - 1."""
    rows = [unit(row) if normalize_rows else [float(value) for value in row] for row in filters]
    total = 0.0
    for i, left in enumerate(rows):
        for j, right in enumerate(rows):
            if i != j:
                total += overlap(left, right)
    return total / (len(rows) - 1) if mean_overlap else total


def exclusivity_gradient(filters: Matrix) -> Matrix:
    """(n d): ∂/∂f_i(k) = 2·sign(f_i(k))·Σ_{j≠i} |f_j(k)|, of the undivided sum."""
    out = np.zeros_like(filters)
    for i in range(len(filters)):
        for k in range(filters.shape[1]):
            others = sum(abs(float(filters[j, k])) for j in range(len(filters)) if j != i)
            out[i, k] = 2 * np.sign(filters[i, k]) * others
    return out


def hardness(gap: float, form: str, gamma: float) -> float:
    """ω of a sample at this distance."""
    return {"none": 1.0, "linear": 1 + gamma * gap, "exponential": math.exp(gamma * gap)}[form]


def gaps(student: Matrix, teacher: Matrix, unit_length: bool) -> list[float]:
    """d_i = ‖ H(x_i) - t_i ‖."""
    found = []
    for z_s, z_t in zip(student, teacher, strict=True):
        s, t = (unit(z_s), unit(z_t)) if unit_length else (list(z_s), list(z_t))
        found.append(math.sqrt(sum((a - b) ** 2 for a, b in zip(s, t, strict=True))))
    return found


def weights(
    distances: Sequence[float], form: str = "exponential", gamma: float = 1.0, mean_one: bool = True
) -> list[float]:
    """ω_i, by default divided by their mean."""
    raw = [hardness(gap, form, gamma) for gap in distances]
    return [one * len(raw) / sum(raw) for one in raw] if mean_one else raw


def consistency(
    student: Matrix, teacher: Matrix, weights: Sequence[float], unit_length: bool = True
) -> float:
    """(1/b) Σ ω_i d_i²; the weights are an argument because no gradient passes through them."""
    distances = gaps(student, teacher, unit_length)
    terms = [w * gap**2 for w, gap in zip(weights, distances, strict=True)]
    return sum(terms) / len(terms)
