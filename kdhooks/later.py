"""What a device goes on with, while the host or another stream does not wait for it."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=Iterable[Tensor])


class Sent:
    """A tensor on its way to the host.

    Who reads it waits for what was put to work before it was sent, and for nothing later.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach() if tensor.requires_grad else tensor
        self._host = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


class SideStream:
    """Work beside what its caller goes on with."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[Tensor], Tensors], given: Tensor) -> Callable[[], Tensors]:
        """Puts work on `given` on the stream; the result has the current stream wait for it."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            made = work(given)
        given.record_stream(self._stream)  # who frees memory must know what else uses it

        def taken() -> Tensors:
            self.join()
            for tensor in made:
                tensor.record_stream(torch.cuda.current_stream(self.device))
            return made

        return taken

    def join(self) -> None:
        """The current stream waits for all that was put on this one."""
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
