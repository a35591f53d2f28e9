"""FitNet from its equations: one sample, pixel and channel at a time."""

import math

import numpy as np

from tests.references.at import Array, grid, pooled, unit, values

_BATCH_NORM = 1e-5  # added to a variance


def hint(
    student: Array,
    teacher: Array,
    distance: str,
    connector: str,
    weights: dict[str, Array],
    *,
    temperature: float = 1.0,
    normalise: bool = False,
    mean: Array | None = None,
) -> float:
    """(b k h w), (b l h' w') -> the distance of one pair; mean (l h w) is subtracted from the
    teacher's maps.
    """
    height, width = (min(student.shape[d], teacher.shape[d]) for d in (2, 3))
    ours = connected(resized(student, height, width), connector, weights)
    theirs = resized(teacher, height, width)
    if mean is not None:
        theirs = np.stack([x - mean for x in theirs])
    b, channels = ours.shape[:2]
    total = 0.0
    for x, y in zip(ours, theirs, strict=True):
        if distance == "kl":
            for i in range(height):
                for j in range(width):
                    p = softmax([float(y[c, i, j]) / temperature for c in range(channels)])
                    q = softmax([float(x[c, i, j]) / temperature for c in range(channels)])
                    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                    total += temperature * temperature * kl / (height * width)
            continue
        s, t = values(x), values(y)
        n = len(s)
        if distance == "cosine":
            total += 1 - sum(a * b for a, b in zip(unit(s), unit(t), strict=True))
            continue
        if normalise:
            s, t = ([math.sqrt(n) * a for a in unit(v)] for v in (s, t))
        gaps = [abs(a - b) for a, b in zip(s, t, strict=True)]
        total += sum(gap * gap if distance == "l2" else gap for gap in gaps) / n
    return float(total / b)


def as_map(x: Array) -> Array:
    """Return a map (b k h w) for a map, tokens (b n k) or a vector (b k), which has one pixel."""
    if x.ndim == 2:
        return x.reshape(*x.shape, 1, 1)
    return grid(x) if x.ndim == 3 else x


def resized(x: Array, height: int, width: int) -> Array:
    """(b k h w) -> (b k height width), each channel by itself."""
    return np.stack([np.stack([pooled(one, height, width) for one in sample]) for sample in x])


def connected(x: Array, connector: str, weights: dict[str, Array]) -> Array:
    """(b k h w) -> (b l h w). weights: the connector's, by their names in it."""
    if connector == "none":
        return x
    if connector == "linear":
        return at_each_pixel(x, weights["weight"], weights["bias"])
    first = at_each_pixel(x, weights["0.weight"], weights.get("0.bias"))
    if connector == "mlp":
        return at_each_pixel(np.maximum(first, 0), weights["2.weight"], weights["2.bias"])
    out = np.zeros_like(first)
    for c in range(first.shape[1]):
        found = values(first[:, c])
        mean = sum(found) / len(found)
        variance = sum((value - mean) ** 2 for value in found) / len(found)
        scaled = (first[:, c] - mean) / math.sqrt(variance + _BATCH_NORM)
        out[:, c] = weights["1.weight"][c] * scaled + weights["1.bias"][c]
    return out


def at_each_pixel(x: Array, weight: Array, bias: Array | None) -> Array:
    """(b k h w), (l k 1 1), (l) -> (b l h w)."""
    b, inside, height, width = x.shape
    out = np.zeros((b, len(weight), height, width))
    for place in np.ndindex(*out.shape):
        sample, to, i, j = place
        total = 0.0 if bias is None else float(bias[to])
        for k in range(inside):
            total += float(weight[to, k, 0, 0]) * float(x[sample, k, i, j])
        out[place] = total
    return out


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]
