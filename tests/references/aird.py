"""Instance and relation distillation from its equations: one pair of faces at a time."""

import math

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit

Matrix = npt.NDArray[np.float64]


def shares(face: list[float], faces: list[list[float]], temperature: float) -> list[float]:
    """The softmax of one face's cosines to all faces."""
    powers = [math.exp(dot(face, other) / temperature) for other in faces]
    return [power / sum(powers) for power in powers]


def instance(student: Matrix, teacher: Matrix) -> float:
    gaps = [1 - dot(unit(s), unit(t)) for s, t in zip(student, teacher, strict=True)]
    return sum(gaps) / len(gaps)


def relation(student: Matrix, teacher: Matrix, temperature: float) -> float:
    """(1/b) Σ_i KL(teacher's shares ‖ student's), both over the teacher's faces."""
    faces, total = [unit(t) for t in teacher], 0.0
    for s, t in zip(student, faces, strict=True):
        ours, theirs = (shares(face, faces, temperature) for face in (unit(s), t))
        total += sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True))
    return total / len(faces)


def instances_and_relations(
    student: Matrix, teacher: Matrix, relation_weight: float = 0.1, temperature: float = 0.1
) -> float:
    """(b d), (b d)."""
    related = relation(student, teacher, temperature)
    return instance(student, teacher) + relation_weight * related
