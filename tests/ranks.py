"""Two gloo processes, for tests that compare them with one."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

Results = dict[str, Any]  # tensors by name, and dicts of them
Scenarios = Callable[[], dict[str, Results]]


def here() -> tuple[int, int]:
    """Rank and world size."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def group() -> "dist.ProcessGroup | None":
    return dist.group.WORLD if dist.is_initialized() else None


def mine(batch: Tensor) -> Tensor:
    """This rank's part of a batch."""
    rank, size = here()
    return batch.chunk(size)[rank]


def mean_gradients(module: nn.Module) -> dict[str, Tensor]:
    """As DDP leaves them on every rank."""
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
    """What each of two processes found; scenarios is a function of a test module."""
    spawn(_main, (scenarios, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def _main(rank: int, scenarios: Scenarios, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    try:
        torch.save(scenarios(), f"{folder}/rank_{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
