"""Results that a device is still computing while the host, or another stream, continues."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Tensors = TypeVar("Tensors", bound=Iterable[Tensor])


class Later(Protocol[T_co]):
    """A result of work that was started earlier. `get` waits for that result only."""

    def get(self) -> T_co: ...


@dataclass(frozen=True)
class Ready(Generic[T]):
    """A result that is available already."""

    value: T

    def get(self) -> T:
        return self.value


class Sent:
    """A tensor on its way to the host; `get` blocks until the copy has finished."""

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach() if tensor.requires_grad else tensor
        self._host = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


class SideStream:
    """A separate CUDA stream, for work that runs in parallel with the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[Tensor], Tensors], given: Tensor) -> Later[Tensors]:
        """Start `work(given)` on the stream; `get` makes the current stream wait for it."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            made = work(given)
        given.record_stream(self._stream)  # the allocator must know every stream that uses it
        return _OnStream(self, made)

    def join(self) -> None:
        """Make the current stream wait for all work on this one."""
        torch.cuda.current_stream(self.device).wait_stream(self._stream)


@dataclass(frozen=True)
class _OnStream(Generic[Tensors]):
    stream: SideStream
    made: Tensors

    def get(self) -> Tensors:
        self.stream.join()
        for tensor in self.made:
            tensor.record_stream(torch.cuda.current_stream(self.stream.device))
        return self.made
