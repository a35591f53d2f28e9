"""Runs several gloo processes, for tests that compare them with one process."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks.gloo import gloo_group

Results = dict[str, Any]  # tensors by name, and dicts of them
Scenarios = Callable[[], dict[str, Results]]


def here() -> tuple[int, int]:
    """Return rank and world size."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def as_torchrun() -> None:
    """Set the environment of this rank as torchrun does, for hosts that read it."""
    rank, size = here()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # nothing listens there: the process group already exists
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1",
    }


def group() -> "dist.ProcessGroup | None":
    return dist.group.WORLD if dist.is_initialized() else None


def mine(batch: Tensor) -> Tensor:
    """Return this rank's part of a batch."""
    rank, size = here()
    return batch.chunk(size)[rank]


def mean_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients as DDP leaves them on every rank."""
    out = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad.clone()
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        out[name] = gradient
    return out


def on_two_ranks(scenarios: Scenarios, folder: Path) -> list[dict[str, Results]]:
    """Return the results of each of two processes; scenarios is a function of a test module."""
    return on_ranks(2, scenarios, folder)


def on_ranks(size: int, scenarios: Scenarios, folder: Path) -> list[dict[str, Results]]:
    """Return the results of each of `size` processes."""
    spawn(_run, (size, scenarios, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _run(rank: int, size: int, scenarios: Scenarios, folder: str) -> None:
    warnings.simplefilter("error")
    with gloo_group(rank, size, folder, timedelta(seconds=120)):
        torch.save(scenarios(), f"{folder}/{rank}.pt")
