"""Observe an unedited trainer from its config file: step times, losses, memory.

arcface_torch executes the config file in `main`, before it builds anything. `watch` observes each
step by patching the LR scheduler, and writes the observations when the process ends.
"""

import atexit
import json
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.lr_scheduler import LRScheduler


def watch(path: str, deterministic: bool) -> None:
    """Write JSON to path at the end; deterministic: use only torch's deterministic algorithms."""
    observer = _Observer(Path(path))
    plain = LRScheduler.step

    def step(schedule: LRScheduler, *args: Any) -> None:
        plain(schedule, *args)
        observer.step()

    setattr(LRScheduler, "step", step)  # noqa: B010  # type checkers refuse a plain assignment
    atexit.register(observer.write)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        # The trainer enables cudnn.benchmark later, so each forward must disable it again.
        register_module_forward_pre_hook(_no_search)


def _no_search(module: nn.Module, args: object) -> None:
    torch.backends.cudnn.benchmark = False


class _Observer:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._times: list[float] = []
        self._losses: list[Tensor] = []
        self._scaler: Any = None

    def step(self) -> None:
        """Record a step; the trainer steps its scheduler at the end of each, and once before."""
        names = _trainers_names(sys._getframe())
        if "loss" in names:
            self._times.append(time.perf_counter())
            self._losses.append(names["loss"].detach())
            self._scaler = names.get("amp")

    def write(self) -> None:
        found: dict[str, Any] = {
            "losses": [loss.item() for loss in self._losses],
            "step_times": self._times,
        }
        if self._scaler is not None and self._scaler.is_enabled():
            found["scale"] = self._scaler.get_scale()
        if torch.cuda.is_available():
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
            found["backend"] = "nccl"
        self._path.write_text(json.dumps(found))


def _trainers_names(frame: FrameType | None) -> dict[str, Any]:
    """Return the local variables of the trainer's running `main`."""
    while frame is not None:
        if frame.f_code.co_name == "main" and "module_partial_fc" in frame.f_locals:
            return dict(frame.f_locals)
        frame = frame.f_back
    raise RuntimeError("the schedule was stepped outside of a trainer's main()")
