"""Measures a step: of the student alone, with its teacher, and with the teacher's cache filled.

    python -m benchmarks.teacher_cache --threads 1 --out bench-out

The three take turns on the same batches, so that other load on the machine affects them equally. A
ratio is the median over turns of the ratio to the student alone. Writes teacher_cache.json and
teacher_cache.png. With --profile, these also show the time of each part of a step with a filled
cache, and its trace is written to teacher_cache_trace.json.
"""

import argparse
import copy
import tempfile
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.command import bars, command, start, write
from benchmarks.measuring import Spread, in_turns, judged_by, summaries, told
from benchmarks.networks import DIM, network, settle
from benchmarks.profiling import STEPS, Spans, Trace, fastest_step, parts_of, traced
from kdhooks import Distiller, Teacher
from kdhooks.arguments import at_least
from kdhooks.later import Sent
from kdhooks.teacher.cache import CacheOptions, TeacherCache
from kdhooks.teacher.fingerprints import ViewKeys

CLASSES = 1000
WAYS = ("student alone", "with the teacher", "with a filled cache")
KDHOOKS = (
    "hash",
    "keys to the host",
    "look-up",
    "rows to the device",
    "loss terms",
    "kdhooks itself",
)


class Variant:
    """A student in training, with or without a Distiller; each step takes the next batch."""

    def __init__(
        self, student: nn.Module, teacher: Teacher | None, batches: Tensor, labels: Tensor
    ) -> None:
        """batches (n b 3 h w), labels (b)."""
        self.student = copy.deepcopy(student).train()
        self.head = nn.Linear(DIM, CLASSES, bias=False).to(batches.device)
        self.kd = None if teacher is None else Distiller(self.student, teacher, ["fcd"])
        modules = [self.student, self.head, *([self.kd] if self.kd else [])]
        parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        self.batches, self.labels = cycle(batches), labels

    def step(self) -> None:
        images = next(self.batches)
        loss = self.task_loss(self.student(images))
        if self.kd is not None:
            loss = sum(self.kd(images, self.labels).values(), start=loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def task_loss(self, embedding: Tensor) -> Tensor:
        """(b d) -> ()."""
        return F.cross_entropy(self.head(embedding), self.labels)


class Measurement:
    """The three variants; the folder's cache is filled at the start."""

    def __init__(
        self,
        options: argparse.Namespace,
        folder: Path,
        networks: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        """networks: student and teacher, by default two stand-ins of the options' widths."""
        self.device: torch.device = options.device
        torch.manual_seed(0)
        if networks is None:
            networks = network(options.student, 2), network(options.teacher, 3)
        student, trained = (net.to(self.device) for net in networks)
        pixels = torch.randint(0, 256, (options.batches, options.batch_size, 3, 112, 112))
        batches = ((pixels.float() - 127.5) / 127.5).to(self.device)
        labels = torch.randint(0, CLASSES, (options.batch_size,), device=self.device)
        settle(trained, batches[0])
        teacher = Teacher(trained, cache=CacheOptions(path=folder))
        teachers = (None, Teacher(copy.deepcopy(trained)), teacher)
        self.variants = {
            name: Variant(student, one, batches, labels)
            for name, one in zip(WAYS, teachers, strict=True)
        }
        for _ in range(options.batches + 1):  # the last step has the first hits, which are checked
            for variant in self.variants.values():
                variant.step()
        cached = self.variants["with a filled cache"].kd
        assert cached is not None
        (self.cache,) = cached._session.caches
        self._missed = self._misses()

    def _misses(self) -> int:
        return self.cache.asked - self.cache.hits

    def _check(self) -> None:
        assert self._misses() == self._missed, "a measured step was not a cached one"

    def times(self, turns: int) -> dict[str, dict[str, Spread]]:
        works = {name: variant.step for name, variant in self.variants.items()}
        seconds = in_turns(works, turns, self.device)
        self._check()
        return summaries(seconds)

    def parts(self, trace: Path, steps: int = STEPS) -> dict[str, float]:
        """Return the milliseconds of each part of a cached step."""
        step = self.variants["with a filled cache"].step
        ms = parts_of(step, self._spans(), self.device, trace, steps=steps)
        start, finish, get = ms.pop("start"), ms.pop("finish"), ms.pop("get")
        ms["keys to the host"] = start - ms["hash"] + get
        ms["rows to the device"] = finish - get - ms["look-up"]
        ms["kdhooks itself"] = ms["kdhooks"] - finish - ms["loss terms"]
        ms["kdhooks"] += start
        self._check()
        return fastest_step(ms)

    def trace(self, file: Path, steps: int) -> Trace:
        """Record each event of a few cached steps. file: the trace to write, ending in .gz."""
        step = self.variants["with a filled cache"].step
        trace = traced(step, self._spans(), self.device, steps, file)
        self._check()
        return trace

    def _spans(self) -> Spans:
        cached = self.variants["with a filled cache"]
        assert cached.kd is not None
        return {
            "student, forward": (cached.student, "forward"),
            "head and cross entropy": (cached, "task_loss"),
            "kdhooks": (cached.kd, "forward"),
            "start": (TeacherCache, "start"),  # at the student's entrance
            "hash": (ViewKeys, "__call__"),
            "finish": (TeacherCache, "finish"),
            "get": (Sent, "get"),
            "look-up": (TeacherCache, "look_up"),
            "loss terms": (cached.kd.losses["fcd"], "forward"),
            "backward": (Tensor, "backward"),
            "optimizer": (cached.optimizer, "step"),
        }


def picture(
    times: Mapping[str, Mapping[str, Spread]], parts: Mapping[str, float], kind: str
) -> Figure:
    """Draw the steps, and below them the parts of kdhooks in a cached step."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(2 if parts else 1, 1, squeeze=False)[:, 0]
    bars(panels[0], {"": {name: found[f"{kind}_seconds"] for name, found in times.items()}})
    panels[0].set_xlabel(f"{kind} seconds")
    if parts:
        panels[1].barh(KDHOOKS, [parts[name] for name in KDHOOKS])
        panels[1].invert_yaxis()
        panels[1].set_xlabel("milliseconds of a step with a filled cache")
    return figure


def main() -> None:
    parser = command("teacher_cache", __doc__, turns=24)
    add = parser.add_argument
    add("--student", type=at_least(1), default=48, help="width of the student's first stage")
    add(
        "--teacher",
        type=at_least(1),
        default=96,
        help="width of the teacher's first stage; each stage has one block more",
    )
    add("--batch-size", type=at_least(1), default=16)
    add("--batches", type=at_least(1), default=4, help="number of different batches")
    add("--profile", action="store_true", help="also measure each part of a cached step")
    options = start(parser)
    kind = judged_by(options.device)
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        measurement = Measurement(options, Path(folder) / "cache")
        times = measurement.times(options.turns)
        if options.profile:
            parts = measurement.parts(options.out / "teacher_cache_trace.json")
    for name, found in times.items():
        seconds, ratio = found[f"{kind}_seconds"], found[f"{kind}_ratio"]
        print(f"{name}: {told(seconds, 3)} s, {told(ratio, 3)} of the student alone")
    for name, ms in parts.items():
        print(f"of a step with a filled cache, {name}: {ms:.3f} ms")
    record = {"measured": times, "cached_step_ms": parts}
    write(options, "teacher_cache", record, picture(times, parts, kind))


if __name__ == "__main__":
    main()
