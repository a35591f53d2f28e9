"""Attention transfer from its equations: one sample, stage and pixel at a time."""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def attention_transfer(
    student: list[Array], teacher: list[Array], p: float, distance: str
) -> list[float]:
    """[(b k h w)], [(b l h' w')] -> the term of each stage."""
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        height = min(ours.shape[2], theirs.shape[2])
        width = min(ours.shape[3], theirs.shape[3])
        total = 0.0
        for x, y in zip(ours, theirs, strict=True):
            s = unit(values(pooled(energy(x, p), height, width)))
            t = unit(values(pooled(energy(y, p), height, width)))
            if distance == "cosine":
                total += 1 - sum(a * b for a, b in zip(s, t, strict=True))
            else:
                total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
        terms.append(total / len(ours))
    return terms


def energy(x: Array, p: float) -> Array:
    """(k h w) -> (h w): mean_c |F_c|^p."""
    channels, height, width = x.shape
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            out[i, j] = sum(abs(float(x[c, i, j])) ** p for c in range(channels)) / channels
    return out


def pooled(x: Array, height: int, width: int) -> Array:
    """(h w) -> (height width): means over [floor(a·h / height), ceil((a + 1)·h / height))."""
    out = np.zeros((height, width))
    for a in range(height):
        for b in range(width):
            cells = [
                float(x[i, j])
                for i in window(a, x.shape[0], height)
                for j in window(b, x.shape[1], width)
            ]
            out[a, b] = sum(cells) / len(cells)
    return out


def window(place: int, inside: int, outside: int) -> range:
    return range(math.floor(place * inside / outside), math.ceil((place + 1) * inside / outside))


def values(x: Array) -> list[float]:
    """(…) -> all values, row by row."""
    return [float(value) for value in x.reshape(-1)]


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


def grid(tokens: Array) -> Array:
    """(b n k) -> (b k h w): token i·w + j lies at row i, column j."""
    b, n, k = tokens.shape
    side = math.isqrt(n)
    out = np.zeros((b, k, side, side))
    for token in range(n):
        for c in range(k):
            out[:, c, token // side, token % side] = tokens[:, token, c]
    return out
