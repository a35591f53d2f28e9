"""Measures the parts of kdhooks' step with torch.profiler, and estimates its shortest time."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Work, timed
from benchmarks.overhead.ways import DIM, Pair, distilled
from benchmarks.profiling import STEPS, fastest_step, parts_of
from kdhooks.teacher.session import TeacherSession

MAPS_BACKWARD = "autograd::engine::evaluate_function: MseLossBackward0"


def parts_of_a_step(pair: Pair, images: Tensor, labels: Tensor, trace: Path) -> dict[str, Any]:
    """Return the milliseconds of each part of a step, and the least that its work would take."""
    device = images.device
    step, kd = distilled(pair, images.shape[-1])
    spans: dict[str, tuple[object, str]] = {
        "student": (pair.student, "forward"),
        "head and labels": (pair, "task_loss"),
        "run ahead": (TeacherSession, "run_ahead"),  # at the student's entrance
        "kdhooks": (kd, "forward"),
        "teacher": (pair.teacher, "forward"),
        **{tap.name: (tap.loss, "forward") for tap in kd.taps},
        "backward": (Tensor, "backward"),
    }
    work = partial(step, images, labels)
    ms = parts_of(work, spans, device, trace, [MAPS_BACKWARD])
    ms["maps, backward"] = ms.pop(MAPS_BACKWARD)
    ms["kdhooks"] += ms.pop("run ahead")
    ms["kdhooks itself"] = ms["kdhooks"] - ms["teacher"] - ms["maps"] - ms["fcd"]
    return {
        "batch": list(images.shape),
        "ms": fastest_step(ms),
        "unprofiled_step_ms": round(1e3 * _fastest(work, device), 4),
        **_floor(pair, images),
    }


def _fastest(work: Work, device: torch.device) -> float:
    return min(timed(work, device)[0] for _ in range(STEPS))


def _floor(pair: Pair, images: Tensor) -> dict[str, Any]:
    """Return the models' operations, the terms' bytes, and this machine's rate of each."""
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
