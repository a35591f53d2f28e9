"""Measures a teacher that runs in each step: in a loop by hand, and with options of a recipe.

    python -m benchmarks.teacher_run --arcface-torch insightface/recognition/arcface_torch

The student alone, the teacher alone, and steps of both take turns on the same images. Without a
checkout of arcface_torch, two networks of 3x3 convolutions are used. Writes teacher_run.json and
teacher_run.png: seconds, images per second, ratios to the loop by hand and to the two alone,
memory, and the difference of the embeddings from those in float32.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.command import bars, command, start, write
from benchmarks.measuring import (
    Times,
    Work,
    in_turns,
    judged_by,
    peak_bytes,
    spreads,
    summaries,
    told,
)
from benchmarks.networks import network, settle
from kdhooks import Distiller, Teacher
from kdhooks.arguments import at_least
from kdhooks.teacher.session import TeacherSession

STAND_IN = "stand-in"
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    ", channels last": {"channels_last": True},
    ", channels last, compiled": {"channels_last": True, "compile": True},
    ", channels last, CUDA graphs": {"channels_last": True, "compile": "reduce-overhead"},
    ", channels last, side stream": {"channels_last": True, "side_stream": True},
    ", channels last, compiled, side stream": {
        "channels_last": True,
        "compile": True,
        "side_stream": True,
    },
}
RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, side stream": {"side_stream": True},
    **{
        f"{name}{way}": {"dtype": dtype, **options}
        for name, dtype in HALF.items()
        for way, options in WAYS.items()
    },
}
ON_A_CPU = ["float32", "bfloat16", "bfloat16, channels last"]  # the others need a compiler or a GPU


class Networks:
    """The student and the teacher, in float32 and in half precision.

    On CUDA, the forward of arcface_torch's networks sets its own autocast, to float16 or none, so
    an autocast around it has no effect. Half precision needs a network created for it.
    """

    def __init__(self, student: str, teacher: str, device: torch.device) -> None:
        self._name, self._device = teacher, device
        self.own_autocast = teacher != STAND_IN and device.type == "cuda"
        if teacher == STAND_IN:
            nets: tuple[nn.Module, nn.Module] = network(24, 2), network(64, 3)
        else:
            nets = self._made(student, self.own_autocast), self._made(teacher, False)
        self.student, self.teacher = (net.to(device) for net in nets)

    def runs(self) -> list[str]:
        """Return the runs that differ for this teacher on this device."""
        if self._device.type != "cuda":
            return ON_A_CPU
        return [run for run in RUNS if not (self.own_autocast and run.startswith("bfloat16"))]

    def half(self) -> nn.Module:
        """Return the teacher for a run in half precision, with the same weights."""
        if not self.own_autocast:
            return copy.deepcopy(self.teacher)
        found = self._made(self._name, True).to(self._device)
        found.load_state_dict(self.teacher.state_dict())
        return found.eval().requires_grad_(False)

    @staticmethod
    def _made(name: str, half: bool) -> nn.Module:
        get_model = importlib.import_module("backbones").get_model
        made: nn.Module = get_model(name, fp16=half, num_features=512)
        return made


class ByHand:
    """A training loop by hand: the teacher in float32 under no_grad, and one cosine loss."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, dtype: torch.dtype | None = None
    ) -> None:
        self.student, self.teacher, self.dtype = student, teacher, dtype
        self.optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def step(self, images: Tensor) -> None:
        embedding = self.student(images)
        with torch.no_grad():
            target = self.teacher(images)
        self._update((1 - F.cosine_similarity(embedding, target)).mean())

    def in_autocast(self, images: Tensor) -> None:
        """Run a step with the teacher in an autocast."""
        embedding = self.student(images)
        with torch.no_grad(), torch.autocast(images.device.type, self.dtype):
            target = self.teacher(images).float()
        self._update((1 - F.cosine_similarity(embedding, target)).mean())

    def alone(self, images: Tensor) -> None:
        self._update(self.student(images).pow(2).mean())

    def _update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # last, since peak_bytes misses frees of earlier allocations


class ByRecipe(ByHand):
    def __init__(self, student: nn.Module, teacher: nn.Module, options: dict[str, Any]) -> None:
        super().__init__(student, teacher)
        run = Teacher(teacher, **options)
        self.run = TeacherSession(run)
        self.kd = Distiller(student, run, ["fcd"])

    def step(self, images: Tensor) -> None:
        self.student(images)
        labels = images.new_zeros(len(images), dtype=torch.long)
        self._update(self.kd(images, labels)["fcd"])


