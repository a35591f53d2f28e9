"""Finds the running loop, the length of its epochs, and the numbering of its samples."""

import inspect
import math
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.runner import BaseLoop
from torch.utils.data import ConcatDataset

from kdhooks.errors import KDHooksError


def running_loop() -> BaseLoop | None:
    """Return the loop that runs the present step; None without a runner.

    A model has no reference to its runner or dataloader, so the callers' frames are searched.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, BaseLoop):
            return found
        frame = frame.f_back
    return None


def length(loop: Any) -> int | None:
    """Return the number of batches in which all ranks together see the data once, if known."""
    loader = loop.dataloader
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError):  # for example with an IterableDataset
        return None
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if isinstance(sampler, InfiniteSampler):  # its length ignores the number of ranks
        batches = math.ceil(batches / sampler.world_size)
    return batches or None


def check_numbers(loop: Any) -> None:
    """Refuse a data set of several parts, each of which numbers its samples from 0.

    loop: None without a runner; then nothing is known about the data.
    """
    dataset = getattr(getattr(loop, "dataloader", None), "dataset", None)
    while dataset is not None:
        if isinstance(dataset, ConcatDataset) and len(dataset.datasets) > 1:
            raise KDHooksError(
                "mmengine: a table of embeddings needs samples that are numbered across the whole "
                f"training set; found a ConcatDataset of {len(dataset.datasets)} parts, each of "
                "which counts sample_idx from 0; train on one data set, or add your own numbers in "
                "a transform, and name them as indices = 'data_samples.field'"
            )
        dataset = getattr(dataset, "dataset", None)  # the data set inside a wrapper, if any
