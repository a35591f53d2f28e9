"""What each method holds, saves and sends where there are two million classes.

    python -m benchmarks.scale --out docs/results
    python -m benchmarks.scale --check --out docs/results

One step of each method is counted in real gloo processes: bytes that a rank holds for the method,
bytes of its part of a checkpoint, bytes that it sends in a step, and multiplications of matrices in
a step, forward and backward. All four grow with the classes along a straight line, which two small
numbers of classes give; the tables are that line at the classes asked for. --check also counts
20,000 and 200,000 classes on 1, 2 and 4 ranks, and compares them with their lines.
Writes scale.json and scale.md.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import command, start, write
from benchmarks.measuring import peak_bytes
from kdhooks import Distiller, Teacher
from kdhooks.arguments import at_least
from kdhooks.classes.per_class import PerClass
from kdhooks.classes.rows import Rows
from kdhooks.classes.splits import ClassSplit
from kdhooks.evaluation.tables import markdown
from kdhooks_plugins import coupleface
from kdhooks_plugins._neighbour_files import keep, made
from kdhooks_plugins.neighbours import Mined, digests

Counts: TypeAlias = Mapping[str, float]

DIM, BATCH, SIDE = 512, 128, 14
METHODS: dict[str, list[dict[str, Any]]] = {
    "fcd": [{"name": "fcd"}],
    "cc": [{"name": "cc"}],
    "sp": [{"name": "sp"}],
    "ekd": [{"name": "ekd"}],
    "coupleface": [{"name": "coupleface"}],
    "coupleface, bank": [{"name": "coupleface", "relations": "bank"}],
    "icdface": [{"name": "icdface"}],
    "adadistill": [{"name": "adadistill"}],
    "margindistillation": [{"name": "margindistillation"}],
    "proxylesskd": [{"name": "proxylesskd", "head": "own"}],
    "thkd": [{"name": "thkd"}],
    "kd": [{"name": "kd"}],
    "gkd": [{"name": "gkd"}],
}
PARTS = ("coupleface", "icdface", "proxylesskd", "thkd", "kd")
TOGETHER = " + ".join(PARTS)
METHODS[TOGETHER] = [method for name in PARTS for method in METHODS[name]]
ROUNDED = ("coupleface", "margindistillation", "proxylesskd", "thkd", "kd", "gkd")
WHOLE, HALF = {"sharded": False}, {"table_dtype": "float16"}
UNITS = {"held": "MB", "saved": "MB", "sent": "MB", "multiplications": "10⁹"}
LINE = (1600, 3200)  # classes
CHECKED, CHECKED_RANKS = (20_000, 200_000), (1, 2, 4)


class Run(NamedTuple):
    """What is counted: one step of methods, on some ranks."""

    method: str
    classes: int
    options: tuple[tuple[str, Any], ...] = ()  # of the Distiller


# --- one step ----------------------------------------------------------------------------------


class Embeds(nn.Module):
    """(b 3 h w) -> (b 512), without a matrix product."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :DIM] * self.factor


class MadeUpRows(Rows):
    """Each rank makes its own."""

    def __init__(self, total: int) -> None:
        self.total, self.dim, self.backbone = total, DIM, {}

    def slice(self, start: int, stop: int) -> Tensor:
        generator = torch.Generator().manual_seed(start)
        return torch.randn(max(stop - start, 0), DIM, generator=generator)


def any_neighbours(rows: Rows, k: int, max_sim: float | None, *, own: slice) -> Mined:
    """What is counted does not depend on which they are."""
    number = torch.arange(own.start, own.stop)[:, None]
    return Mined(((number + torch.arange(1, k + 1)) % rows.total).int(), 0)