def measure(options: argparse.Namespace, name: str, batch_size: int) -> dict[str, Any]:
    """Measure one teacher. name: its backbone, or STAND_IN."""
    device = options.device
    torch.manual_seed(0)
    nets = Networks(options.student, name, device)
    images = torch.rand(batch_size, 3, 112, 112, device=device) * 2 - 1
    settle(nets.teacher, images)
    teacher = nets.teacher.eval().requires_grad_(False)
    student = nets.student.train()
    half = "float16" if nets.own_autocast else "bfloat16"
    hand = ByHand(copy.deepcopy(student), teacher)
    by_autocast = ByHand(copy.deepcopy(student), nets.half(), HALF[half])
    works: dict[str, Work] = {"by hand": partial(hand.step, images)}
    works[f"by hand, {half}"] = partial(by_autocast.in_autocast, images)
    works["student alone"] = partial(hand.alone, images)
    agreement: dict[str, Any] = {}
    with torch.no_grad():
        exact = teacher(images)
    for run in options.runs or nets.runs():
        own = copy.deepcopy(teacher) if run.startswith("float32") else nets.half()
        recipe = ByRecipe(copy.deepcopy(student), own, RUNS[run])
        works[f"kdhooks, {run}"] = partial(recipe.step, images)
        works[f"teacher alone, {run}"] = partial(recipe.run, images)
        near = F.cosine_similarity(recipe.run(images).embedding, exact)
        agreement[run] = {"least_cosine": near.min().item(), "mean_cosine": near.mean().item()}
    for work in works.values():
        for _ in range(3):  # the first calls compile, record CUDA graphs and choose algorithms
            work()
    ways = compared(in_turns(works, options.turns, device), batch_size)
    for way, work in works.items():
        ways[way]["peak_bytes"] = peak_bytes(work, device)
    return {"teacher": name, "batch_size": batch_size, "agreement": agreement, "ways": ways}


def compared(seconds: Mapping[str, Times], batch_size: int) -> dict[str, dict[str, Any]]:
    """Return summaries, images per second, and kdhooks' ratios to student and teacher alone."""
    ways: dict[str, dict[str, Any]] = summaries(seconds)
    for way, found in seconds.items():
        ways[way] |= spreads("images_a_second", batch_size / found)
        if way.startswith("kdhooks, "):
            teacher = seconds[way.replace("kdhooks", "teacher alone")]
            ways[way] |= spreads("of_both_alone", found / (seconds["student alone"] + teacher))
    return ways


def lines(one: Mapping[str, Any], kind: str) -> list[str]:
    found = []
    for way, row in one["ways"].items():
        cells = [f"{told(row[f'{kind}_ratio'], 3)} of by hand"]
        if f"{kind}_of_both_alone" in row:
            cells.append(f"{told(row[f'{kind}_of_both_alone'], 3)} of both alone")
        cells.append(f"{row[f'{kind}_images_a_second']['median']:.1f} images a second")
        cells.append(f"{row['peak_bytes'] / 1e6:.0f} MB at its peak")
        found.append(f"{one['teacher']}, {one['batch_size']} images, {way}: {'; '.join(cells)}")
    return found


def picture(measured: Sequence[Mapping[str, Any]], kind: str) -> Figure:
    """Draw a panel for each teacher, with a bar for each batch size."""
    groups: dict[str, dict[str, Any]] = {}
    for one in measured:
        ratios = {way: row[f"{kind}_ratio"] for way, row in one["ways"].items()}
        groups.setdefault(one["teacher"], {})[f"{one['batch_size']} images"] = ratios
    height = 1.5 + 0.2 * len(measured[0]["ways"]) * (1 + len(groups[measured[0]["teacher"]]))
    figure = Figure(figsize=(4 + 4 * len(groups), height), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (teacher, sizes) in zip(panels, groups.items(), strict=True):
        bars(axes, sizes)
        axes.axvline(1, color="k", linewidth=0.8)
        axes.set(title=teacher, xlabel=f"{kind} time, of the loop by hand")
    panels[0].legend()
    return figure


def main() -> None:
    parser = command("teacher_run", __doc__, turns=7)
    add = parser.add_argument
    add("--arcface-torch", help="the folder recognition/arcface_torch of a checkout")
    add("--student", default="mbf", help="a backbone of arcface_torch; default: %(default)s")
    add("--teacher", nargs="+", default=["r50"], help="backbones to measure; default: %(default)s")
    add("--runs", nargs="+", choices=list(RUNS), help="default: all that differ on this device")
    add(
        "--batch-size",
        type=at_least(1),
        nargs="+",
        default=[16],
        help="batch sizes to measure; default: %(default)s",
    )
    options = start(parser)
    if options.arcface_torch:
        sys.path.insert(0, options.arcface_torch)
    kind = judged_by(options.device)
    measured = []
    for teacher in options.teacher if options.arcface_torch else [STAND_IN]:
        for batch_size in options.batch_size:
            measured.append(measure(options, teacher, batch_size))
            print("\n".join(lines(measured[-1], kind)), flush=True)
            write(options, "teacher_run", {"measured": measured}, picture(measured, kind))


if __name__ == "__main__":
    main()
