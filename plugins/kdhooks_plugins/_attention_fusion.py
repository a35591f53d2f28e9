"""What is left of attention without its mean over images, and AMFM, which fuses several stages."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks_plugins._attention import unit
from kdhooks_plugins.reviewkd import conv

_LEAST = 1e-6  # the weight of a mean of no images, which is then zero


class ImageMean(nn.Module):
    """The running mean over images, without a bias towards its start at zero.

    Each rank adds its own batch; after the step the ranks take the mean of their buffers, as of all
    buffers that a loss does not keep for itself.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, shape: Sequence[int], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("total", torch.zeros(1, *shape))
        self.register_buffer("weight", torch.zeros(1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(b k h w) -> (1 k h w), in training with this batch among the images."""
        if self.training:
            batch = x.mean(dim=0, keepdim=True).to(self.total)
            self.total = torch.lerp(batch, self.total, self.momentum)
            self.weight = torch.lerp(torch.ones_like(self.weight), self.weight, self.momentum)
        return (self.total / self.weight.clamp(min=_LEAST)).to(x)


class ChannelFusion(nn.Module):
    """A_k = unit(W_k s_k); Â_k = g A_k + (1 - g) unit(V_k [s_{k+1}; …; s_n]), s the student's.

    W and V bring the student's channels to the number of the teacher's.
    """

    def __init__(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """The channels of each stage."""
        super().__init__()
        self.connectors = nn.ModuleList(conv(d, e, 1) for d, e in zip(ours, theirs, strict=True))
        self.deeper = nn.ModuleList(
            conv(sum(ours[k:]), e, 1) for k, e in enumerate(theirs[:-1], start=1)
        )
        self.gates = nn.Parameter(torch.zeros(len(ours) - 1))

    def forward(self, attention: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[(b k 1 1)] -> [(b l 1 1)], [(b l 1 1)]: A and Â."""
        own = [unit(w(s)) for w, s in zip(self.connectors, attention, strict=True)]
        fused = list(own)
        for k, (gate, v) in enumerate(zip(self.gates.sigmoid(), self.deeper, strict=True)):
            fused[k] = gate * own[k] + (1 - gate) * unit(v(torch.cat(attention[k + 1 :], dim=1)))
        return own, fused


class SpatialFusion(nn.Module):
    """Â_n = A_n; Â_k = g A_k + (1 - g) unit(upsample(Â_{k+1})), A the student's maps."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(stages - 1))

    def forward(self, attention: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[(b 1 h w)] -> [(b 1 h w)], [(b 1 h w)]: A and Â."""
        fused = list(attention)
        gates = self.gates.sigmoid()
        for k in reversed(range(len(gates))):
            deeper = unit(F.interpolate(fused[k + 1], attention[k].shape[-2:]))
            fused[k] = gates[k] * attention[k] + (1 - gates[k]) * deeper
        return attention, fused