@dataclass(frozen=True)
class Lesson:
    """A student, and what a step of it trains by."""

    kd: Distiller
    student: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor

    def backward(self) -> Tensor:
        """The loss of a step, whose gradients are left."""
        self.student(self.images)
        total = sum(self.kd(self.images, self.labels).values())
        assert isinstance(total, Tensor)
        total.backward()
        return total.detach()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def lesson(run: Run) -> Iterator[Lesson]:
    """On images whose embeddings are near the rows of their classes."""
    torch.manual_seed(0)
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    rows, student = MadeUpRows(run.classes), Embeds(torch.rand(DIM) + 0.5)
    split = ClassSplit.even(run.classes, group)
    head = None
    if any(method["name"] in ("kd", "gkd") for method in METHODS[run.method]):
        head = split.shard(nn.Parameter(rows.slice(split.start, split.stop)))
    trained = [*student.parameters(), *([head.weight] if head else [])]
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH)
    images.flatten(1)[:, :DIM] += rows.slice(0, BATCH)
    with (
        mock.patch.object(coupleface, "nearest_classes", any_neighbours),
        mock.patch("kdhooks.distiller.check_class_order"),
        Distiller(
            student,
            Teacher(Embeds(torch.ones(DIM)), classifier=rows),
            METHODS[run.method],
            head=head,
            input_shape=(3, SIDE, SIDE),
            log_teacher_accuracy=0,
            **dict(run.options),
        ) as kd,
    ):
        groups = [{"params": trained}, *kd.parameter_groups(0.0)]
        yield Lesson(kd, student, torch.optim.SGD(groups, lr=1e-3), images, labels)


def count(run: Run) -> Counts:
    """Of this rank."""
    with lesson(run) as one:
        one.step()  # the first one looks at more
        with sent_bytes() as sent, FlopCounterMode(display=False) as operations:
            one.step()
        kd = one.kd
        tables = [m.tables() for m in kd.modules() if isinstance(m, PerClass)]
        tensors = *kd.parameters(), *kd.buffers(), *itertools.chain(*tables)
        held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        return {
            "held": sum(held.values()),
            "saved": sum(tensor.nbytes for tensor in kd.state_dict().values()),
            "sent": sum(sent),
            "multiplications": operations.get_total_flops() // 2,
        }


def difference(run: Run) -> Counts:
    """What frozen tables in float16 change of a step, as shares."""
    found = []
    for options in ((), tuple(HALF.items())):
        with lesson(run._replace(options=options)) as one:
            loss = one.backward()
            (factor,) = one.student.parameters()
            assert factor.grad is not None
            found.append((loss, factor.grad))
    (loss, gradient), (rounded, other) = found
    return {
        "loss": float((rounded - loss).abs() / loss.abs()),
        "gradient": float((other - gradient).norm() / gradient.norm()),
    }


