"""Losses over all classes as papers write them, with a matrix of all scores."""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

T, SCALE, GROUP = 4.0, 64.0, 10_000
MARGIN, ADAPTIVE_MARGIN = 0.5, 0.45
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""student (b d), teacher (b d), labels (b), teacher's rows (c d), student's own rows (c d) -> ()"""


def cosines(x: Tensor, rows: Tensor) -> Tensor:
    return F.normalize(x) @ F.normalize(rows).T


def plain_kd(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    log_s = F.log_softmax(SCALE / T * cosines(s, ours), dim=1)
    p_t = F.softmax(SCALE / T * cosines(t, theirs), dim=1)
    return T**2 * F.kl_div(log_s, p_t, reduction="batchmean")


def plain_thkd(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    return plain_kd(s, t, labels, theirs, theirs)


def arcface(s: Tensor, labels: Tensor, rows: Tensor, m: Tensor | float) -> Tensor:
    """(b d), (b), (c d), () or (b) -> ()."""
    scores = cosines(s, rows)
    own = scores.gather(1, labels[:, None])[:, 0].clamp(-1 + 1e-7, 1 - 1e-7)
    turned = torch.cos(torch.acos(own) + m)
    return F.cross_entropy(SCALE * scores.scatter(1, labels[:, None], turned[:, None]), labels)


def plain_proxylesskd(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    return arcface(s, labels, theirs, MARGIN)


def plain_margindistillation(
    s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor
) -> Tensor:
    fit = F.cosine_similarity(t, theirs[labels]).clamp(min=0)
    return arcface(s, labels, theirs, 0.2 + 0.3 * fit / fit.max())


class PlainAdaDistill:
    """AdaDistill for batches in which all labels differ."""

    def __init__(self) -> None:
        self.centres = torch.empty(0)

    def __call__(
        self, s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor
    ) -> Tensor:
        if not len(self.centres):
            self.centres = F.normalize(theirs)
        own, unit = self.centres[labels], F.normalize(t)
        alpha = F.cosine_similarity(s.detach(), t) * F.cosine_similarity(t, own).clamp(1e-6, 1)
        alpha = alpha.clamp(1e-6, 1)[:, None]
        self.centres[labels] = F.normalize(alpha * own + (1 - alpha) * unit)
        return arcface(s, labels, self.centres, ADAPTIVE_MARGIN)


def plain_gkd(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    z_s, z_t = SCALE * cosines(s, ours), SCALE * cosines(t, theirs)
    first = z_s.detach().scatter(1, labels[:, None], torch.inf)
    chosen = first.topk(min(GROUP, len(ours)), dim=1).indices
    log_s, log_t = F.log_softmax(z_s / T, dim=1), F.log_softmax(z_t / T, dim=1)
    in_s, in_t = log_s.gather(1, chosen), log_t.gather(1, chosen)
    share_s, share_t = in_s.logsumexp(dim=1), in_t.logsumexp(dim=1)
    log_p, log_q = in_t - share_t[:, None], in_s - share_s[:, None]
    primary = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    rest_s, rest_t = torch.log(-torch.expm1(share_s)), torch.log(-torch.expm1(share_t))
    binary = share_t.exp() * (share_t - share_s) + rest_t.exp() * (rest_t - rest_s)
    return T**2 * (8 * primary + binary).mean()


def plain_of(name: str) -> Loss:
    forms: dict[str, Loss] = {
        "kd": plain_kd,
        "gkd": plain_gkd,
        "thkd": plain_thkd,
        "proxylesskd": plain_proxylesskd,
        "margindistillation": plain_margindistillation,
        "adadistill": PlainAdaDistill(),
    }
    return forms[name]
