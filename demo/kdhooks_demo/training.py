"""Trains students, on labels alone or with methods. All start equal and see the same images."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks.teacher.teacher import Teacher
from kdhooks.tensor_files import read_tensors, write_tensors
from kdhooks.views.viewing import viewed
from kdhooks_demo.embedding import as_input, layout
from kdhooks_demo.lesson import Lesson, Remembered
from kdhooks_demo.network import STAGES, ArcFaceHead, SmallFaceNet

PROGRESS = 10  # steps between two reports, since a report waits for the device
SAVES = 10  # of the state of a training


@dataclass(frozen=True)
class Settings:
    """How every student of a table is trained.

    `student` returns a network with the given embedding dimension. `stages` are the paths of its
    features that are compared with the recorded features of the teacher, or of a live teacher.
    """

    images_seen: int = 18000
    batch: int = 60
    lr: float = 0.1
    weight_decay: float = 5e-4
    margin: float = 0.3
    scale: float = 32.0
    adamw: bool = False  # for transformers; SGD with Nesterov's momentum if not
    student: Callable[[int], nn.Module] = SmallFaceNet
    stages: Sequence[str] = STAGES
    view: nn.Module | None = None  # changes the images for the students, not for the teacher

    @property
    def steps(self) -> int:
        return self.images_seen // self.batch


@dataclass(frozen=True)
class Row:
    """A line of the table: its methods, and the share and the images of the labels' loss."""

    name: str
    methods: Sequence[object] = ()
    labels: float = 1.0  # the weight of the labels' loss
    part: str | None = None  # the name of a part of the lesson's images; all of them if None
    together: int = 1  # images of one person that come together, in one half of each batch
    live: bool = False  # the methods change the teacher, so it runs in every step
    teachers: Sequence[int] = ()  # numbers of the lesson's teachers; all of them if empty
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the table's settings, by name


@dataclass
class Trained:
    student: nn.Module
    seconds: float
    losses: list[float] = field(default_factory=list)  # labels' loss plus terms, in each step
    cosines: list[float] = field(default_factory=list)  # of student to teacher, batch mean
    looks: list[Mapping[str, Any]] = field(default_factory=list)  # see `train`


def train(
    lesson: Lesson,
    row: Row,
    settings: Settings,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
    look: Callable[[nn.Module], Mapping[str, float]] | None = None,
    looks: int = 0,
    kept: Path | None = None,
) -> Trained:
    """Train one student on the device of the lesson's images.

    All weights are initialised on the processor, so that a seed means the same on every device.

    progress: called every few steps with the number of new steps and the last loss.
    look: called with the student in eval mode, `looks` times at equal intervals, and at the end.
        Its shares are kept, with `images_seen`, the methods' log of that step, and the `strength`
        and `agreement` of their gradient beside that of the labels' loss.
    kept: a file for the state, which is written SAVES times. If it exists, the training continues
        from it, unless it can't be read. A training that ends removes it.
    """
    settings = replace(settings, **row.changes)
    training = Training(lesson, row, settings, seed)
    again = "the training starts again"
    if kept and kept.is_file() and not loaded(training, kept, "state of a student", again):
        training.remove_hooks()
        training = Training(lesson, row, settings, seed)
    reported = 0
    started = time.perf_counter() - training.seconds
    part = torch.arange(len(lesson.labels)) if row.part is None else lesson.parts[row.part]
    if not len(part):
        raise KDHooksError(f"row '{row.name}' needs {row.part}; found none among the faces")
    batches = _batches(part, settings.batch, settings.steps, seed, training.device)
    if row.together > 1:
        batches = _grouped(batches, part, lesson.labels, row.together, seed)
    for rows in batches[len(training.losses) :]:
        done = len(training.losses) + 1
        due = look is not None and _due(done, looks, settings.steps)
        seen = training.step(rows, compare=due)
        if progress and (done % PROGRESS == 0 or done == settings.steps):
            progress(done - reported, float(training.losses[-1]))
            reported = done
        if look and due:
            paused = time.perf_counter()
            training.looks.append({**seen, **look(training.student.eval())})
            training.student.train()
            started += time.perf_counter() - paused
        if kept is not None and _due(done, SAVES, settings.steps):
            training.seconds = time.perf_counter() - started
            write_tensors(training.state_dict(), kept, "state of a student")
    trained = training.ended()
    # Everything was read, so the device has finished.
    trained.seconds = time.perf_counter() - started
    if kept is not None:
        kept.unlink(missing_ok=True)
    return trained


