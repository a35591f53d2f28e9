"""Relational distillation from its equations: one pair and one triplet at a time."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit

Matrix = npt.NDArray[np.float64]


def huber(x: float, y: float) -> float:
    """l_δ with δ = 1 (eq. 6)."""
    gap = abs(x - y)
    return gap * gap / 2 if gap < 1 else gap - 0.5


def euclidean(x: Sequence[float] | Matrix, y: Sequence[float] | Matrix) -> float:
    return math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)))


def relative_distances(points: Matrix) -> list[list[float]]:
    """ψ_D (eq. 5): each distance divided by μ, the mean of the nonzero ones."""
    table = [[euclidean(x, y) for y in points] for x in points]
    positive = [value for row in table for value in row if value > 0]
    mean = sum(positive) / len(positive) if positive else 1.0
    return [[value / mean for value in row] for row in table]


def angle(x: Matrix, anchor: Matrix, y: Matrix) -> float:
    """ψ_A (eq. 8): the cosine at the anchor; 0 if a side has length 0."""
    left, right = x - anchor, y - anchor
    if not left.any() or not right.any():
        return 0.0
    return dot(unit(left), unit(right))


def distance_loss(student: Matrix, teacher: Matrix) -> float:
    """Mean over all b² pairs."""
    ours, theirs = relative_distances(student), relative_distances(teacher)
    b = len(student)
    return sum(huber(ours[i][j], theirs[i][j]) for i in range(b) for j in range(b)) / b**2


def angle_loss(student: Matrix, teacher: Matrix) -> float:
    """Mean over all b³ triplets."""
    b, total = len(student), 0.0
    for j in range(b):
        for i in range(b):
            for k in range(b):
                ours = angle(student[i], student[j], student[k])
                theirs = angle(teacher[i], teacher[j], teacher[k])
                total += huber(ours, theirs)
    return total / b**3


def relations(
    student: Matrix,
    teacher: Matrix,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    unit_length: bool = False,
) -> float:
    if unit_length:
        student = np.array([unit(row) for row in student])
        teacher = np.array([unit(row) for row in teacher])
    by_distance = distance_loss(student, teacher) if distance_weight else 0.0
    by_angle = angle_loss(student, teacher) if angle_weight else 0.0
    return distance_weight * by_distance + angle_weight * by_angle
