"""CoupleFace from its equations: one sample and one neighbour at a time."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, embedding_distance, unit

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def neighbours(prototypes: Matrix, k: int, max_sim: float | None = None) -> list[list[int]]:
    """H_c: the k classes nearest to c, nearest first; classes above max_sim are skipped."""
    index = []
    for c, row in enumerate(prototypes):
        near: list[tuple[float, int]] = []
        for other, prototype in enumerate(prototypes):
            similarity = dot(unit(row), unit(prototype))
            if other != c and (max_sim is None or similarity <= max_sim):
                near.append((similarity, other))
        near.sort(key=lambda pair: -pair[0])
        found = [other for _, other in near[:k]]
        index.append(found + [-1] * (k - len(found)))
    return index


@dataclass
class CoupleFace:
    """L = L_fcd + α·L_rad, and the state that the bank form keeps between steps."""

    prototypes: Matrix
    index: list[list[int]]
    alpha: float = 1.0
    q: float = 0.03
    two_sided: bool = False
    momentum: float | None = None  # None: static prototypes
    student_bank: dict[int, list[float]] = field(default_factory=dict)
    teacher_bank: dict[int, list[float]] = field(default_factory=dict)

    def loss(self, student: Matrix, teacher: Matrix, labels: Labels) -> float:
        rad, _ = self.rad(student, teacher, labels)
        return embedding_distance(student, teacher, "l2") + self.alpha * rad

    def rad(self, student: Matrix, teacher: Matrix, labels: Labels) -> tuple[float, float]:
        """Mean over all (i, m) that exist of max(R_s - R_t + q, 0), and the active share."""
        total, active, count = 0.0, 0, 0
        for z_s, z_t, label in zip(student, teacher, labels, strict=True):
            if label < 0:
                continue
            s, t = unit(z_s), unit(z_t)
            for m in self.index[int(label)]:
                if m < 0 or (self.momentum is not None and m not in self.student_bank):
                    continue
                if self.momentum is None:
                    e = r = unit(self.prototypes[m])
                else:
                    e, r = self.student_bank[m], self.teacher_bank[m]
                excess = dot(s, e) - dot(t, r)
                term = abs(excess) if self.two_sided else max(excess + self.q, 0.0)
                total += term
                active += term > 0
                count += 1
        return (total / count, active / count) if count else (0.0, 0.0)

    def advance(self, student: Matrix, teacher: Matrix, labels: Labels) -> None:
        """After the loss: M[y] <- norm(μ·M[y] + (1 - μ)·s), s the mean direction of y."""
        if self.momentum is None:
            return
        for bank, side in ((self.student_bank, student), (self.teacher_bank, teacher)):
            for label in sorted({int(y) for y in labels if y >= 0}):
                mine = [unit(z) for z, y in zip(side, labels, strict=True) if y == label]
                new = unit([sum(column) for column in zip(*mine, strict=True)])
                old = bank.get(label, new)
                mixed = [
                    self.momentum * a + (1 - self.momentum) * b
                    for a, b in zip(old, new, strict=True)
                ]
                bank[label] = unit(mixed)
