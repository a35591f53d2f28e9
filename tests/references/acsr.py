"""ACSR from its equations (§4.5): one stage, level, sample and pixel at a time.

Weights go by the names that they have in the module's state dict.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tests.references.at import energy, pooled, values
from tests.references.reviewkd import convolution, review

Array = npt.NDArray[np.float64]


def energies(features: list[Array], p: float) -> list[Array]:
    """[(b k h w)] -> [(b 1 h w)]."""
    return [np.stack([energy(x, p)[None] for x in stage]) for stage in features]


def amfm(maps: list[Array], weights: Mapping[str, Array], positive: bool) -> list[Array]:
    """[(b 1 h w)] -> [(b 1 h w)]: Â_k = conv3x3(u_k), softplus where maps are not negative."""
    out = []
    for k, u in enumerate(review(maps, weights, "fusion.path.")):
        x = convolution(u, weights[f"fusion.outputs.{k}.weight"])
        if positive:
            for place in np.ndindex(x.shape):
                x[place] = math.log(1 + math.exp(x[place]))
        out.append(x)
    return out


def hccsl(
    ours: Array, theirs: Array, levels: Sequence[int] = (4, 2), center: bool = False
) -> float:
    """(b k h w), (b k h' w') -> (1/Σw)·Σ w·mean(1 - cos), w = 1, 1/2, 1/4.

    Both at the smaller size; a level that is no coarser than that is skipped.
    """
    height, width = (min(a, b) for a, b in zip(ours.shape[2:], theirs.shape[2:], strict=True))
    sizes = [(height, width)] + [(n, n) for n in levels if n < min(height, width)]
    total, weights = 0.0, 0.0
    for place, size in enumerate(sizes):
        gaps = 0.0
        for x, y in zip(ours, theirs, strict=True):
            s = _vector(_in_two_steps(x, (height, width), size))
            t = _vector(_in_two_steps(y, (height, width), size))
            gaps += 1 - cosine(s, t, center)
        total += 0.5**place * gaps / len(ours)
        weights += 0.5**place
    return total / weights


def cosine(s: list[float], t: list[float], center: bool) -> float:
    """Of the deviations from the mean, if center: Pearson's r."""
    if center:
        s = [value - sum(s) / len(s) for value in s]
        t = [value - sum(t) / len(t) for value in t]
    product = sum(a * b for a, b in zip(s, t, strict=True))
    return product / math.sqrt(sum(a * a for a in s)) / math.sqrt(sum(b * b for b in t))


def fused(maps: list[Array], center: bool) -> Array:
    """[(b 1 h w)] -> (b 1 h w): the mean of the maps at the last one's size and at length 1."""
    out = np.zeros_like(maps[-1])
    height, width = maps[-1].shape[2:]
    for stage in maps:
        for b, sample in enumerate(stage):
            x = pooled(sample[0], height, width)
            if center:
                x = x - sum(values(x)) / x.size
            out[b, 0] += x / math.sqrt(sum(v * v for v in values(x))) / len(maps)
    return out


def logits(gates: list[Array]) -> list[Array]:
    """Of sigmoids: log g/(1 - g)."""
    return [np.log(gate / (1 - gate)) for gate in gates]


def _in_two_steps(x: Array, first: tuple[int, int], then: tuple[int, int]) -> list[Array]:
    return [pooled(pooled(channel, *first), *then) for channel in x]


def _vector(channels: list[Array]) -> list[float]:
    return [value for channel in channels for value in values(channel)]
