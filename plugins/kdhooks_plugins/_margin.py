"""Cross-entropy of a margin softmax on rows that the student does not train."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from kdhooks import ClassShard

_EPS = 1e-7  # keeps arccos differentiable at ±1


def margin_softmax(
    student: Tensor,
    labels: Tensor,
    rows: ClassShard,
    *,
    m: Tensor,
    m2: Tensor | float = 0.0,
    scale: float = 64.0,
    monotone: bool = True,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """(b e), (b), rows -> loss (), mean cosine at the own class (); ψ(θ) = cos(θ + m) - m2 there.

    m, m2: of all samples or of each (b). monotone, straight_through: see `ProxylessKD`.
    The means are over the samples that have a label: those below 0 are left out.
    """
    rows = replace(rows, weight=rows.weight.detach())
    count = (labels >= 0).sum().clamp(min=1)
    cosines = rows.cosines(student)
    own = rows.pick(cosines, labels)
    shift = _turned(own, m, monotone) - m2 - own
    if straight_through:
        shift = shift.detach()
    log_p = rows.log_softmax(scale * rows.add(cosines, labels, shift))
    return -rows.pick(log_p, labels).sum() / count, own.detach().sum() / count


def _turned(cosine: Tensor, m: Tensor, monotone: bool) -> Tensor:
    """(b) -> (b): cos(θ + m); past θ = π - m, where that rises, a straight line."""
    turned = torch.cos(torch.acos(cosine.clamp(-1 + _EPS, 1 - _EPS)) + m)
    if not monotone:
        return turned
    line = cosine - m * torch.sin(math.pi - m)
    return torch.where(cosine > torch.cos(math.pi - m), turned, line)
