"""Streams of the second device; they detect races, as vector clocks do.

Each operator ticks the clock of its stream. A stream that waits for another one merges the other's
clock into its own. Only after such a wait may an operator touch memory that another stream wrote,
or write memory that another stream touched: otherwise the two would race on a GPU. Memory belongs
to the stream on which it was allocated, which reuses it as soon as no tensor holds it. By then,
work of other streams on this memory must be finished, or reported to the allocator with
`record_stream`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Stream:
    """Replaces `torch.cuda.Stream`."""

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
    """Replaces `torch.cuda.Event`: a host that has waited for it comes after all work before it."""

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
    """The streams that allocated a storage, wrote it last, and touched it last."""

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
        """Other streams may still use the memory; the allocator waits only for recorded ones."""
        for stream, tick in self.touched.items():
            if stream not in self.recorded and not self.owner.after(stream, tick):
                faults.append("memory was given away while another stream uses it")


_memories: dict[int, Memory] = {}


class Held:
    """A tensor's hold on its memory, as long as the tensor lives."""

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
    """Record an operator on the current stream; an in-place operator writes its first argument."""
    tick = current().tick()
    written = getattr(args[0], "held", None) if args and func._schema.is_mutable else None
    for held in read:
        held.memory.touch(tick, held is written, func)
    for held in made:
        held.memory.touch(tick, not held.memory.touched, func)


def install() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event, cuda.stream, cuda.current_stream = Stream, Event, entered, current
