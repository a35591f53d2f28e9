"""One step of one training, written in several ways; each computes the same gradient.

The loss: cross entropy of the labels, the mean squared error of three maps, and 1 - cos of the
embeddings. A step is forward, terms and backward; no optimizer, which would be the same for all.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import settle
from kdhooks import Distiller, FeatureTap, Teacher, hookimpl

CLASSES, DIM = 1000, 512
STAGES = tuple(f"stage{number}" for number in range(1, 5))
TAPPED = STAGES[1:]

Step = Callable[[Tensor, Tensor], None]
"""(b 3 h w), (b) -> nothing; the gradients are added to the student's and the head's."""


class Network(nn.Module):
    """Four stages of 3x3 convolutions, and an embedding; with `tells`, it also returns its maps."""

    def __init__(self, width: int, blocks: int, size: int, tells: bool = False) -> None:
        super().__init__()
        self.tells = tells
        inside = 3
        for stage, name in enumerate(STAGES):
            outside = width * 2**stage
            layers: list[nn.Module] = []
            for block in range(blocks):
                conv = nn.Conv2d(inside, outside, 3, 2 - (block > 0), 1, bias=False)
                layers += [conv, nn.BatchNorm2d(outside), nn.ReLU()]
                inside = outside
            self.add_module(name, nn.Sequential(*layers))
        self.embedding = nn.Sequential(
            nn.Flatten(), nn.Linear(inside * (-(-size // 16)) ** 2, DIM), nn.BatchNorm1d(DIM)
        )

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """(b 3 h w) -> (b d), and with `tells` the maps (b k h w) of TAPPED."""
        maps = []
        for name in STAGES:
            images = self.get_submodule(name)(images)
            maps.append(images)
        embedding: Tensor = self.embedding(images)
        return (embedding, maps[1:]) if self.tells else embedding


def material(width: int, blocks: int, size: int) -> tuple[Network, Network]:
    """Return a student, and a teacher with twice its blocks and with batch statistics of noise."""
    torch.manual_seed(0)
    student, teacher = Network(width, blocks, size), Network(width, 2 * blocks, size)
    settle(teacher, torch.rand(16, 3, size, size) * 2 - 1)
    return student, teacher


class Pair:
    """A student in training with its head, and a frozen teacher; each way has copies of its own."""

    def __init__(self, student: Network, teacher: Network, device: torch.device) -> None:
        self.student = copy.deepcopy(student).to(device).train()
        self.teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
        torch.manual_seed(1)
        self.head = nn.Linear(DIM, CLASSES, bias=False).to(device)
        self.trained = [*self.student.parameters(), *self.head.parameters()]

    def task_loss(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b) -> ()."""
        return F.cross_entropy(self.head(embedding), labels)


def cosine_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """(b d), (b d) -> ()."""
    return (1 - (F.normalize(student) * F.normalize(teacher)).sum(dim=1)).mean()


def map_gap(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """[(b k h w)], [(b k h w)] -> ()."""
    gaps = [F.mse_loss(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
    return sum(gaps[1:], start=gaps[0])


def alone(pair: Pair) -> Step:
    """The student without a teacher."""

    def step(images: Tensor, labels: Tensor) -> None:
        pair.task_loss(pair.student(images), labels).backward()

    return step


def telling(pair: Pair) -> Step:
    """Models that return their maps need no hooks: this is the baseline without overhead."""
    pair.student.tells = pair.teacher.tells = True

    def step(images: Tensor, labels: Tensor) -> None:
        embedding, maps = pair.student(images)
        with torch.no_grad():
            wanted, wanted_maps = pair.teacher(images)
        loss = pair.task_loss(embedding, labels)
        loss = loss + map_gap(maps, wanted_maps) + cosine_gap(embedding, wanted)
        loss.backward()

    return step


def by_hand(pair: Pair) -> Step:
    """A hook on each module stores its output in a dict, without any check."""
    seen: dict[tuple[str, str], Tensor] = {}

    def keep(side: str, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[side, name] = output

        return hook

    for side, model in (("student", pair.student), ("teacher", pair.teacher)):
        for name in (*TAPPED, ""):
            model.get_submodule(name).register_forward_hook(keep(side, name))

    def step(images: Tensor, labels: Tensor) -> None:
        embedding = pair.student(images)
        with torch.no_grad():
            pair.teacher(images)
        loss = pair.task_loss(embedding, labels)
        maps = [[seen[side, name] for name in TAPPED] for side in ("student", "teacher")]
        loss = loss + map_gap(*maps) + cosine_gap(seen["student", ""], seen["teacher", ""])
        seen.clear()
        loss.backward()

    return step


class MapGap(nn.Module):
    def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        return map_gap(student, teacher)


class Maps:
    @hookimpl
    def feature_tap(self) -> FeatureTap:
        return FeatureTap("maps", MapGap(), student=TAPPED, teacher=TAPPED)


def distilled(pair: Pair, size: int) -> tuple[Step, Distiller]:
    """The loop of README.md."""
    kd = Distiller(
        pair.student,
        Teacher(pair.teacher),
        [Maps(), {"name": "fcd", "weight": 1.0}],
        input_shape=(3, size, size),
    )

    def step(images: Tensor, labels: Tensor) -> None:
        task_loss = pair.task_loss(pair.student(images), labels)
        loss = sum(kd(images, labels).values(), start=task_loss)
        loss.backward()

    return step, kd
