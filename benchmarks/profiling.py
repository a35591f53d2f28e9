"""Measures the time of each part of a step with torch.profiler."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.measuring import Work

STEPS = 40
STEP = "step"  # the span of a whole step
Spans: TypeAlias = Mapping[str, tuple[object, str]]
"""The name of each part -> the object or class, and the name of its method that does the part."""
Milliseconds: TypeAlias = NDArray[np.float64]
"""(t): milliseconds of each step."""
T = TypeVar("T")


def parts_of(
    step: Work,
    spans: Spans,
    device: torch.device,
    trace: Path,
    operators: Sequence[str] = (),
    steps: int = STEPS,
) -> dict[str, Milliseconds]:
    """Measure the host's time of each part and of each operator, and write a trace.

    A GPU works later than the host, so there the trace shows more.
    """
    with _spanned(spans):
        for _ in range(3):
            step()
        with profile(activities=_activities(device)) as profiler:
            for _ in range(steps):
                step()
    profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    assert events is not None
    return {name: _of_each_step(name, events, steps) for name in (*spans, *operators)}


def traced(step: Work, spans: Spans, device: torch.device, steps: int, trace: Path) -> "Trace":
    """Profile a few steps. trace: the file to write, compressed by gzip, which browsers show."""
    with _spanned(spans):
        step()
        with profile(activities=_activities(device)) as profiler:
            for _ in range(steps):
                with record_function(STEP):
                    step()
    plain = trace.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    content = plain.read_bytes()
    trace.write_bytes(gzip.compress(content))
    plain.unlink()
    return Trace(json.loads(content)["traceEvents"], steps)


def _activities(device: torch.device) -> list[ProfilerActivity]:
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [ProfilerActivity.CPU, *gpu]


@contextmanager
def _spanned(spans: Spans) -> Iterator[None]:
    """Record each call of these methods as a span in the profile."""
    with ExitStack() as patches:
        for name, (owner, method) in spans.items():
            recorded = _recorded(name, getattr(owner, method))
            patches.enter_context(patch.object(owner, method, recorded))
        yield


def _recorded(name: str, work: Callable[..., T]) -> Callable[..., T]:
    def recorded(*args: Any, **options: Any) -> T:
        with record_function(name):
            return work(*args, **options)

    return recorded


def _of_each_step(name: str, events: Iterable[Any], steps: int) -> Milliseconds:
    """Return the host's time. The profiler's spans on the GPU have the same names; exclude them."""
    on_host = (e for e in events if e.name == name and e.device_type.name == "CPU")
    spent = np.array([event.cpu_time_total for event in on_host])
    each: Milliseconds = spent.reshape(steps, -1).sum(axis=1) / 1e3
    return each


def fastest_step(parts: Mapping[str, Milliseconds]) -> dict[str, float]:
    """Return the least time of each part, since other work on the machine can only add time."""
    return {name: round(float(spent.min()), 4) for name, spent in parts.items()}


class Trace:
    """The events of a chrome trace: the host's spans and calls, and the work on the GPU.

    Times are milliseconds a step. A call of the CUDA runtime and the kernel or copy that it puts on
    the GPU have the same number, `correlation`.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]], steps: int) -> None:
        self._steps = steps
        by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for event in events:
            if event.get("ph") == "X":
                by_kind[event.get("cat", "")].append(event)
        self._spans = by_kind["user_annotation"]
        whole = [span for span in self._spans if span["name"] == STEP]
        first, last = min(map(_start, whole)), max(map(_end, whole))
        calls = by_kind["cuda_runtime"] + by_kind["cuda_driver"]
        # The profiler itself waits for the GPU after the last step.
        self._calls = [call for call in calls if first <= _start(call) < last]
        self._work: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            for event in by_kind[kind]:
                self._work[_number(event)].append(event)

    def host_ms(self, span: str) -> float:
        """Return the host's time in a span."""
        return self._ms(event for event in self._spans if event["name"] == span)

    def gpu_ms(self, span: str = STEP) -> float:
        """Return the GPU's time for the work that any thread of the host issued during a span."""
        times = [(_start(event), _end(event)) for event in self._spans if event["name"] == span]
        return self._ms(
            work
            for call in self._calls
            if any(start <= _start(call) < end for start, end in times)
            for work in self._work.get(_number(call), ())
        )

    def waits(self) -> list[dict[str, Any]]:
        """Return each wait of the host for the GPU: the call, the span, how often, how long."""
        found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for call in self._calls:
            copies = [work["name"] for work in self._work.get(_number(call), ())]
            pageable = any("Pageable" in name for name in copies)
            if "Synchronize" in call["name"] or call["name"] == "cudaMemcpy":
                found[call["name"], self._inside(call)].append(call)
            elif "Memcpy" in call["name"] and pageable:
                found[f"{call['name']} of pageable memory", self._inside(call)].append(call)
        return [
            {"call": name, "in": span, "count": len(calls) / self._steps, "ms": self._ms(calls)}
            for (name, span), calls in found.items()
        ]

    def _inside(self, call: Mapping[str, Any]) -> str:
        """Return the shortest span around a call, in the same thread."""
        around = [
            (span["dur"], span["name"])
            for span in self._spans
            if span["tid"] == call["tid"] and _start(span) <= _start(call) < _end(span)
        ]
        return str(min(around)[1]) if around else "another thread"

    def _ms(self, events: Iterable[Mapping[str, Any]]) -> float:
        return float(sum(event["dur"] for event in events)) / 1e3 / self._steps


def _start(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


def _number(event: Mapping[str, Any]) -> int:
    return int(event.get("args", {}).get("correlation", -1))
