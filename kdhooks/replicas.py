"""The state of the losses on several ranks, kept equal; and their batches, compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdhooks.classes.shards import before_gathering
from kdhooks.copies import NotCopied
from kdhooks.errors import KDHooksError, listed
from kdhooks.taps import Removable


class Replicas(NotCopied):
    """Keeps a module's parameters and floating-point buffers equal on all ranks.

    At the start, each rank takes those of rank 0. Each backward leaves the ranks' mean gradient,
    and each step the mean of the buffers that it has changed. A module inside may name buffers that
    must not be averaged, `buffers_by_rank() -> set[str]`, since each rank holds other classes or
    since the module computes them from all ranks' batches itself.

    If DistributedDataParallel holds the module as well, it averages equal gradients once more,
    which leaves them as they are.
    """

    def __init__(self, module: nn.Module, declared: Sequence[str], sharded: bool) -> None:
        """
        declared: one line for each term, the same on every rank.
        sharded: whether each rank holds classes of its own.
        """
        _refuse_different(declared)
        own = own_buffers(module)
        self._own = [buffer for name, buffer in module.named_buffers() if sharded and name in own]
        # A module may replace its buffer by another tensor, so they are named by their module.
        self._places = [
            (inner, name)
            for prefix, inner in module.named_modules()
            for name, buffer in inner.named_buffers(recurse=False)
            if buffer.is_floating_point() and f"{prefix}.{name}".lstrip(".") not in own
        ]
        for tensor in (*module.parameters(), *self._buffers()):
            dist.broadcast(tensor.data, 0)
        self._versions = [(id(buffer), buffer._version) for buffer in self._buffers()]
        self._handles: list[Removable] = [
            parameter.register_hook(_mean)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        self._hosts: dict[dist.ProcessGroup, dist.ProcessGroup] = {}

    @contextmanager
    def one_step(self, size: int) -> Iterator[None]:
        """Run the losses inside, on a batch of `size` samples of this rank."""
        _refuse_broadcast(self._own)
        compared = set[dist.ProcessGroup]()

        def compare(group: dist.ProcessGroup) -> None:
            if group not in compared:
                compared.add(group)
                self._compare_sizes(size, group)

        token = before_gathering.set(compare)
        try:
            yield
        finally:
            before_gathering.reset(token)
        self._average_buffers()

    def _buffers(self) -> list[Tensor]:
        return [inner.get_buffer(name) for inner, name in self._places]

    def _average_buffers(self) -> None:
        buffers = self._buffers()
        now = [(id(buffer), buffer._version) for buffer in buffers]
        if now == self._versions:
            return
        pairs = zip(buffers, now, self._versions, strict=True)
        changed = [buffer for buffer, new, old in pairs if new != old]
        with torch.no_grad():
            joined = torch.cat([buffer.double().flatten() for buffer in changed])
            dist.all_reduce(joined)
            joined /= dist.get_world_size()
            parts = joined.split([buffer.numel() for buffer in changed])
            for buffer, mean in zip(changed, parts, strict=True):
                buffer.copy_(mean.reshape(buffer.shape))
        self._versions = [(id(buffer), buffer._version) for buffer in buffers]

    def _compare_sizes(self, size: int, group: dist.ProcessGroup) -> None:
        """A gathering of batches of different sizes would hang, or end the process.

        The hosts compare them, so that no device is waited for.
        """
        if group not in self._hosts:
            ranks = dist.get_process_group_ranks(group)
            self._hosts[group] = dist.new_group(
                ranks, backend="gloo", use_local_synchronization=True
            )
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([size]), self._hosts[group])
        found = [int(one) for one in sizes]
        if len(set(found)) > 1:
            raise KDHooksError(
                "these losses compare the samples of all ranks, whose batches must be of one size; "
                f"found {found}, by rank; let the data loader drop or pad an incomplete last batch"
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def own_buffers(module: nn.Module) -> set[str]:
    """The names of all buffers that each rank keeps by itself."""
    found = set[str]()
    for prefix, inner in module.named_modules():
        names = getattr(inner, "buffers_by_rank", None)
        if names is not None:
            found |= {f"{prefix}.{name}".lstrip(".") for name in names()}
    return found


def _refuse_different(declared: Sequence[str]) -> None:
    """Ranks with different terms would wait for each other for ever."""
    of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, list(declared))
    for rank, lines in enumerate(of_ranks):
        if lines != of_ranks[0]:
            ours = listed(line for line in of_ranks[0] if line not in lines)
            theirs = listed(line for line in lines if line not in of_ranks[0])
            raise KDHooksError(
                "all ranks must declare the same terms in the same order; only rank 0 has: "
                f"{ours}; only rank {rank}: {theirs}; start every rank with the same recipe"
            )


def _refuse_broadcast(own: Sequence[Tensor]) -> None:
    """A DDP around the module would overwrite each rank's own classes with those of rank 0."""
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    if wrapper is None or not own:
        return
    sent = {id(buffer) for buffer in wrapper.modules_buffers}
    if wrapper.broadcast_buffers and any(id(buffer) in sent for buffer in own):
        raise KDHooksError(
            "DistributedDataParallel would overwrite buffers of the losses that each rank keeps by "
            "itself; wrap the model with broadcast_buffers=False"
        )


def _mean(gradient: Tensor) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
