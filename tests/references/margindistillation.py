"""MarginDistillation from its equations: one sample at a time."""

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit
from tests.references.proxylesskd import Margin, margin_softmax

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def margins(teacher: Matrix, labels: Labels, rows: Matrix, low: float, high: float) -> list[float]:
    fits = [
        max(0.0, dot(unit(t), unit(rows[y]))) if y >= 0 else 0.0
        for t, y in zip(teacher, labels, strict=True)
    ]
    best = max(max(fits), 1e-6)
    return [low + (high - low) * fit / best for fit in fits]


def loss(
    student: Matrix,
    teacher: Matrix,
    labels: Labels,
    rows: Matrix,
    low: float,
    high: float,
    scale: float,
) -> float:
    """The mean over the labelled samples, each with its own margin."""
    own = margins(teacher, labels, rows, low, high)
    values = [
        margin_softmax(student[i : i + 1], labels[i : i + 1], rows, Margin(own[i]), scale)
        for i in range(len(labels))
        if labels[i] >= 0
    ]
    return sum(values) / len(values) if values else 0.0
