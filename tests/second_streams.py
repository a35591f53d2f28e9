"""Streams of the second device, by which it knows what may run at the same time.

Each operator ticks its stream's clock; what waits takes over the clock that it waits for. An
operator may touch memory that another stream wrote, or write what another one touched, only after
that: else on a GPU the two would race. Memory belongs to the stream that it was made on, which
gives it away again as soon as nobody holds it: then whatever other streams did with it must be
over, or known to the allocator by `record_stream`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Stream:
    """For `torch.cuda.Stream`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.clock: dict[Stream, int] = {self: 0}

    def wait_stream(self, other: "Stream") -> None:
        merge(self.clock, other.clock)

    def tick(self) -> int:
        merge(self.clock, _HOST)
        self.clock[self] += 1
        return self.clock[self]

    def after(self, other: "Stream", tick: int) -> bool:
        return other is self or self.clock.get(other, 0) >= tick


class Event:
    """For `torch.cuda.Event`: a host that waits for it is behind all that came before it."""

    def record(self, stream: Stream) -> None:
        self._clock = dict(stream.clock)

    def synchronize(self) -> None:
        merge(_HOST, self._clock)


def merge(clock: dict[Stream, int], other: dict[Stream, int]) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


_HOST: dict[Stream, int] = {}
_stack = [Stream()]
faults: list[str] = []


def current(device: torch.device | None = None) -> Stream:
    return _stack[-1]


@contextmanager
def entered(stream: Stream) -> Iterator[None]:
    _stack.append(stream)
    try:
        yield
    finally:
        _stack.pop()


class Memory:
    """Of one storage: who made it, who wrote it last, and who touched it last."""

    def __init__(self) -> None:
        self.owner = current()
        self.recorded: set[Stream] = set()
        self.wrote = (self.owner, 0)
        self.touched: dict[Stream, int] = {}
        self.holders = 0

    def touch(self, tick: int, writes: bool, func: object) -> None:
        stream = current()
        others = [self.wrote, *(self.touched.items() if writes else ())]
        if not all(stream.after(*other) for other in others):
            raise RuntimeError(f"{func} races with another stream")
        self.touched[stream] = tick
        if writes:
            self.wrote = stream, tick

    def free(self) -> None:
        """Others may still be at work; those that are recorded are waited for."""
        for stream, tick in self.touched.items():
            if stream not in self.recorded and not self.owner.after(stream, tick):
                faults.append("memory was given away while another stream uses it")


_memories: dict[int, Memory] = {}


class Held:
    """What a tensor of the device holds of its memory, as long as it lives."""

    def __init__(self, near: torch.Tensor) -> None:
        self._key = near.untyped_storage()._cdata
        self.memory = _memories.setdefault(self._key, Memory())
        self.memory.holders += 1

    def __del__(self) -> None:
        self.memory.holders -= 1
        if not self.memory.holders:
            self.memory.free()
            _memories.pop(self._key, None)


def ran(func: Any, args: Sequence[Any], read: Sequence[Held], made: Sequence[Held]) -> None:
    """An operator on the current stream; one that works in place writes its first argument."""
    tick = current().tick()
    written = getattr(args[0], "held", None) if args and func._schema.is_mutable else None
    for held in read:
        held.memory.touch(tick, held is written, func)
    for held in made:
        held.memory.touch(tick, not held.memory.touched, func)


def install() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event, cuda.stream, cuda.current_stream = Stream, Event, entered, current
