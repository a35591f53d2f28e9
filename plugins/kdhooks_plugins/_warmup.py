"""Letting a loss, or a part of it, grow over the first steps."""

import torch
from torch import Tensor, nn


class WarmUp(nn.Module):
    """A factor that grows linearly from 0 to 1 over the first steps in training."""

    steps: Tensor

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, value: Tensor) -> Tensor:
        """() -> ()."""
        factor = (self.steps.to(value.dtype) / max(self.total, 1)).clamp(max=1.0)
        if self.training:
            with torch.no_grad():
                self.steps += 1
        return factor * value if self.total else value
