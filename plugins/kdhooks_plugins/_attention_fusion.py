"""AMFM fuses the attention of several stages, from deep to shallow."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks_plugins._attention import unit
from kdhooks_plugins.reviewkd import conv


class ChannelFusion(nn.Module):
    """A_k = unit(W_k s_k); Â_k = g A_k + (1 - g) unit(V_k [s_{k+1}; …; s_n]), s the student's.

    W and V map the student's channels to the teacher's number of channels.
    """

    def __init__(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """ours, theirs: the number of channels of each stage."""
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
