"""URFM and its losses from their equations: one sample, token, head and number at a time.

Weights are keyed by their names in the module's state dict.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tests.references.at import pooled

Array = npt.NDArray[np.float64]
Vector = list[float]

LANDMARKS = [(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)]


# --- positions -------------------------------------------------------------------------------


def piecewise_index(x: float, alpha: float, beta: float, reach: float) -> int:
    """I(x) = round(x) up to alpha; then min(beta, round(alpha + ln(x/α)/ln(γ'/α)·(β-α)))."""
    if x <= alpha:
        return round(x)
    return int(
        min(beta, round(alpha + math.log(x / alpha) / math.log(reach / alpha) * (beta - alpha)))
    )


def distances(
    size: tuple[int, int],
    gamma: float = 1.0,
    anchor: tuple[float, float] = LANDMARKS[2],
    saliency: Array | None = None,
) -> Vector:
    """D(i, anchor) in half-cells of a 7 x 7 grid: units of 8 of the 112 pixels."""
    h, w = size
    cells = [((j + 0.5) * 112 / w, (i + 0.5) * 112 / h) for i in range(h) for j in range(w)]
    row, column = math.floor(anchor[1] * h / 112), math.floor(anchor[0] * w / 112)
    nose = row * w + column
    out = []
    for place, cell in enumerate(cells):
        if saliency is None:
            squares = [
                (math.dist(cell, mark) - math.dist(cells[nose], mark)) ** 2 for mark in LANDMARKS
            ]
            facial = math.sqrt(sum(squares)) / math.sqrt(5) / 8
        else:
            values = pooled(saliency, h, w).reshape(-1)
            facial = abs(float(values[place]) - float(values[nose])) * 2 * 7
        out.append(math.dist(cell, cells[nose]) / 8 + gamma * facial)
    return out


# --- attention -------------------------------------------------------------------------------


def pixel_features(tokens: Array, weights: Mapping[str, Array], side: str) -> Array:
    """(b n k) -> f (b n d): each number of each token standardised over the batch."""
    f = np.array([[linear(x, weights, f"{side}.project") for x in sample] for sample in tokens])
    for place in np.ndindex(f.shape[1:]):
        f[(slice(None), *place)] = standard(f[(slice(None), *place)])
    return f


def local_features(
    pixels: Array,
    buckets: Sequence[int],
    weights: Mapping[str, Array],
    side: str,
    heads: int,
) -> Array:
    """f (n d) -> h (l d): softmax_N(3 n(C W_q) n(f W_k + b)ᵀ / √d_head) f W_v W_o, normalised."""
    positions = [weights["urfm.table"][bucket] for bucket in buckets]
    positions = [*weights.get(f"{side}.prompt_positions", []), *positions]
    keys, values = [], []
    for f, position in zip(pixels, positions, strict=True):
        keys.append(linear(f, weights, "urfm.key") + position)
        values.append(linear(f, weights, "urfm.value"))
    out = []
    for centre in weights["urfm.centres"]:
        query = linear(centre, weights, "urfm.query")
        mixed, _ = attend(query, keys, values, heads, sharpness=3.0)
        out.append(normalised(linear(mixed, weights, "urfm.out")))
    return np.array(out)


def self_attention(
    h: Array, weights: Mapping[str, Array], name: str, heads: int
) -> tuple[Array, Array]:
    """(l d) -> h + MSA(h) (l d), its map (heads l l)."""
    d = h.shape[1]
    every = [linear(token, weights, f"{name}.qkv") for token in h]
    keys, values = [x[d : 2 * d] for x in every], [x[2 * d :] for x in every]
    out, maps = [], np.zeros((heads, len(h), len(h)))
    for i, x in enumerate(every):
        mixed, maps[:, i] = attend(x[:d], keys, values, heads)
        out.append(h[i] + linear(mixed, weights, f"{name}.out"))
    return np.array(out), maps


def attend(
    query: Array, keys: list[Array], values: list[Array], heads: int, sharpness: float = 1.0
) -> tuple[Array, Array]:
    """(d), [(d)], [(d)] -> (d), its attention (heads n); n(x) has a root mean square of 1."""
    part = len(query) // heads
    out, attention = np.zeros(len(query)), np.zeros((heads, len(keys)))
    for head in range(heads):
        own = slice(head * part, (head + 1) * part)
        asked = of_unit_size(query[own])
        scores = [
            math.exp(sharpness * float(asked @ of_unit_size(key[own])) / math.sqrt(part))
            for key in keys
        ]
        for n, score in enumerate(scores):
            attention[head, n] = score / sum(scores)
            out[own] += attention[head, n] * values[n][own]
    return out, attention


def of_unit_size(x: Array) -> Array:
    return x / math.sqrt(float(x @ x) / len(x) + 1e-6)


def linear(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    weight = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias", np.zeros(len(weight)))
    return np.array(
        [
            sum(float(w) * float(v) for w, v in zip(row, x, strict=True)) + float(shift)
            for row, shift in zip(weight, bias, strict=True)
        ]
    )


def normalised(x: Array) -> Array:
    mean = float(x.sum()) / len(x)
    variance = sum((float(v) - mean) ** 2 for v in x) / len(x)
    return np.array([(float(v) - mean) / math.sqrt(variance + 1e-5) for v in x])


# --- losses ----------------------------------------------------------------------------------


def attention_term(ours: Array, theirs: Array, kind: str) -> float:
    """Maps (b heads l l): l² · MSE, or the mean KL(theirs ‖ ours) of a row."""
    total = 0.0
    for place in np.ndindex(ours.shape):
        s, t = float(ours[place]), float(theirs[place])
        total += t * math.log(t / s) if kind == "kl" else (s - t) ** 2
    length = int(ours.shape[-1])
    return total * (length if kind == "kl" else length**2) / ours.size


def feature_term(ours: Array, theirs: Array, standardise: bool) -> float:
    """MSE of MSA(h), (b l d), each number of each token standardised over the batch."""
    total = 0.0
    for place in np.ndindex(ours.shape[1:]):
        s, t = ours[(slice(None), *place)], theirs[(slice(None), *place)]
        if standardise:
            s, t = standard(s), standard(t)
        total += sum((float(x) - float(y)) ** 2 for x, y in zip(s, t, strict=True))
    return total / ours.size


def anchor_term(theirs: Array, embedding: Array, readout: Array) -> float:
    """(b l d), (b e), (e l·d): the mean of 1 - cos of R std(y) and the embedding."""
    y = np.empty_like(theirs)
    for place in np.ndindex(theirs.shape[1:]):
        y[(slice(None), *place)] = standard(theirs[(slice(None), *place)])
    total = 0.0
    for sample, target in zip(y, embedding, strict=True):
        read = [
            sum(float(w) * float(v) for w, v in zip(row, sample.reshape(-1), strict=True))
            for row in readout
        ]
        dot = sum(r * float(t) for r, t in zip(read, target, strict=True))
        lengths = math.sqrt(sum(r**2 for r in read)) * math.sqrt(float((target**2).sum()))
        total += 1 - dot / lengths
    return total / len(embedding)


def standard(x: Array) -> Array:
    mean = float(x.sum()) / len(x)
    variance = sum((float(v) - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-5)


def token_variance(y: Array) -> float:
    """(b l d): each number's mean variance over the batch, divided by the mean square of all."""
    total = 0.0
    for place in np.ndindex(y.shape[1:]):
        x = y[(slice(None), *place)]
        mean = float(x.sum()) / len(x)
        total += sum((float(v) - mean) ** 2 for v in x)
    return total / float((y**2).sum())


def centre_cosine(centres: Array) -> float:
    """The mean |cos| of two different centres."""
    found = []
    for i, a in enumerate(centres):
        for j, b in enumerate(centres):
            if i != j:
                lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
                found.append(abs(float(a @ b)) / lengths)
    return sum(found) / len(found)


# --- prompts ---------------------------------------------------------------------------------


def prompted_window(
    tokens: list[Array],
    prompts: list[Array],
    bias: Array,
    mask: Array,
    weights: Mapping[str, Array],
    heads: int,
    scale: float,
) -> tuple[list[Array], list[Array]]:
    """One window: n tokens and t prompts attend to all; bias (n n heads) and mask (n n) apply only
    between tokens.
    """
    d = len(tokens[0])
    part = d // heads
    every = [linear(x, weights, "qkv") for x in [*prompts, *tokens]]
    t, out = len(prompts), []
    for i, x in enumerate(every):
        mixed = np.zeros(d)
        for head in range(heads):
            own = range(head * part, (head + 1) * part)
            scores = []
            for j, y in enumerate(every):
                score = sum(float(x[c]) * float(y[d + c]) for c in own) * scale
                if i >= t and j >= t:
                    score += float(bias[i - t, j - t, head]) + float(mask[i - t, j - t])
                scores.append(math.exp(score))
            for score, y in zip(scores, every, strict=True):
                for c in own:
                    mixed[c] += score / sum(scores) * float(y[2 * d + c])
        out.append(linear(mixed, weights, "proj"))
    return out[t:], out[:t]
