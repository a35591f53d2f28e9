"""Stand-ins for face networks, for measurements in which the weights do not matter."""

import torch
from torch import Tensor, nn

DIM = 512


def network(width: int, blocks: int) -> nn.Sequential:
    """(b 3 112 112) -> (b 512): stages of 3x3 convolutions at 56, 28, 14 and 7."""
    layers: list[nn.Module] = []
    inside = 3
    for stage in range(4):
        outside = width * 2**stage
        for block in range(blocks):
            conv = nn.Conv2d(inside, outside, 3, 2 - (block > 0), 1, bias=False)
            layers += [conv, nn.BatchNorm2d(outside), nn.ReLU()]
            inside = outside
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inside * 49, DIM), nn.BatchNorm1d(DIM))


def settle(teacher: nn.Module, images: Tensor) -> None:
    """Set the batch norms to the statistics of a batch, since an untrained teacher is refused."""
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        teacher.train()(images)