def loaded(into: "nn.Module | Training", file: Path, subject: str, otherwise: str) -> bool:
    """Load the state in a file, and return whether that was possible; `into` may have changed.

    otherwise: printed with the reason if it was not.
    """
    try:
        into.load_state_dict(cast(Mapping[str, Any], read_tensors(file, subject)))
    except Exception as error:  # torch raises several kinds for files of other contents
        print(f"{error}\n'{file}' is not used; {otherwise}", flush=True)
        return False
    return True


def _due(done: int, times: int, steps: int) -> bool:
    """Whether one of the `times` equal parts of the training ends with this step."""
    return (done - 1) * times // steps < done * times // steps


class Training:
    """A student and everything else that a step changes."""

    def __init__(self, lesson: Lesson, row: Row, settings: Settings, seed: int) -> None:
        torch.manual_seed(seed)
        self._lesson, self._row, self._settings, self._seed = lesson, row, settings, seed
        self.device = lesson.images.device
        dim = lesson.embedding.shape[1]
        self.student = settings.student(dim).train()
        self.student.to(memory_format=layout(self.device))  # type: ignore[call-overload]
        self._head = ArcFaceHead(dim, len(lesson.rows), settings.margin, settings.scale)
        self._remembered = [
            Remembered(part, lesson.maps) for part in _parts(lesson.embedding, lesson, row)
        ]
        self._kd = None
        if row.methods:
            self._kd = _distiller(
                self.student, self._head, self._remembered, lesson, row, settings
            ).to(self.device)
            paths = {path for tap in self._kd.taps for path in tap.teacher_paths}
            for one in self._remembered:
                one.keep(paths)
        self.student.to(self.device)
        # The weight stays the same Parameter, which the methods' shard holds too.
        self._head.to(self.device)
        groups: list[dict[str, object]] = [
            {"params": [*self.student.parameters(), *self._head.parameters()]}
        ]
        groups += self._kd.parameter_groups(settings.weight_decay) if self._kd else []
        self._optimizer = _optimizer(groups, settings)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            settings.lr,
            total_steps=settings.steps,
            pct_start=0.1
            if settings.steps != 10
            else 0.2,  # OneCycleLR divides by pct_start · steps - 1
            cycle_momentum=False,
        )
        self.losses: list[Tensor] = []  # on the device, so that no step waits for it
        self.looks: list[Mapping[str, Any]] = []
        self.seconds = 0.0  # until the state was last written
        self._cosines: list[Tensor] = []

    def step(self, rows: Tensor, compare: bool) -> dict[str, Any]:
        """Train on these images, and return the number of images seen.

        compare: also return the methods' log, and their gradient beside that of the labels' loss.
        """
        lesson = self._lesson
        for one in self._remembered:
            one.rows = rows
        sharp, labels = as_input(lesson.images[rows]), lesson.labels[rows]
        images = sharp
        if self._settings.view is not None:
            images = viewed(self._settings.view, sharp, seed=self._seed, step=len(self.losses))
        embedding = self.student(images)
        task = self._head(embedding, labels) * self._row.labels
        terms = self._kd(images, labels, teacher_images=sharp) if self._kd else {}
        loss = torch.stack([task, *terms.values()]).sum()
        seen: dict[str, Any] = {"images_seen": (len(self.losses) + 1) * self._settings.batch}
        if compare and self._kd:
            if self._row.labels:
                seen |= _compared(task, loss - task, self.student)
            seen["logged"] = {name: float(value) for name, value in self._kd.metrics.items()}
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self._optimizer.step()
        self._schedule.step()
        cosine = F.cosine_similarity(embedding.detach(), lesson.embedding[rows]).mean()
        self.losses.append(loss.detach())
        self._cosines.append(cosine)
        return seen

    def ended(self) -> Trained:
        """Return the student in eval mode, without hooks."""
        losses, cosines = _numbers(self.losses), _numbers(self._cosines)
        self.remove_hooks()
        return Trained(self.student.eval(), 0.0, losses, cosines, self.looks)

    def remove_hooks(self) -> None:
        if self._kd:
            self._kd.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, besides the constructor's arguments."""
        return {
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "losses": _numbers(self.losses),
            "cosines": _numbers(self._cosines),
            "looks": self.looks,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
            "random_on_device": _device_random(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.losses = list(torch.tensor(state["losses"], device=self.device))
        self._cosines = list(torch.tensor(state["cosines"], device=self.device))
        self.looks, self.seconds = list(state["looks"]), state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_on_device"].cpu(), self.device)

    def _stateful(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "student": self.student,
            "head": self._head,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
        }
        return {**parts, "methods": self._kd} if self._kd else parts


def _device_random(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _distiller(
    student: nn.Module,
    head: ArcFaceHead,
    remembered: Sequence[Remembered],
    lesson: Lesson,
    row: Row,
    settings: Settings,
) -> Distiller:
    """The row's methods, with the recorded outputs or the live teacher."""
    live = lesson.teacher if row.live else None
    recorded = [f"stages.{name}" for name in lesson.maps]
    theirs = list(lesson.teacher_stages) if row.live else recorded
    return Distiller(
        student,
        [
            Teacher(one if live is None else live, classifier=rows)
            for one, rows in zip(remembered, _parts(lesson.rows, lesson, row), strict=True)
        ],
        row.methods,
        head=ClassShard(head.weight, 0, len(lesson.rows)),
        student_stages=settings.stages[-len(theirs) :] if theirs else (),
        teacher_stages=theirs,
    )


def _parts(joined: Tensor, lesson: Lesson, row: Row) -> list[Tensor]:
    """(n e) -> [(n e/m)]: the part of each of the row's teachers."""
    parts = joined.chunk(lesson.teachers, dim=1)
    return [parts[number] for number in row.teachers or range(lesson.teachers)]


def _compared(task: Tensor, terms: Tensor, student: nn.Module) -> dict[str, float]:
    """Compare the methods' gradient in the student's parameters with that of the labels' loss.

    strength: the ratio of their norms; agreement: the cosine of the two.
    """
    weights = list(student.parameters())
    gradients = []
    for loss in (task, terms):
        parts = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    labels, theirs = gradients
    return {
        "strength": float(theirs.norm() / labels.norm()),
        "agreement": float(F.cosine_similarity(theirs, labels, dim=0)),
    }


def _optimizer(
    groups: list[dict[str, object]], settings: Settings
) -> torch.optim.SGD | torch.optim.AdamW:
    if settings.adamw:
        return torch.optim.AdamW(groups, settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        groups, settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )


def _numbers(values: list[Tensor]) -> list[float]:
    """[()] -> as many numbers."""
    numbers: list[float] = torch.stack(values).cpu().tolist() if values else []
    return numbers


def _batches(rows: Tensor, batch: int, steps: int, seed: int, device: torch.device) -> list[Tensor]:
    """Batches in a random order by the seed. Every image comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps * batch / len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])
    return list(rows[order[: steps * batch]].to(device).split(batch))


def _grouped(
    batches: list[Tensor], rows: Tensor, labels: Tensor, together: int, seed: int
) -> list[Tensor]:
    """Replace one half of each batch by random people, each with `together` of their images.

    rows: the images to draw from; labels: the people of all images.
    """
    order = labels.cpu()[rows].argsort(stable=True)
    counts = labels.cpu()[rows][order].unique_consecutive(return_counts=True)[1]
    people = [own for own in rows[order].split(counts.tolist()) if len(own) >= together]
    number = len(batches[0]) // 2 // together
    if not 0 < number <= len(people):
        raise KDHooksError(
            f"half of a batch of {len(batches[0])} must hold one or more people with {together} "
            f"images each; found room for {number}, and {len(people)} such people; use another "
            "batch size, or more faces"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        chosen = torch.randperm(len(people), generator=generator)[:number].tolist()
        few = [people[one] for one in chosen]
        return torch.cat(
            [own[torch.randperm(len(own), generator=generator)[:together]] for own in few]
        )

    return [torch.cat([batch[: -number * together], draw().to(batch.device)]) for batch in batches]
