"""Measures the time and the memory of a trial's step."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdhooks_integrations.arcface_torch.commands.trial import Trial

_RUNS = 2


@dataclass(frozen=True)
class Cost:
    seconds: float  # of the faster one of two steps
    bytes: int  # peak memory of a step, without weights and optimizer state


def measure(trial: Trial) -> Cost:
    """Measure a step; on a CPU, bytes are those of the tensors that are kept for backward."""
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
    """Return the bytes of all storages that autograd keeps, except those of the weights."""
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
    """Return the bytes of weights, gradients and optimizer state.

    copies: 3 for a weight, its gradient and its momentum; 4 with the two moments of AdamW.
    """
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes * (copies if t.requires_grad else 1) for t in tensors.values())
