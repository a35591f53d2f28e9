"""ProxylessKD from its equations: one sample and one class at a time."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.references.fcd import dot, unit

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Margin:
    """ψ(θ) = cos(θ + m) - m2, continued by a straight line beyond θ = π - m if `monotone`."""

    m: float = 0.5
    m2: float = 0.0
    monotone: bool = True

    def psi(self, cosine: float) -> float:
        if self.monotone and cosine <= math.cos(math.pi - self.m):
            return cosine - self.m * math.sin(math.pi - self.m) - self.m2
        return math.cos(math.acos(cosine) + self.m) - self.m2

    def slope(self, cosine: float) -> float:
        """dψ/dcosθ = sin(θ + m) / sin θ."""
        if self.monotone and cosine <= math.cos(math.pi - self.m):
            return 1.0
        angle = math.acos(cosine)
        return math.sin(angle + self.m) / math.sin(angle)


def margin_softmax(
    student: Matrix, labels: Labels, rows: Matrix, margin: Margin, scale: float
) -> float:
    """(b d), (b), (c d) -> mean over the labelled samples of -log p_y."""
    total, count = 0.0, 0
    for z, label in zip(student, labels, strict=True):
        if label < 0:
            continue
        logits = _logits(z, int(label), rows, margin, scale)
        total += _log_sum_exp(logits) - logits[int(label)]
        count += 1
    return total / count if count else 0.0


def margin_softmax_gradient(
    student: Matrix,
    labels: Labels,
    rows: Matrix,
    margin: Margin,
    scale: float,
    straight_through: bool,
) -> Matrix:
    """(b d): dL/dcos_c = σ(p_c - [c = y])·(ψ' at y), dcos_c/dz = (w_c - cos_c·s)/‖z‖."""
    out = np.zeros_like(student)
    count = sum(1 for label in labels if label >= 0)
    for i, (z, label) in enumerate(zip(student, labels, strict=True)):
        if label < 0:
            continue
        logits = _logits(z, int(label), rows, margin, scale)
        all_ = _log_sum_exp(logits)
        s, length = unit(z), math.sqrt(sum(float(v) ** 2 for v in z))
        for c, row in enumerate(rows):
            w = unit(row)
            cosine = dot(s, w)
            factor = scale * (math.exp(logits[c] - all_) - (1.0 if c == label else 0.0)) / count
            if c == label and not straight_through:
                factor *= margin.slope(cosine)
            for j in range(len(z)):
                out[i, j] += factor * (w[j] - cosine * s[j]) / length
    return out


def batch_norm(x: Matrix, gain: Matrix, bias: Matrix, eps: float = 1e-5) -> Matrix:
    """(b e) -> (b e), as in training: with the batch's own mean and biased variance."""
    out = np.zeros_like(x)
    for j in range(x.shape[1]):
        column = [float(value) for value in x[:, j]]
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        for i, value in enumerate(column):
            out[i, j] = (value - mean) / math.sqrt(variance + eps) * gain[j] + bias[j]
    return out


def _logits(z: Matrix, label: int, rows: Matrix, margin: Margin, scale: float) -> list[float]:
    s = unit(z)
    cosines = [dot(s, unit(row)) for row in rows]
    return [scale * (margin.psi(x) if c == label else x) for c, x in enumerate(cosines)]


def _log_sum_exp(logits: list[float]) -> float:
    top = max(logits)
    return top + math.log(sum(math.exp(x - top) for x in logits))
