"""Seconds, bytes and their ratios, alike in every benchmark."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile

Work: TypeAlias = Callable[[], object]


def timed(work: Work, device: torch.device) -> tuple[float, float]:
    """Seconds of the clock, and of the processor."""
    _wait(device)
    start = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(works: Mapping[str, Work], turns: int, device: torch.device) -> dict[str, Any]:
    """Each work's seconds, and their ratios to the first one's of the same turn.

    They take turns, forwards and backwards, so that whatever else the machine does meets all alike.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(turns):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            times[name].append(timed(works[name], device))
    first = times[next(iter(works))]
    return {name: summary(found, first) for name, found in times.items()}


def summary(
    found: Sequence[tuple[float, float]], first: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """Medians and quartiles of seconds, and of ratios turn by turn."""
    summed: dict[str, Any] = {}
    for kind, index in (("clock", 0), ("processor", 1)):
        seconds = [pair[index] for pair in found]
        ratios = [pair[index] / other[index] for pair, other in zip(found, first, strict=True)]
        summed[f"{kind}_seconds"], summed[f"{kind}_ratio"] = spread(seconds), spread(ratios)
    return summed


def spread(values: Sequence[float]) -> dict[str, Any]:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "quartiles": [low, high]}


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most memory that was held at once beyond what was held before, by the allocator."""
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


def setting(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a result depends on."""
    return {
        **options,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
    }
