"""AdaDistill from its equations: one sample at a time."""

import math

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
    """(c e) unit rows -> (c e): the moved rows; samples of one class are averaged."""
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


def scalers(
    student: Matrix,
    teacher: Matrix,
    labels: Labels,
    centres: Matrix,
    quality: float,
    geometry: float,
    mean: float = 20.0,
    deviation: float = 100.0,
) -> list[float]:
    """Return q of each sample from the current centres and estimates; quality 0 ignores lengths."""
    out = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        q = quality * (math.sqrt(dot(s, s)) - mean) / (deviation + 1e-3)
        fit = max(dot(list(centres[y]), unit(t)), 0.0) if y >= 0 else 0.0
        q += geometry * max(fit - dot(unit(s), unit(t)), 0.0) * fit
        out.append(min(max(q, -1.0), 1.0))
    return out


def estimates(lengths: list[float], mean: float, deviation: float) -> tuple[float, float]:
    """Return the running mean and deviation of the lengths after this batch."""
    now = sum(lengths) / len(lengths)
    squares = sum((x - now) ** 2 for x in lengths) / max(len(lengths) - 1, 1)
    return 0.99 * mean + 0.01 * now, 0.99 * deviation + 0.01 * math.sqrt(squares)


def turned(cosine: float, margin_type: str, m: float, q: float) -> float:
    """ψ of one sample's cosine; a negative margin does not turn an angle below 0."""
    if margin_type == "arcface":
        return Margin(min(m * (1 + q), math.pi)).psi(cosine)
    if margin_type == "cosface":
        return cosine - m * (1 + q)
    if q < 0:
        return Margin(-m * q).psi(cosine) - m * (1 + q)
    return math.cos(max(math.acos(cosine) - m * q, 0.0)) - m * (1 + q)


def loss_of_margins(
    student: Matrix,
    labels: Labels,
    centres: Matrix,
    margin_type: str,
    m: float,
    q: list[float],
    scale: float,
) -> float:
    total, count = 0.0, 0
    for s, y, own in zip(student, labels, q, strict=True):
        if y < 0:
            continue
        cosines = [dot(unit(s), list(row)) for row in centres]
        cosines[y] = turned(cosines[y], margin_type, m, own)
        top = max(cosines)
        total += math.log(sum(math.exp(scale * (x - top)) for x in cosines))
        total += scale * (top - cosines[y])
        count += 1
    return total / max(count, 1)
