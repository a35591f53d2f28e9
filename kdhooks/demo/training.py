"""Students that start equal and see the same images: by labels alone, or by a method as well."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kdhooks.demo.network import STAGES, SmallFaceNet
from kdhooks.distiller import Distiller
from kdhooks.shards import ClassShard
from kdhooks.teacher import Teacher

CHUNK = 128


@dataclass(frozen=True)
class Maps:
    """A teacher's features at one stage, of n images: rows (n) of what is stored (m k h w)."""

    stored: NDArray[np.float16]  # a memory map will do
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """Of every student alike."""

    images_seen: int = 18000
    batch: int = 60
    lr: float = 0.1
    weight_decay: float = 5e-4
    margin: float = 0.3
    scale: float = 32.0

    @property
    def steps(self) -> int:
        return self.images_seen // self.batch


@dataclass(frozen=True)
class Row:
    """A line of the table: which methods, and what the student learns from beside them."""

    name: str
    methods: Sequence[object] = ()
    labels: bool = True  # False: the teacher's classifier takes the place of the student's
    blends: bool = True  # False: the photographs and their views alone


@dataclass(frozen=True)
class Lesson:
    """What all students learn from; the teacher has seen every image once."""

    images: Tensor  # (n 3 112 112) uint8
    labels: Tensor  # (n)
    embedding: Tensor  # (n e), the teacher's
    rows: Tensor  # (c e), the class means of these
    photographs: int  # so many of the n come first; the rest are blends
    maps: Mapping[str, Maps] = field(default_factory=dict)


@dataclass
class Trained:
    student: nn.Module
    seconds: float
    losses: list[float] = field(default_factory=list)  # of the labels' loss, or of the method's
    cosines: list[float] = field(default_factory=list)  # of student to teacher, batch mean


class Remembered(nn.Module):
    """A teacher whose outputs are known: of the images that `rows` says come next."""

    def __init__(self, embedding: Tensor, maps: Mapping[str, Maps]) -> None:
        super().__init__()
        self.embedding = embedding
        self.rows = torch.arange(2)
        self.stages = nn.ModuleDict({name: RememberedStage(stage) for name, stage in maps.items()})

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        for stage in self.stages.values():
            stage(self.rows)
        return self.embedding[self.rows]


class RememberedStage(nn.Module):
    def __init__(self, maps: Maps) -> None:
        super().__init__()
        self._maps = maps

    def forward(self, rows: Tensor) -> Tensor:
        """(b) -> (b k h w)."""
        return torch.from_numpy(self._maps.stored[self._maps.rows[rows.numpy()]]).float()


class ArcFaceHead(nn.Module):
    """ArcFace, Deng et al., CVPR 2019, arXiv:1801.07698: the student's own classifier."""

    def __init__(self, dim: int, classes: int, margin: float, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(classes, dim))
        self.margin, self.scale = margin, scale

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b) -> ()."""
        cosine = F.normalize(embedding) @ F.normalize(self.weight).T
        own = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
        turned = torch.cos(torch.acos(own) + self.margin)
        line = own - self.margin * math.sin(math.pi - self.margin)
        own = torch.where(own > math.cos(math.pi - self.margin), turned, line)
        return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], own), labels)


def train(
    lesson: Lesson,
    row: Row,
    settings: Settings,
    seed: int,
    progress: Callable[[float], None] = lambda loss: None,
) -> Trained:
    """One student; progress is told the loss after each step."""
    torch.manual_seed(seed)
    student = SmallFaceNet(lesson.embedding.shape[1]).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = ArcFaceHead(lesson.embedding.shape[1], len(lesson.rows), settings.margin, settings.scale)
    remembered = Remembered(lesson.embedding, lesson.maps)
    groups: list[dict[str, object]] = [{"params": [*student.parameters(), *head.parameters()]}]
    kd = None
    if row.methods:
        kd = Distiller(
            student,
            Teacher(remembered, classifier=lesson.rows),
            row.methods,
            head=ClassShard(head.weight, 0, len(lesson.rows)),
            student_stages=STAGES[-len(lesson.maps) :] if lesson.maps else (),
            teacher_stages=[f"stages.{name}" for name in lesson.maps],
        )
        groups += kd.parameter_groups(settings.weight_decay)
    optimizer = torch.optim.SGD(
        groups, settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    trained = Trained(student, 0.0)
    started = time.perf_counter()
    seen = len(lesson.labels) if row.blends else lesson.photographs
    for rows in _batches(seen, settings.batch, settings.steps, seed):
        remembered.rows = rows
        images, labels = as_input(lesson.images[rows]), lesson.labels[rows]
        embedding = student(images)
        task = head(embedding, labels) * float(row.labels)
        terms = kd(images, labels) if kd else {}
        loss = torch.stack([task, *terms.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        cosine = F.cosine_similarity(embedding.detach(), lesson.embedding[rows]).mean()
        trained.losses.append(float(loss.detach()))
        trained.cosines.append(float(cosine))
        progress(trained.losses[-1])
    trained.seconds = time.perf_counter() - started
    if kd:
        kd.remove()
    student.eval()
    return trained


def _batches(images: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Every image once before any comes again, in an order drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps * batch / images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(rounds)])
    return list(order[: steps * batch].split(batch))


def as_input(images: Tensor) -> Tensor:
    """(b 3 h w) uint8 -> (b 3 h w) in [-1, 1], as the trainers give it."""
    return ((images.float() - 127.5) / 127.5).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def embed(model: Callable[[Tensor], Tensor], images: Tensor, chunk: int = CHUNK) -> Tensor:
    """(n 3 112 112) uint8 -> (n d)."""
    return torch.cat([model(as_input(some)) for some in images.split(chunk)])
