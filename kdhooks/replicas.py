"""The state of the losses on several ranks, kept equal; and their batches, compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdhooks.classes.per_class import PerClass, described_tables, share_digests
from kdhooks.classes.ranks import answers, before_gathering, gathering_once
from kdhooks.copies import IdleCopy, NotCopied
from kdhooks.errors import KDHooksError, listed
from kdhooks.names import declared_inside, full_name
from kdhooks.schedules import Schedule
from kdhooks.taps import Removable


class _Mark(NamedTuple):
    """Tells a buffer from another one, and from itself after a change."""

    tensor: int
    version: int


@dataclass(frozen=True)
class _Place:
    module: nn.Module
    name: str
    own: bool  # whether each rank keeps it by itself

    def is_split(self, head: bool) -> bool:
        """Whether each rank has other classes; head: whether the student's classifier is split."""
        module = self.module
        return module.split.group is not None if isinstance(module, PerClass) else head

    @property
    def buffer(self) -> Tensor:
        return self.module.get_buffer(self.name)

    @property
    def silent(self) -> bool:
        """Whether it changes without a new version, as the statistics of a BatchNorm do."""
        return isinstance(self.module, nn.modules.batchnorm._NormBase)

    def mark(self) -> _Mark:
        buffer = self.buffer
        return _Mark(id(buffer), buffer._version)

    def replace(self, tensor: Tensor) -> None:
        """By a new tensor, since the backward pass may still need the values of the old one."""
        persistent = self.name not in self.module._non_persistent_buffers_set
        self.module.register_buffer(self.name, tensor, persistent)


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
        sharded: whether the student's classifier is split, and what losses make of it.
        """
        refuse_different(declared)
        share_digests(module)
        refuse_different(described_tables(module))
        own = own_buffers(module)
        # A module may replace its buffer by another tensor, so each is named by its module.
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
        self._handles: list[Removable] = [loaded]
        self._module = ref(module)
        self._averaged: dict[int, ref[nn.Parameter]] = {}  # by id
        self._average_gradients()
        self._hosts: dict[dist.ProcessGroup, dist.ProcessGroup] = {}

    @contextmanager
    def one_step(self, size: int) -> Iterator[None]:
        """Run the losses inside, on a batch of `size` samples of this rank."""
        self._refuse_overwritten()
        self._average_gradients()
        with self.same_sizes(size), gathering_once():
            yield
        self._average_buffers()

    @contextmanager
    def same_sizes(self, size: int) -> Iterator[None]:
        """Gatherings inside refuse batches of other ranks that have not `size` samples too."""
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
        """Also those of parameters that were unfrozen, or replaced, since the last step."""
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
        """A DDP around the losses overwrites each rank's own classes with those of rank 0."""
        for place, before in zip(self._own, self._own_marks, strict=True):
            now = place.mark()
            # In place: a module that is moved, as accelerate does, has other tensors.
            if now.tensor == before.tensor and now.version != before.version:
                raise KDHooksError(
                    f"the buffer '{place.name}' holds this rank's own classes, and was overwritten "
                    "after the last step; DistributedDataParallel does that to the buffers of the "
                    "module that it wraps; keep kd outside of that module, since kd itself keeps "
                    "the ranks equal"
                )

    def _compare_sizes(self, size: int, group: dist.ProcessGroup) -> None:
        """A gathering of batches of different sizes would hang, or end the process.

        The hosts compare them, so that no device is waited for.
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
                f"found {found}, by rank; let the data loader drop or pad an incomplete last batch"
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _NotesLoading(IdleCopy):
    """A hook: a state dict may overwrite each rank's own buffers."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def __call__(self, *_: object) -> None:
        self._replicas._note()


def own_buffers(module: nn.Module) -> set[str]:
    """The names of all buffers that each rank keeps by itself."""
    return declared_inside(module, "buffers_by_rank")


def options_of(loss: nn.Module) -> str:
    """The numbers and words that a loss and its parts hold, which its options have set."""
    return ", ".join(
        f"{full_name(prefix, name)}={shown_number(value)}"
        for prefix, inner in loss.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, bool | int | float | str | Schedule)
        and not name.startswith("_")
        and name != "training"
    )


def shown_number(value: object) -> str:
    """The same on two ranks that were given the same; a function can't be compared."""
    function = callable(value) and not isinstance(value, Schedule)
    return "by a function" if function else str(value)


def refuse_different(declared: Sequence[str]) -> None:
    """Ranks with different terms would wait for each other for ever."""
    of_ranks = answers(list(declared))
    for rank, lines in enumerate(of_ranks):
        if lines != of_ranks[0]:
            ours = listed(line for line in of_ranks[0] if line not in lines)
            theirs = listed(line for line in lines if line not in of_ranks[0])
            raise KDHooksError(
                "all ranks must declare the same terms in the same order; only rank 0 has: "
                f"{ours}; only rank {rank}: {theirs}; start every rank with the same recipe"
            )


def _mean(gradient: Tensor) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
