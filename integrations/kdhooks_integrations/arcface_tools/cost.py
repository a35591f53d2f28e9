"""What a step of a trial costs, in seconds and bytes."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_RUNS = 2


@dataclass(frozen=True)
class Cost:
    seconds: float  # a step, the least of two
    bytes: int  # at the step's peak, without weights and optimizer


def measure(step: Callable[[], object], forget: Callable[[], None], images: Tensor) -> Cost:
    """On CUDA the allocator tells the bytes; on a CPU the tensors kept for backward are counted."""
    cuda = images.device.type == "cuda"
    forget()
    size = _cuda_peak(step) if cuda else kept_for_backward(step)
    seconds = []
    for _ in range(_RUNS):
        forget()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Cost(min(seconds), size)


def _cuda_peak(step: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kept_for_backward(step: Callable[[], object]) -> int:
    """Bytes of the distinct storages that autograd holds on to."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def held(modules: Iterable[nn.Module], copies: int) -> int:
    """Bytes of weights; 3 copies with gradient and momentum."""
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes * (copies if t.requires_grad else 1) for t in tensors.values())
