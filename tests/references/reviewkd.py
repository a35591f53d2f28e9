"""ReviewKD from its equations: one stage, level and pixel at a time.

Weights are keyed by their names in the module's state dict.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tests.references.at import pooled

Array = npt.NDArray[np.float64]


def review_kd(
    student: list[Array], teacher: list[Array], weights: Mapping[str, Array]
) -> list[float]:
    """[(b k h w)], [(b l h' w')] -> the HCL of each stage, levels {full, 4, 2, 1}."""
    fused = review(student, weights, "path.")
    terms = []
    for k, (x, target) in enumerate(zip(fused, teacher, strict=True)):
        resized = nearest(x, target.shape[2], target.shape[3])
        out = batch_norm(
            convolution(resized, weights[f"outputs.{k}.0.weight"]),
            weights[f"outputs.{k}.1.weight"],
            weights[f"outputs.{k}.1.bias"],
        )
        terms.append(hcl(out, target))
    return terms


def review(features: list[Array], weights: Mapping[str, Array], prefix: str) -> list[Array]:
    """[(b k h w)] -> [(b m h w)]: each stage but the deepest is gated with the next deeper one."""
    fused: list[Array] = []
    for k in reversed(range(len(features))):
        own = batch_norm(
            convolution(features[k], weights[f"{prefix}inputs.{k}.0.weight"]),
            weights[f"{prefix}inputs.{k}.1.weight"],
            weights[f"{prefix}inputs.{k}.1.bias"],
        )
        if fused:
            deeper = nearest(fused[0], own.shape[2], own.shape[3])
            own = gated(
                own,
                deeper,
                weights[f"{prefix}gates.{k}.weight"],
                weights[f"{prefix}gates.{k}.bias"],
            )
        fused.insert(0, own)
    return fused


def gated(own: Array, deeper: Array, weight: Array, bias: Array) -> Array:
    """z = σ(W [own; deeper] + bias) has two channels: z_1·own + z_2·deeper."""
    out = np.zeros_like(own)
    samples, mid, height, width = own.shape
    for b in range(samples):
        for i in range(height):
            for j in range(width):
                z = []
                for gate in range(2):
                    logit = float(bias[gate])
                    for c in range(mid):
                        logit += float(weight[gate, c, 0, 0]) * float(own[b, c, i, j])
                        logit += float(weight[gate, mid + c, 0, 0]) * float(deeper[b, c, i, j])
                    z.append(1 / (1 + math.exp(-logit)))
                out[b, :, i, j] = z[0] * own[b, :, i, j] + z[1] * deeper[b, :, i, j]
    return out


def hcl(ours: Array, theirs: Array) -> float:
    """(1/Σw)·Σ w·MSE, w = 1, 1/2, 1/4, 1/8; a level that is no coarser than the map is skipped."""
    height, width = ours.shape[2:]
    sizes = [(height, width)] + [(n, n) for n in (4, 2, 1) if n < min(height, width)]
    total, weights = 0.0, 0.0
    for place, size in enumerate(sizes):
        squares, count = 0.0, 0
        for b in range(ours.shape[0]):
            for c in range(ours.shape[1]):
                gap = pooled(ours[b, c], *size) - pooled(theirs[b, c], *size)
                squares += float((gap**2).sum())
                count += gap.size
        total += 0.5**place * squares / count
        weights += 0.5**place
    return total / weights


def convolution(x: Array, weight: Array) -> Array:
    """(b k h w), (o k s s) -> (b o h w), with zero padding, without bias."""
    samples, _, height, width = x.shape
    size = weight.shape[2]
    out = np.zeros((samples, weight.shape[0], height, width))
    for i in range(height):
        for j in range(width):
            for di in range(size):
                for dj in range(size):
                    row, column = i + di - size // 2, j + dj - size // 2
                    if 0 <= row < height and 0 <= column < width:
                        out[:, :, i, j] += x[:, :, row, column] @ weight[:, :, di, dj].T
    return out


def batch_norm(x: Array, gain: Array, bias: Array, eps: float = 1e-5) -> Array:
    """(b k h w) -> (b k h w), as in training: by each channel's own mean and biased variance."""
    out = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = float(values.sum()) / values.size
        variance = float(((values - mean) ** 2).sum()) / values.size
        out[:, c] = (values - mean) / math.sqrt(variance + eps) * gain[c] + bias[c]
    return out


def nearest(x: Array, height: int, width: int) -> Array:
    """(b k h w) -> (b k height width): out[i] = in[floor(i·h / height)]."""
    out = np.zeros((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            out[:, :, i, j] = x[:, :, i * x.shape[2] // height, j * x.shape[3] // width]
    return out
