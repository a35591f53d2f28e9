"""Counts of one training step: bytes held, saved and sent, and multiplications.

`count` runs one step of some methods in a process of a group, and `on_ranks` starts such a group.
The student and the teacher compute no matrix product, so that all of them are the methods' own.
"""

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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gloo import gloo_group
from benchmarks.measuring import peak_bytes
from kdhooks import Distiller, Teacher
from kdhooks.classes.per_class import PerClass
from kdhooks.classes.rows import Rows
from kdhooks.classes.splits import ClassSplit
from kdhooks_plugins import coupleface
from kdhooks_plugins._neighbour_files import keep, made
from kdhooks_plugins.neighbours import Mined, digests

Counts: TypeAlias = Mapping[str, float]

DIM, BATCH, SIDE = 512, 128, 14
METHODS: dict[str, list[dict[str, Any]]] = {
    "fcd": [{"name": "fcd"}],
    "cc": [{"name": "cc"}],
    "sp": [{"name": "sp"}],
    "rkd": [{"name": "rkd"}],
    "aird": [{"name": "aird"}],
    "eckd": [{"name": "eckd", "exclusivity_weight": 0.0}],
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
ON_MAPS: dict[str, list[dict[str, Any]]] = {
    "acsr": [{"name": "acsr"}],
    "at": [{"name": "at"}],
    "cakd, without prompts": [{"name": "cakd", "prompts": {"number": 0}}],
    "fitnet": [{"name": "fitnet"}],
    "fskd": [{"name": "fskd"}],
    "reviewkd": [{"name": "reviewkd"}],
}
MAPS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of IResNet's stages
FEW = 8  # images of a count on maps, whose multiplications are in proportion to the images
HALF = {"table_dtype": "float16"}
COUNTED = ("held", "saved", "sent", "multiplications")
LINE = (1600, 3200)  # classes


class Run(NamedTuple):
    """A step to count: its method, its number of classes, and options."""

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


class Stages(nn.Module):
    """(b 3 112 112) -> (b 512), with maps of IResNet's sizes and without a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(channels, side) for channels, side in MAPS)

    def forward(self, images: Tensor) -> Tensor:
        maps = [stage(images) for stage in self.stages]
        embedding: Tensor = maps[-1].mean((2, 3))
        return embedding


class Stage(nn.Module):
    """(b 3 h w) -> (b k side side)."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.factor, self.side = nn.Parameter(torch.rand(channels, 1, 1) + 0.5), side

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        return F.adaptive_avg_pool2d(grey, self.side) * self.factor


class MadeUpRows(Rows):
    """Class rows that are random numbers; each rank draws those of its own classes."""

    def __init__(self, total: int) -> None:
        self.total, self.dim, self.backbone = total, DIM, {}

    def slice(self, start: int, stop: int) -> Tensor:
        generator = torch.Generator().manual_seed(start)
        return torch.randn(max(stop - start, 0), DIM, generator=generator)


def any_neighbours(rows: Rows, k: int, max_sim: float | None, *, own: slice) -> Mined:
    """Neighbours that need no search: the counts do not depend on which classes they are."""
    number = torch.arange(own.start, own.stop)[:, None]
    return Mined(((number + torch.arange(1, k + 1)) % rows.total).int(), 0)


@dataclass(frozen=True)
class Lesson:
    """A student with its optimizer, its batch and its distiller."""

    kd: Distiller
    student: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor

    def backward(self) -> Tensor:
        """Compute the gradients of one step; returns the loss."""
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
    """Create a student, its optimizer and distiller, and images.

    The images have embeddings near the class rows of their labels.
    """
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


@contextmanager
def lesson_on_maps(run: Run) -> Iterator[Lesson]:
    """A lesson of a method on feature maps, with few images."""
    torch.manual_seed(0)
    student, teacher = Stages(), Stages()
    paths = [f"stages.{number}" for number in range(len(MAPS))]
    with Distiller(
        student,
        Teacher(teacher),
        ON_MAPS[run.method],
        student_stages=paths,
        teacher_stages=paths,
    ) as kd:
        groups = [{"params": student.parameters()}, *kd.parameter_groups(0.0)]
        optimizer = torch.optim.SGD(groups, lr=1e-3)
        yield Lesson(kd, student, optimizer, torch.randn(FEW, 3, 112, 112), torch.arange(FEW))


def count(run: Run) -> Counts:
    """Return this rank's counts in the second step."""
    with lesson(run) as one:
        return _counts(one)


def count_on_maps(run: Run) -> Counts:
    """The same for a method on feature maps."""
    with lesson_on_maps(run) as one:
        found = dict(_counts(one))
    found["multiplications"] *= BATCH // FEW
    return found


def _counts(one: Lesson) -> Counts:
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
    """Return how much float16 tables change the loss and its gradient, as ratios."""
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
    """Collect the bytes that a rank sends in each collective call, if these are ring algorithms."""
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
    """Count from reading class rows and neighbours to the end of this rank's first step."""
    folder = Path(run.method)
    coupled = {"name": "coupleface", "neighbours": folder / "neighbours"}
    student, images = Embeds(torch.rand(DIM) + 0.5), torch.randn(BATCH, 3, SIDE, SIDE)
    labels = torch.arange(BATCH)
    # The files start with these rows.
    images.flatten(1)[:, :DIM] += MadeUpRows(BATCH).slice(0, BATCH)
    source = folder / "checkpoint_gpu_*.pt"

    def train(classifier: Path | Rows) -> None:
        teacher = Teacher(Embeds(torch.ones(DIM)), classifier=classifier)
        methods = [coupled, {"name": "proxylesskd", "head": "own"}]
        with Distiller(student, teacher, methods, input_shape=(3, SIDE, SIDE)) as kd:
            student(images)
            kd(images, labels)

    start = time.perf_counter()
    train(source)
    seconds = time.perf_counter() - start
    rows = Rows.open(source)  # mapped outside of `peak_bytes`, which would count the files
    peak = peak_bytes(partial(train, rows), torch.device("cpu"))
    kept = 4 * (DIM + DIM + 100) * run.classes / dist.get_world_size()
    return {"seconds": seconds, "peak": peak / kept}


def write_material(folder: Path, classes: int) -> None:
    """Write four shards of class rows, and a folder of their neighbours."""
    for rank, part in enumerate(MadeUpRows(classes).slice(0, classes).chunk(4)):
        torch.save({"weight": part.clone()}, folder / f"checkpoint_gpu_{rank}.pt")
    rows = Rows.open(folder / "checkpoint_gpu_*.pt")
    state = {"rows": digests(rows), "classes": classes, "k": 100, "max_sim": None}
    state |= {"done": classes, "passed_over": 0}
    index = made(folder / "neighbours", state)
    index[:] = any_neighbours(rows, 100, None, own=slice(0, classes)).index.numpy()
    keep(folder / "neighbours", index, state)


def starts(classes: int, sizes: Sequence[int]) -> dict[int, Counts]:
    with tempfile.TemporaryDirectory() as folder:
        write_material(Path(folder), classes)
        run = Run(folder, classes)
        return {size: on_ranks(size, [run], first_step)[0] for size in sizes}


# --- processes ---------------------------------------------------------------------------------


def on_ranks(
    size: int, runs: Sequence[Run], measure: Callable[[Run], Counts] = count
) -> list[Counts]:
    """Do each run on `size` ranks; return the counts of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_main, (size, list(runs), measure, folder), nprocs=size)
        found: list[Counts] = torch.load(Path(folder) / "counts.pt")
    return found


def _main(
    rank: int, size: int, runs: Sequence[Run], measure: Callable[[Run], Counts], folder: str
) -> None:
    with gloo_group(rank, size, folder, timedelta(minutes=30)):
        found = []
        for run in runs:
            found.append(measure(run))
            if rank == 0:
                print(f"{size} ranks, {run.classes:,} classes, {run.method}", flush=True)
        if rank == 0:
            torch.save(found, Path(folder) / "counts.pt")


class Line(NamedTuple):
    """A count as a function of the number of classes."""

    start: float
    slope: float

    def at(self, classes: int) -> float:
        return self.start + self.slope * classes


def lines(
    size: int, runs: Sequence[tuple[str, tuple[tuple[str, Any], ...]]]
) -> list[dict[str, Line]]:
    """Return the four lines of each method with its options."""
    both = [[Run(method, classes, options) for method, options in runs] for classes in LINE]
    first, second = (on_ranks(size, part) for part in both)
    found = []
    for low, high in zip(first, second, strict=True):
        slopes = {what: (high[what] - low[what]) / (LINE[1] - LINE[0]) for what in COUNTED}
        found.append(
            {what: Line(low[what] - slopes[what] * LINE[0], slopes[what]) for what in COUNTED}
        )
    return found
