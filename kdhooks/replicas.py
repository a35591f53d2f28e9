"""Keeps the state of the losses equal on all ranks, and compares the ranks' batch sizes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdhooks.classes.per_class import PerClass, described_tables, share_digests
from kdhooks.classes.ranks import answers, before_gathering, gathering_once
from kdhooks.copies import IdleCopy, NotCopied
from kdhooks.errors import KDHooksError, listed
from kdhooks.names import declared_inside, full_name


class _Mark(NamedTuple):
    """Identifies a buffer and its version: another tensor and a change both make it differ."""

    tensor: int
    version: int


@dataclass(frozen=True)
class _Place:
    module: nn.Module
    name: str
    own: bool  # whether each rank keeps its own values

    def is_split(self, head: bool) -> bool:
        """Whether each rank holds other classes. head: whether the student's head is split."""
        module = self.module
        return module.split.group is not None if isinstance(module, PerClass) else head

    @property
    def buffer(self) -> Tensor:
        return self.module.get_buffer(self.name)

    @property
    def silent(self) -> bool:
        """Whether its values may change without a new `_version`, as BatchNorm statistics do."""
        return isinstance(self.module, nn.modules.batchnorm._NormBase)

    def mark(self) -> _Mark:
        buffer = self.buffer
        return _Mark(id(buffer), buffer._version)

    def replace(self, tensor: Tensor) -> None:
        """Register a new tensor, since the backward pass may still need the old tensor's values."""
        persistent = self.name not in self.module._non_persistent_buffers_set
        self.module.register_buffer(self.name, tensor, persistent)


class Replicas(NotCopied):
    """Keeps a module's parameters and floating-point buffers equal on all ranks.

    At the start, each rank receives the values of rank 0. Each backward pass averages the gradients
    over the ranks, and each step averages the buffers that it changed. A submodule may name buffers
    that must not be averaged in `buffers_by_rank() -> set[str]`, because each rank holds other
    classes, or because the submodule itself computes them from the batches of all ranks.

    If DistributedDataParallel holds the module as well, it averages gradients that are equal
    already, which does not change them.
    """

    def __init__(self, module: nn.Module, declared: Sequence[str], sharded: bool) -> None:
        """
        declared: one line of text for each term; it must be the same on every rank.
        sharded: whether the student's classifier, and buffers made from it, are split by class.
        """
        refuse_different(declared)
        share_digests(module)
        refuse_different(described_tables(module))
        own = own_buffers(module)
        # A module may replace a buffer by another tensor, so places name a module and a buffer.
        places: list[_Place] = [
            _Place(inner, name, full_name(prefix, name) in own)
            for prefix, inner in module.named_modules()
            for name, buffer in inner.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        self._shared = [place for place in places if not place.own]
        self._own = [place for place in places if place.own and place.is_split(sharded)]
        for tensor in (*module.parameters(), *(place.buffer for place in self._shared)):
            dist.broadcast(tensor.data, 0)
        self._note()
        loaded = module.register_load_state_dict_post_hook(_NotesLoading(self))
        self._handles: list[RemovableHandle] = [loaded]
        self._module = ref(module)
        self._averaged: dict[int, ref[nn.Parameter]] = {}  # by id
        self._average_gradients()
        self._hosts: dict[dist.ProcessGroup, dist.ProcessGroup] = {}

    @contextmanager
    def one_step(self, size: int) -> Iterator[None]:
        """Run the losses in this block, on this rank's batch of `size` samples."""
        self._refuse_overwritten()
        self._average_gradients()
        with self.same_sizes(size), gathering_once():
            yield
        self._average_buffers()

    @contextmanager
    def same_sizes(self, size: int) -> Iterator[None]:
        """Before any gathering in this block, refuse ranks whose batch is not of `size` samples."""
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

    def _average_gradients(self) -> None:
        """Hook all trained parameters, also those unfrozen or replaced since the last step."""
        module = self._module()
        for parameter in () if module is None else module.parameters():
            known = self._averaged.get(id(parameter))
            if parameter.requires_grad and (known is None or known() is not parameter):
                self._averaged[id(parameter)] = ref(parameter)
                self._handles.append(parameter.register_hook(_mean))

    def _note(self) -> None:
        """Remember which tensors the buffers are, and in which version."""
        self._shared_marks = [place.mark() for place in self._shared]
        self._own_marks = [place.mark() for place in self._own]

    def _average_buffers(self) -> None:
        pairs = zip(self._shared, self._shared_marks, strict=True)
        changed = [place for place, before in pairs if place.silent or place.mark() != before]
        if changed:
            given = [place.buffer.detach() for place in changed]
            joined = torch.cat([buffer.double().flatten() for buffer in given])
            dist.all_reduce(joined)
            joined /= dist.get_world_size()
            parts = joined.split([buffer.numel() for buffer in given])
            for place, buffer, mean in zip(changed, given, parts, strict=True):
                place.replace(mean.reshape(buffer.shape).to(buffer.dtype))
        self._note()

    def _refuse_overwritten(self) -> None:
        """Refuse a DDP around the losses: it overwrites the classes of all ranks by rank 0's."""
        for place, before in zip(self._own, self._own_marks, strict=True):
            now = place.mark()
            # Only a change in place is refused: a module that accelerate moves has new tensors.
            if now.tensor == before.tensor and now.version != before.version:
                raise KDHooksError(
                    f"the buffer '{place.name}' holds this rank's own classes, but was overwritten "
                    "after the last step; DistributedDataParallel does that to the buffers of the "
                    "module that it wraps; keep kd outside of that module, since kd itself keeps "
                    "the ranks equal"
                )

    def _compare_sizes(self, size: int, group: dist.ProcessGroup) -> None:
        """Refuse batches of different sizes: gathering them would hang or end the process.

        The sizes are compared on the CPU, so that nothing waits for a device.
        """
        if group not in self._hosts:
            ranks = dist.get_process_group_ranks(group)
            host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            assert isinstance(host, dist.ProcessGroup)  # this rank is one of them
            self._hosts[group] = host
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([size]), self._hosts[group])
        found = [int(one) for one in sizes]
        if len(set(found)) > 1:
            raise KDHooksError(
                "these losses compare the samples of all ranks, whose batches must be of one size; "
                f"found {found} by rank; let the data loader drop or pad an incomplete last batch"
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _NotesLoading(IdleCopy):
    """A hook that accepts the buffers of a loaded state dict as this rank's own."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def __call__(self, *_: object) -> None:
        self._replicas._note()


def own_buffers(module: nn.Module) -> set[str]:
    """Return the names of all buffers of which each rank keeps its own values."""
    return declared_inside(module, "buffers_by_rank")


def refuse_different(declared: Sequence[str]) -> None:
    """Refuse different terms on different ranks, which would wait for each other forever."""
    of_ranks = answers(list(declared))
    for rank, lines in enumerate(of_ranks):
        if lines != of_ranks[0]:
            ours = listed(line for line in of_ranks[0] if line not in lines)
            theirs = listed(line for line in lines if line not in of_ranks[0])
            raise KDHooksError(
                "all ranks must declare the same terms in the same order; only rank 0 has: "
                f"{ours}; only rank {rank} has: {theirs}; start every rank with the same recipe "
                "and the same files"
            )


def _mean(gradient: Tensor) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
