"""Tensors on their way from the device to the host, which goes on meanwhile."""

import torch
from torch import Tensor


class Sent:
    """Who reads it waits for what was put to work before it was sent, and for nothing later."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
