"""Where the time of a step goes, by torch.profiler."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.measuring import Work

STEPS = 40
Spans: TypeAlias = Mapping[str, tuple[object, str]]
"""A part's name, and the object or class with the method that does it."""
Milliseconds: TypeAlias = NDArray[np.float64]
"""(t): in each step."""
T = TypeVar("T")


def parts_of(
    step: Work, spans: Spans, device: torch.device, trace: Path, operators: Sequence[str] = ()
) -> dict[str, Milliseconds]:
    """What each part took, and each of the operators; leaves a trace.

    Of the host's clock; on a GPU, whose work comes later, the trace says more.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with ExitStack() as patches:
        for name, (owner, method) in spans.items():
            recorded = _recorded(name, getattr(owner, method))
            patches.enter_context(patch.object(owner, method, recorded))
        for _ in range(3):
            step()
        with profile(activities=activities) as profiler:
            for _ in range(STEPS):
                step()
    profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    assert events is not None
    return {name: _of_each_step(name, events) for name in (*spans, *operators)}


def _recorded(name: str, work: Callable[..., T]) -> Callable[..., T]:
    def recorded(*args: Any, **options: Any) -> T:
        with record_function(name):
            return work(*args, **options)

    return recorded


def _of_each_step(name: str, events: Iterable[Any]) -> Milliseconds:
    spent = np.array([event.cpu_time_total for event in events if event.name == name])
    each: Milliseconds = spent.reshape(STEPS, -1).sum(axis=1) / 1e3
    return each


def fastest_step(parts: Mapping[str, Milliseconds]) -> dict[str, float]:
    """Of many, since other work on the machine can only add."""
    return {name: round(float(spent.min()), 4) for name, spent in parts.items()}
