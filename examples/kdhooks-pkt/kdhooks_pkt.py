"""Probabilistic Knowledge Transfer (PKT), Passalis and Tefas, ECCV 2018, arXiv:1803.10837.

Differs from the paper: a sample is not its own neighbour; the loss is the mean over samples; the
weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, Options, Weight, hookimpl, option


class Neighbourhoods(nn.Module):
    """KL divergence of the student's conditional probabilities from the teacher's."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        target = probabilities(teacher.detach())
        return F.kl_div(probabilities(student).log(), target, reduction="batchmean")


def probabilities(embedding: Tensor) -> Tensor:
    """(b d) -> (b b-1): the probability of each other sample as a neighbour, by (cos + 1) / 2."""
    unit, b = F.normalize(embedding), len(embedding)
    kernel = ((unit @ unit.T + 1) / 2).clamp(min=1e-7)
    others = kernel[~torch.eye(b, dtype=torch.bool, device=kernel.device)].view(b, b - 1)
    return others / others.sum(dim=1, keepdim=True)


class PKT(Options):
    """L = mean KL(teacher's probabilities ‖ student's)."""

    weight: Weight = option(100.0, "The factor of the term.", least=0)

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("pkt", Neighbourhoods(), self.weight)
