"""Feature consistency from its equations: one sample and one coordinate at a time."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def unit(vector: Sequence[float] | Matrix) -> list[float]:
    """z / ‖z‖."""
    values = [float(value) for value in vector]
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def embedding_distance(student: Matrix, teacher: Matrix, distance: str) -> float:
    """(b d), (b d) -> mean over the batch; "mse" and "raw_mse" over the coordinates too."""
    total = 0.0
    for z_s, z_t in zip(student, teacher, strict=True):
        s, t = unit(z_s), unit(z_t)
        if distance == "cosine":
            total += 1 - dot(s, t)
        elif distance == "cosine_squared":
            total += (1 - dot(s, t)) ** 2
        elif distance == "l2":
            total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        elif distance == "mse":
            total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
        elif distance == "raw_mse":
            total += sum((float(a) - float(b)) ** 2 for a, b in zip(z_s, z_t, strict=True)) / len(s)
        else:
            raise ValueError(distance)
    return total / len(student)


def linear(x: Matrix, weight: Matrix, bias: Matrix | None = None) -> Matrix:
    """(b d), (e d), (e) -> (b e)."""
    out = np.zeros((len(x), len(weight)))
    for i in range(len(x)):
        for o in range(len(weight)):
            out[i, o] = dot(list(x[i]), list(weight[o])) + (0.0 if bias is None else float(bias[o]))
    return out
