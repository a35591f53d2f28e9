"""Seeded random numbers that leave the generators of the training unchanged."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch in this block, then restore torch's, numpy's and Python's generators."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
