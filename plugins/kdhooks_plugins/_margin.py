"""Scores with a margin, and the cross-entropy of their softmax on rows that are not trained."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks import ClassShard, Wanted
from kdhooks.classes.ranks import mean_of_ranks, world

_EPS = 1e-7  # keeps arccos differentiable at ±1
MOST = 2  # rad, the largest margin: from 2.33 on, the line of `_turned` would start above -1
GONE = -1e30  # a score that excludes its class


def scores(
    embedding: Tensor, labels: Tensor, rows: ClassShard, scale: float, margin: float
) -> Tensor:
    """(b e), (b), rows (c e) -> (b c): σ cos, minus the margin at the own class (CosFace)."""
    found = rows.cosines(embedding, scale)
    if margin:
        found = rows.add(found, labels, embedding.new_full((len(embedding),), -scale * margin))
    return found


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

    m, m2: one for all samples, or one for each (b). monotone, straight_through: see `ProxylessKD`.
    The means are over the samples of all ranks that have a label; labels below 0 are left out.
    """
    rows = rows.frozen()
    cosine = rows.own(student, labels)
    target = _turned(cosine, m, monotone) - m2
    if straight_through:
        target = cosine + (target - cosine).detach()

    gone = student.new_full((len(student),), GONE)

    def others(student: Tensor, chunk: ClassShard) -> Wanted:
        return Wanted(logs=[chunk.add_(chunk.cosines(student, scale), labels, gone)])

    ((log_others,), _) = rows.over_classes(others, student)
    loss = F.softplus(log_others - scale * target)  # -log p of the own class
    known = labels >= 0
    # A batch that is compared with the rows of all ranks is the batch of all ranks already.
    count = mean_of_ranks(known.sum(), world() if rows.group is None else None).to(loss)
    count = torch.where(count > 0, count, 1)
    return (loss * known).sum() / count, cosine.detach().sum() / count


def _turned(cosine: Tensor, m: Tensor, monotone: bool) -> Tensor:
    """(b) -> (b): cos(θ + m); beyond θ = π - m, where that rises, a straight line in cos θ.

    With m < 0, θ + m is at least 0, because below 0 the cosine would fall again.
    """
    turned = torch.cos((torch.acos(cosine.clamp(-1 + _EPS, 1 - _EPS)) + m).clamp(min=0))
    if not monotone:
        return turned
    line = cosine - m * torch.sin(math.pi - m)
    return torch.where((m < 0) | (cosine > torch.cos(math.pi - m)), turned, line)
