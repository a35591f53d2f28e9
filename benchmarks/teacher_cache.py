"""What a step costs: the student alone, with its teacher, and with the teacher's cache filled.

    python -m benchmarks.teacher_cache > teacher_cache.json

The three take turns on the same batches, so that whatever else the machine does meets them alike.
Ratios are medians of the turns' own ratios to the student alone. Times are in seconds: of the
clock, and of the processor where it does the work.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import setting, summary, timed
from benchmarks.networks import DIM, network, settle
from kdhooks import Distiller, Teacher
from kdhooks.teacher_cache import CacheOptions

CLASSES = 1000


class Variant:
    """A student in training, with or without a Distiller."""

    def __init__(self, student: nn.Module, teacher: Teacher | None) -> None:
        self.student, self.teacher = copy.deepcopy(student).train(), teacher
        self.head = nn.Linear(DIM, CLASSES, bias=False).to(next(student.parameters()).device)
        self.kd = None if teacher is None else Distiller(self.student, teacher, ["fcd"])
        modules = [self.student, self.head, *([self.kd] if self.kd else [])]
        parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step(self, images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(self.head(self.student(images)), labels)
        if self.kd is not None:
            loss = sum(self.kd(images, labels).values(), start=loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def timed_terms(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Of the Distiller alone, after the student's forward."""
        assert self.kd is not None
        self.student(images)
        return timed(partial(self.kd, images, labels), images.device)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = torch.device(options.device)
    torch.manual_seed(0)
    student = network(options.student, 2).to(device)
    trained = network(options.teacher, 3).to(device)
    pixels = torch.randint(0, 256, (options.batches, options.batch_size, 3, 112, 112))
    batches = ((pixels.float() - 127.5) / 127.5).to(device)
    labels = torch.randint(0, CLASSES, (options.batch_size,), device=device)
    settle(trained, batches[0])
    variants = {
        "student": Variant(student, None),
        "uncached": Variant(student, Teacher(copy.deepcopy(trained))),
        "cached": Variant(student, Teacher(trained, cache=CacheOptions(folder))),
    }
    for images in [*batches, batches[0]]:  # fills the cache, and lets the first hits be tried
        for variant in variants.values():
            variant.step(images, labels)
    teacher = variants["cached"].teacher
    assert teacher is not None
    cache = teacher.cache
    assert cache is not None
    misses = cache.asked - cache.hits
    work: dict[str, Callable[[Tensor], object]] = {
        **{name: partial(_step, variant, labels) for name, variant in variants.items()},
        "hash": cache.keys,
        "look_up": lambda images: cache.look_up(cache.keys(images)),  # with the hash
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in [*work, "terms"]}
    for turn in range(options.turns):
        names = list(work) if turn % 2 else list(reversed(work))
        for name in names:
            times[name].append(timed(partial(work[name], batches[turn % options.batches]), device))
        images = batches[turn % options.batches]
        times["terms"].append(variants["cached"].timed_terms(images, labels))
        print(f"\r{turn + 1} of {options.turns} turns", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    assert cache.asked - cache.hits == misses, "a timed step was not a cached one"
    return {name: summary(found, times["student"]) for name, found in times.items()}


def _step(variant: Variant, labels: Tensor, images: Tensor) -> None:
    variant.step(images, labels)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher_cache", description=__doc__)
    add = parser.add_argument
    add("--student", type=int, default=48, help="width of its first stage")
    add("--teacher", type=int, default=96, help="width of its first stage, which has a block more")
    add("--batch-size", type=int, default=16)
    add("--batches", type=int, default=4, help="different ones")
    add("--turns", type=int, default=24)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder) / "cache")
    print(json.dumps({"setting": setting(vars(options)), "measured": measured}, indent=1))


if __name__ == "__main__":
    main()
