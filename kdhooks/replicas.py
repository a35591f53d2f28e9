"""Parameters that every rank trains outside of DistributedDataParallel, kept equal."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdhooks.classes.shards import world
from kdhooks.guards import NotCopied
from kdhooks.taps import Removable


class Replicas(NotCopied):
    """Rank 0's values now, and the ranks' mean gradient in each backward; nothing on one rank.

    A module that DistributedDataParallel holds as well has its gradients averaged a second time,
    which leaves them as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._handles: list[Removable] = []
        if world() is not None:
            for parameter in module.parameters():
                dist.broadcast(parameter.data, 0)
                if parameter.requires_grad:
                    self._handles.append(parameter.register_hook(_mean))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _mean(gradient: Tensor) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
