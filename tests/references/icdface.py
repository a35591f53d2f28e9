"""ICD-Face from its equations: one sample, one bank entry and one node at a time."""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, embedding_distance, unit

Matrix = npt.NDArray[np.float64]
Entry = tuple[int, list[float], list[float]]  # the step, the student's and the teacher's embedding


@dataclass
class ICDFace:
    alpha: float = 0.1
    slots: int = 5
    valid_steps: int = 200
    gamma: float = 50.0
    nodes: int = 101
    step: int = 1
    banks: dict[int, list[Entry]] = field(default_factory=dict)  # the newest entry comes last

    def loss(self, student: Matrix, teacher: Matrix, labels: list[int]) -> float:
        fcd = embedding_distance(student, teacher, "l2")
        return fcd / 2 + self.alpha * self.sdc(student, teacher, labels)

    def sdc(self, student: Matrix, teacher: Matrix, labels: list[int]) -> float:
        """KL(p ‖ q) = Σ_r p_r log(p_r / q_r), and 0 without pairs."""
        pairs = self.pairs(student, teacher, labels)
        if not pairs:
            return 0.0
        q = self.histogram([ours for ours, _ in pairs])
        p = self.histogram([theirs for _, theirs in pairs])
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    def pairs(
        self, student: Matrix, teacher: Matrix, labels: list[int]
    ) -> list[tuple[float, float]]:
        found = []
        for z_s, z_t, label in zip(student, teacher, labels, strict=True):
            for at, bank_s, bank_t in self.banks.get(label, []):
                if self.step - at <= self.valid_steps:
                    found.append((dot(unit(z_s), bank_s), dot(unit(z_t), bank_t)))
        return found

    def histogram(self, similarities: list[float]) -> list[float]:
        """The share of each node t_r = -1 + 2r / (R - 1), by the kernel exp(-γ (x - t_r)²)."""
        nodes = [-1 + 2 * r / (self.nodes - 1) for r in range(self.nodes)]
        mass = [sum(math.exp(-self.gamma * (x - t) ** 2) for x in similarities) for t in nodes]
        return [m / sum(mass) for m in mass]

    def advance(self, student: Matrix, teacher: Matrix, labels: list[int]) -> None:
        """Add the batch to the banks after the loss, and keep the latest entries of each class."""
        for z_s, z_t, label in zip(student, teacher, labels, strict=True):
            if label >= 0:
                bank = self.banks.setdefault(label, [])
                bank.append((self.step, unit(z_s), unit(z_t)))
                del bank[: -self.slots]
        self.step += 1
