"""Where the time of kdhooks' step goes, by torch.profiler, and the least that it could take."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import timed
from benchmarks.overhead.ways import DIM, Pair, distilled

STEPS = 40
PARTS = ("student", "head and labels", "kdhooks", "teacher", "maps", "fcd", "backward")
MAPS_BACKWARD = "autograd::engine::evaluate_function: MseLossBackward0"
T = TypeVar("T")


def parts_of_a_step(pair: Pair, images: Tensor, labels: Tensor, trace: Path) -> dict[str, Any]:
    """Milliseconds of a step, part by part; its operations and bytes, and what those need.

    The fastest of many, since other work on the machine can only add. Of the host's clock; on a
    GPU, whose work comes later, the trace says more.
    """
    device = images.device
    _, kd = distilled(pair, images.shape[-1])
    spans: dict[str, nn.Module] = {"student": pair.student, "teacher": pair.teacher}
    spans |= {tap.name: tap.loss for tap in kd.taps}
    for name, module in spans.items():
        module.forward = _named(name, module.forward)

    def step() -> None:
        embedding = pair.student(images)
        task_loss = _named("head and labels", pair.task_loss)(embedding, labels)
        loss = sum(_named("kdhooks", kd)(images, labels).values(), start=task_loss)
        _named("backward", loss.backward)()

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    if images.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
    profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    assert events is not None
    spent = np.array([_of_each_step(name, events) for name in (*PARTS, MAPS_BACKWARD)]) / 1e3
    names: list[str] = [*PARTS, "maps, backward"]
    ms = dict(zip(names, spent, strict=True))
    ms["kdhooks itself"] = ms["kdhooks"] - ms["teacher"] - ms["maps"] - ms["fcd"]
    return {
        "batch": list(images.shape),
        "ms": {name: round(float(values.min()), 4) for name, values in ms.items()},
        "unprofiled_step_ms": round(1e3 * _fastest(step, device), 4),
        **_floor(pair, images),
    }


def _of_each_step(name: str, events: Iterable[Any]) -> list[float]:
    """Microseconds of all events of this name, in each step."""
    spent = np.array([event.cpu_time_total for event in events if event.name == name])
    each: list[float] = spent.reshape(STEPS, -1).sum(axis=1).tolist()
    return each


def _named(name: str, work: Callable[..., T]) -> Callable[..., T]:
    def named(*args: object) -> T:
        with record_function(name):
            return work(*args)

    return named


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    return min(timed(work, device)[0] for _ in range(STEPS))


def _floor(pair: Pair, images: Tensor) -> dict[str, Any]:
    """Operations of the models, bytes of the terms, and this machine's pace at either."""
    device = images.device
    maps = []
    for name, module in pair.student.named_children():
        if name in ("stage2", "stage3", "stage4"):
            module.register_forward_hook(lambda module, args, out: maps.append(out.numel()))
    with FlopCounterMode(display=False) as student:
        pair.student(images).sum().backward()
    with FlopCounterMode(display=False) as teacher, torch.no_grad():
        pair.teacher(images)
    # Forward: both maps are read. Backward: both are read again, and a gradient is written.
    numbers = sum(maps)
    forward, backward = 4 * 2 * numbers, 4 * 3 * numbers
    square = torch.rand(1024, 1024, device=device)
    block, other = torch.rand(2, max(numbers, 1 << 20), device=device)  # as near as the maps are
    operations = 2 * 1024**3 / _fastest(partial(torch.mm, square, square), device)
    throughput = 2 * 4 * len(block) / _fastest(partial(other.copy_, block), device)
    return {
        "operations": {
            "student, forward and backward": student.get_total_flops(),
            "teacher": teacher.get_total_flops(),
            "maps, forward and backward": 3 * numbers + 3 * numbers,
            "fcd, forward and backward": 2 * 8 * len(images) * DIM,
        },
        "bytes": {"maps": forward, "maps, backward": backward},
        "measured": {"operations_a_second": operations, "bytes_a_second": throughput},
        "floor_ms": {
            "student, forward and backward": 1e3 * student.get_total_flops() / operations,
            "teacher": 1e3 * teacher.get_total_flops() / operations,
            "maps": 1e3 * forward / throughput,
            "maps, backward": 1e3 * backward / throughput,
        },
    }
