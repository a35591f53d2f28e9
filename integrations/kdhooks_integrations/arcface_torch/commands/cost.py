"""What a step of a trial costs, in seconds and bytes."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdhooks_integrations.arcface_torch.commands.trial import Trial

_RUNS = 2


@dataclass(frozen=True)
class Cost:
    seconds: float  # a step, the least of two
    bytes: int  # at the step's peak, without weights and optimizer


def measure(trial: Trial) -> Cost:
    """On CUDA the allocator tells the bytes; on a CPU the tensors kept for backward are counted."""
    cuda = trial.images.device.type == "cuda"
    weights = [*trial.backbone.parameters(), *trial.head.parameters()]
    trial.forget()
    size = _cuda_peak(trial.step) if cuda else kept_for_backward(trial.step, weights)
    seconds = []
    for _ in range(_RUNS):
        trial.forget()
        start = time.perf_counter()
        trial.step()
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


def kept_for_backward(step: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd holds on to, weights and views of them aside."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def held(modules: Iterable[nn.Module], copies: int) -> int:
    """Bytes of weights; 3 copies with gradient and momentum, 4 with the two moments of AdamW."""
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes * (copies if t.requires_grad else 1) for t in tensors.values())
