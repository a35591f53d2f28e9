"""ACSR from its equations (docs/methods/acsr.md): one stage, level, sample and pixel at a time.

Weights are keyed by their names in the module's state dict. Attention is (b k h w): (b k 1 1) for
channels, (b 1 h w) for pixels.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tests.references.at import energy, pooled, values
from tests.references.reviewkd import nearest

Array = npt.NDArray[np.float64]


def channel_means(features: list[Array]) -> list[Array]:
    """[(b k h w)] -> [(b k 1 1)]."""
    out = []
    for stage in features:
        means = np.zeros((*stage.shape[:2], 1, 1))
        for b, c in np.ndindex(*stage.shape[:2]):
            means[b, c] = sum(values(stage[b, c])) / stage[b, c].size
        out.append(means)
    return out


def energies(features: list[Array], p: float) -> list[Array]:
    """[(b k h w)] -> [(b 1 h w)]."""
    return [np.stack([energy(x, p)[None] for x in stage]) for stage in features]


def logits(gates: list[Array]) -> list[Array]:
    """Invert sigmoids: log g/(1 - g)."""
    return [np.log(gate / (1 - gate)) for gate in gates]


def sized(maps: list[Array], others: list[Array]) -> list[Array]:
    """[(b k h w)] -> [(b k h' w')], pooled to the smaller height and width of the two."""
    out = []
    for x, y in zip(maps, others, strict=True):
        size = [min(a, b) for a, b in zip(x.shape[2:], y.shape[2:], strict=True)]
        out.append(np.stack([np.stack([pooled(c, *size) for c in sample]) for sample in x]))
    return out


def unit(x: Array) -> Array:
    """(b k h w) -> (b k h w): each sample at length 1."""
    return np.stack([s / math.sqrt(sum(v * v for v in values(s))) for s in x])


def channel_review(
    attention: list[Array], weights: Mapping[str, Array], prefix: str = "kinds.channel.fusion."
) -> tuple[list[Array], list[Array]]:
    """A_k = unit(W_k s_k), Â_k = g_k A_k + (1 - g_k) unit(V_k [s_{k+1}; …; s_n])."""
    own, fused = [], []
    for k, s in enumerate(attention):
        a = unit(_linear(weights[f"{prefix}connectors.{k}.weight"], s))
        own.append(a)
        if k + 1 < len(attention):
            rest = np.concatenate(attention[k + 1 :], axis=1)
            d = unit(_linear(weights[f"{prefix}deeper.{k}.weight"], rest))
            g = _gate(weights, prefix, k)
            a = g * a + (1 - g) * d
        fused.append(a)
    return own, fused


def spatial_review(
    attention: list[Array], weights: Mapping[str, Array], prefix: str = "kinds.spatial.fusion."
) -> tuple[list[Array], list[Array]]:
    """Â_n = A_n, Â_k = g_k A_k + (1 - g_k) unit(upsample(Â_{k+1}))."""
    fused = [attention[-1]]
    for k in reversed(range(len(attention) - 1)):
        g, own = _gate(weights, prefix, k), attention[k]
        fused.insert(0, g * own + (1 - g) * unit(nearest(fused[0], *own.shape[2:])))
    return attention, fused


def mean(batches: list[Array], momentum: float) -> Array:
    """[(b k h w)] -> (k h w): the mean of the batches' means, weighted by momentum^age."""
    total, weights = np.zeros(batches[0].shape[1:]), 0.0
    for age, batch in enumerate(reversed(batches)):
        total += momentum**age * sum(batch) / len(batch)
        weights += momentum**age
    return total / weights


def hccsl(ours: Array, theirs: Array, levels: Sequence[int] = (4, 2)) -> float:
    """(b k h w), (b k h w) -> (1/Σw)·Σ w·mean(1 - cos), w = 1, 1/2, 1/4.

    A level that is no coarser than the map is skipped.
    """
    height, width = ours.shape[2:]
    sizes = [(height, width)] + [(n, n) for n in levels if n < min(height, width)]
    total, weights = 0.0, 0.0
    for place, size in enumerate(sizes):
        gaps = 0.0
        for x, y in zip(ours, theirs, strict=True):
            s = [v for channel in x for v in values(pooled(channel, *size))]
            t = [v for channel in y for v in values(pooled(channel, *size))]
            gaps += 1 - cosine(s, t)
        total += 0.5**place * gaps / len(ours)
        weights += 0.5**place
    return total / weights


def cosine(s: list[float], t: list[float]) -> float:
    product = sum(a * b for a, b in zip(s, t, strict=True))
    return product / math.sqrt(sum(a * a for a in s)) / math.sqrt(sum(b * b for b in t))


def _gate(weights: Mapping[str, Array], prefix: str, k: int) -> float:
    return 1 / (1 + math.exp(-float(weights[f"{prefix}gates"][k])))


def _linear(weight: Array, x: Array) -> Array:
    """(l k 1 1), (b k 1 1) -> (b l 1 1)."""
    out = np.zeros((len(x), len(weight), 1, 1))
    for b in range(len(x)):
        for c in range(len(weight)):
            pairs = zip(values(weight[c]), values(x[b]), strict=True)
            out[b, c] = sum(u * v for u, v in pairs)
    return out
