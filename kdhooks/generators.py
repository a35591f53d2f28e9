"""Random numbers that do not disturb those of the training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed_generators(seed: int, device: torch.device) -> Iterator[None]:
    """A seed of our own inside; torch's, numpy's and Python's generators unchanged outside."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