@contextmanager
def sent_bytes() -> Iterator[list[float]]:
    """Those of each collective inside, sent by one rank, if the tensors go round in a ring."""
    found: list[float] = []
    size = dist.get_world_size()

    def counted(name: str, place: int, factor: float) -> Any:
        collective: Callable[..., object] = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> object:
            found.append(args[place].nbytes * factor)
            return collective(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    share = (size - 1) / size
    with counted("all_reduce", 0, 2 * share), counted("all_gather", 1, size - 1):
        yield found


# --- the start ---------------------------------------------------------------------------------


def first_step(run: Run) -> Counts:
    """From the files of class rows and neighbours to the end of the first step, on this rank."""
    folder = Path(run.method)
    coupled = {"name": "coupleface", "neighbours": folder / "neighbours"}
    student, images = Embeds(torch.rand(DIM) + 0.5), torch.randn(BATCH, 3, SIDE, SIDE)
    labels = torch.arange(BATCH)
    images.flatten(1)[:, :DIM] += MadeUpRows(BATCH).slice(0, BATCH)  # those of the file begin so
    source = folder / "checkpoint_gpu_*.pt"

    def begin(classifier: Path | Rows) -> None:
        teacher = Teacher(Embeds(torch.ones(DIM)), classifier=classifier)
        methods = [coupled, {"name": "proxylesskd", "head": "own"}]
        with Distiller(student, teacher, methods, input_shape=(3, SIDE, SIDE)) as kd:
            student(images)
            kd(images, labels)

    start = time.perf_counter()
    begin(source)
    seconds, rows = time.perf_counter() - start, Rows.open(source)  # mapped files are not counted
    peak = peak_bytes(partial(begin, rows), torch.device("cpu"))
    kept = 4 * (DIM + DIM + 100) * run.classes / dist.get_world_size()
    return {"seconds": seconds, "peak": peak / kept}


def write_material(folder: Path, classes: int) -> None:
    """Four shards of class rows, and neighbours of them."""
    for rank, part in enumerate(MadeUpRows(classes).slice(0, classes).chunk(4)):
        torch.save({"weight": part.clone()}, folder / f"checkpoint_gpu_{rank}.pt")
    rows = Rows.open(folder / "checkpoint_gpu_*.pt")
    state = {"rows": digests(rows), "classes": classes, "k": 100, "max_sim": None}
    state |= {"done": classes, "passed_over": 0}
    index = made(folder / "neighbours", state)
    index[:] = any_neighbours(rows, 100, None, own=slice(0, classes)).index.numpy()
    keep(folder / "neighbours", index, state)


def starts(classes: int) -> dict[int, Counts]:
    with tempfile.TemporaryDirectory() as folder:
        write_material(Path(folder), classes)
        run = Run(folder, classes)
        return {size: on_ranks(size, [run], first_step)[0] for size in CHECKED_RANKS}


# --- processes ---------------------------------------------------------------------------------


def on_ranks(
    size: int, runs: Sequence[Run], measure: Callable[[Run], Counts] = count
) -> list[Counts]:
    """Of the first of so many ranks, whose split is even."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_main, (size, list(runs), measure, folder), nprocs=size)
        found: list[Counts] = torch.load(Path(folder) / "counts.pt")
    return found


def _main(
    rank: int, size: int, runs: Sequence[Run], measure: Callable[[Run], Counts], folder: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=30),
    )
    found = []
    for run in runs:
        found.append(measure(run))
        if rank == 0:
            print(f"{size} ranks, {run.classes:,} classes, {run.method}", flush=True)
    if rank == 0:
        torch.save(found, Path(folder) / "counts.pt")
    dist.barrier()
    dist.destroy_process_group()


class Line(NamedTuple):
    """A count as it grows with the classes."""

    start: float
    slope: float

    def at(self, classes: int) -> float:
        return self.start + self.slope * classes


def lines(
    size: int, runs: Sequence[tuple[str, tuple[tuple[str, Any], ...]]]
) -> list[dict[str, Line]]:
    """Of each method with its options."""
    both = [[Run(method, classes, options) for method, options in runs] for classes in LINE]
    first, second = (on_ranks(size, part) for part in both)
    found = []
    for low, high in zip(first, second, strict=True):
        slopes = {what: (high[what] - low[what]) / (LINE[1] - LINE[0]) for what in UNITS}
        found.append(
            {what: Line(low[what] - slopes[what] * LINE[0], slopes[what]) for what in UNITS}
        )
    return found


# --- the tables --------------------------------------------------------------------------------


def shown(what: str, value: float) -> str:
    value /= 1e6 if UNITS[what] == "MB" else 1e9
    return "0" if value == 0 else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def table(of_ranks: Mapping[int, Mapping[str, Mapping[str, Line]]], classes: int) -> str:
    head = ["method"]
    head += [f"{what}, {UNITS[what]}, {size} ranks" for what in UNITS for size in of_ranks]
    rows = [head]
    for method in next(iter(of_ranks.values())):
        cells = [
            shown(what, of_ranks[size][method][what].at(classes))
            for what in UNITS
            for size in of_ranks
        ]
        rows.append([method, *cells])
    return markdown(rows, texts=1)


def main() -> None:
    parser = command("scale", __doc__, turns=1)
    add = parser.add_argument
    add("--classes", type=at_least(100), nargs="+", default=[2_000_000, 10_000_000])
    add("--ranks", type=at_least(1), nargs="+", default=[1, 8])
    add("--check", action="store_true", help="compare real runs with the lines")
    options = start(parser)
    found = {size: forms(size) for size in options.ranks}
    runs = [Run(method, CHECKED[0]) for method in ROUNDED]
    errors: dict[str, Counts] = dict(zip(ROUNDED, on_ranks(1, runs, difference), strict=True))
    started = starts(CHECKED[1])
    checks = check() if options.check else []
    record = {"lines": found, "float16": errors, "starts": started, "checks": checks}
    write(options, "scale", record)
    text = page(options, found, errors, started, checks)
    (options.out / "scale.md").write_text(text, encoding="utf-8")


def forms(size: int) -> dict[str, dict[str, Line]]:
    """Each method; and those with tables of their own with whole and with half-precision ones."""
    asked: list[tuple[str, tuple[tuple[str, Any], ...]]] = [(name, ()) for name in METHODS]
    names = list(METHODS)
    for form, option in (("whole tables", WHOLE), ("float16", HALF)):
        for method in ("coupleface", "coupleface, bank", "icdface", "proxylesskd"):
            if form == "float16" and method in ("coupleface, bank", "icdface"):
                continue  # what they hold changes in the training
            asked.append((method, tuple(option.items())))
            names.append(f"{method}, {form}")
    return dict(zip(names, lines(size, asked), strict=True))


def check() -> list[dict[str, Any]]:
    """Real runs, beside what their lines say."""
    found = []
    for size in CHECKED_RANKS:
        expected = lines(size, [(method, ()) for method in METHODS])
        for classes in CHECKED:
            real = on_ranks(size, [Run(method, classes) for method in METHODS])
            for method, line, counts in zip(METHODS, expected, real, strict=True):
                ratios = {
                    what: counts[what] / line[what].at(classes) if counts[what] else 1.0
                    for what in UNITS
                }
                found.append({"ranks": size, "classes": classes, "method": method, **ratios})
    return found


def page(
    options: argparse.Namespace,
    found: Mapping[int, Mapping[str, Mapping[str, Line]]],
    errors: Mapping[str, Counts],
    started: Mapping[int, Counts],
    checks: Sequence[Mapping[str, Any]],
) -> str:
    parts = [
        "# Bytes and multiplications at scale",
        f"`python -m benchmarks.scale{' --check' if checks else ''}`; {DIM} dimensions, {BATCH} "
        "images on each rank. *Held* is what a rank keeps for a method on its device, *saved* its "
        "part of a checkpoint, *sent* what it sends in a step if collectives go round in a ring, "
        "and *multiplications* are those of matrix products in one step. The student's own "
        "classifier, which kd and gkd compare, is the trainer's, and not in the bytes. Methods on "
        "feature maps keep nothing of classes. rkd keeps nothing either, and is left out: its "
        "angles take 6.4 · 10⁹ multiplications for 128 images, 8 times as many for twice the "
        "images, and so 3,300 · 10⁹ for those of 8 ranks.",
    ]
    for classes in options.classes:
        parts += [f"## {classes:,} classes", table(found, classes)]
    lines = [[name, f"{one['loss']:.1e}", f"{one['gradient']:.1e}"] for name, one in errors.items()]
    parts += [
        "## Class rows in float16",
        f'What `table_dtype = "float16"` changes in a step with {CHECKED[0]:,} classes: the loss, '
        "and the gradient by the student's only parameter, as shares of these.",
        markdown([["method", "loss", "gradient"], *lines], texts=1),
        "## The start",
        f"From files of {CHECKED[1]:,} class rows and their neighbours to the end of the first "
        "step, with `coupleface` and `proxylesskd`, on one machine whose processors the ranks "
        "share: seconds, and the most bytes that a rank held, as multiples of the tables that it "
        "keeps.",
        markdown(
            [
                ["ranks", "seconds", "of the tables"],
                *(
                    [str(size), f"{one['seconds']:.1f}", f"{one['peak']:.2f}"]
                    for size, one in started.items()
                ),
            ],
            texts=0,
        ),
    ]
    if checks:
        worst = {what: max(abs(one[what] - 1) for one in checks) for what in UNITS}
        said = ", ".join(f"{what} {gap:.1e}" for what, gap in worst.items())
        parts.append(
            f"The numbers are straight lines through runs with {LINE[0]:,} and {LINE[1]:,} "
            f"classes. Runs of every method with {CHECKED[0]:,} and {CHECKED[1]:,} classes on 1, 2 "
            f"and 4 ranks differ from their lines by these shares at most: {said}."
        )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
