"""Measures seconds, bytes and their ratios in the same way for every benchmark."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile
from tqdm import trange

Work: TypeAlias = Callable[[], object]
Times: TypeAlias = NDArray[np.float64]
"""(t 2): seconds of each turn, by the clock and of the processor."""
Spread: TypeAlias = Mapping[str, Any]


def timed(work: Work, device: torch.device) -> tuple[float, float]:
    """Run the work; return its seconds by the clock and of the processor."""
    _wait(device)
    start = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judged_by(device: torch.device) -> str:
    """Return which seconds to report.

    On a CPU these are the processor's, since they exclude other programs.
    """
    return "clock" if device.type == "cuda" else "processor"


def in_turns(works: Mapping[str, Work], turns: int, device: torch.device) -> dict[str, Times]:
    """Measure the seconds of each work.

    They take turns, in alternating order, so that other load on the machine affects all equally.
    """
    seconds = {name: np.empty((turns, 2)) for name in works}
    for turn in trange(turns, desc="turns", leave=False):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            seconds[name][turn] = timed(works[name], device)
    return seconds


def summaries(seconds: Mapping[str, Times]) -> dict[str, dict[str, Spread]]:
    """Return each work's seconds, and their ratios to those of the first work in the same turn."""
    first = next(iter(seconds.values()))
    return {
        name: {**spreads("seconds", found), **spreads("ratio", found / first)}
        for name, found in seconds.items()
    }


def spreads(what: str, values: Times) -> dict[str, Spread]:
    return {
        f"{kind}_{what}": spread(column.tolist())
        for kind, column in zip(("clock", "processor"), values.T, strict=True)
    }


def spread(values: Sequence[float]) -> Spread:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "quartiles": [low, high]}


def told(spread: Spread, digits: int, factor: float = 1) -> str:
    """Return a text with the median, and the quartiles in brackets."""
    values = [spread["median"], *spread["quartiles"]]
    middle, low, high = (f"{factor * value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def peak_bytes(work: Work, device: torch.device) -> int:
    """Return the peak of the allocated memory, minus the memory that was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
