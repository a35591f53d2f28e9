"""A group of gloo processes on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


@contextmanager
def gloo_group(rank: int, size: int, folder: str | Path, patience: timedelta) -> Iterator[None]:
    """Join a group of `size` processes that meet in a folder; at the end, wait for the others.

    Each process has one thread. patience: how long a process waits for the others.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=patience,
    )
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
