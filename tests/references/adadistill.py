"""AdaDistill from its equations (§5.11): one sample at a time."""

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit
from tests.references.proxylesskd import Margin, margin_softmax

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def alphas(
    student: Matrix, teacher: Matrix, labels: Labels, centres: Matrix, weighted: bool = True
) -> list[float]:
    out = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        alpha = dot(unit(s), unit(t))
        if weighted:
            fit = dot(list(centres[y]), unit(t)) if y >= 0 else 0.0
            alpha *= min(max(fit, 1e-6), 1.0)
        out.append(min(max(alpha, 1e-6), 1.0))
    return out


def followed(
    student: Matrix, teacher: Matrix, labels: Labels, centres: Matrix, weighted: bool = True
) -> Matrix:
    """(c e), unit rows -> the same, moved; samples of one class are averaged."""
    out = centres.copy()
    alpha = alphas(student, teacher, labels, centres, weighted)
    for label in {int(y) for y in labels if y >= 0}:
        total = np.zeros(centres.shape[1])
        for a, t, y in zip(alpha, teacher, labels, strict=True):
            if y == label:
                total += a * centres[label] + (1 - a) * np.array(unit(t))
        out[label] = unit(total)
    return out


def loss(
    student: Matrix, labels: Labels, centres: Matrix, m: float, m2: float, scale: float
) -> float:
    return margin_softmax(student, labels, centres, Margin(m, m2), scale)
