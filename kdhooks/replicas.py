"""Parameters that every rank trains outside of DistributedDataParallel, kept equal."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdhooks.shards import world
from kdhooks.taps import Removable


def synchronise(module: nn.Module) -> list[Removable]:
    """Rank 0's values now, and the ranks' mean gradient in each backward; nothing on one rank."""
    handles: list[Removable] = []
    if world() is not None:
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)
            if parameter.requires_grad:
                handles.append(parameter.register_hook(_mean))
    return handles


def _mean(gradient: Tensor) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
