"""Declare once; then, each step: taps -> teacher -> losses."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdhooks.asking import (
    Declarations,
    check_head,
    own_parameters,
    probe_student,
    probe_teacher,
)
from kdhooks.checks import Finite, check_class_order, check_shapes, check_teacher, check_terms
from kdhooks.classes.rows import Rows
from kdhooks.classes.shards import ClassShard, world
from kdhooks.declarations import (
    ClassifierShare,
    FeatureTap,
    Model,
    ParameterTap,
    Step,
    Tap,
    check_weight,
)
from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.guards import OptimizerGuard, check_batch, check_range, checked_labels
from kdhooks.replicas import Replicas
from kdhooks.taps import StudentTaps, unwrap
from kdhooks.teacher.teacher import Begun, Teacher, TeacherOutput


class Distiller(nn.Module):
    """The losses of one or more methods between a student in training and a frozen teacher.

    It owns the losses, not the models: `parameters()` is what must be optimised besides the
    student; `state_dict()` holds the losses' parameters and state, and the step, no teacher.

        with Distiller(student, teacher, ["fcd"]) as kd:
            for images, labels in loader:
                task_loss = criterion(student(images), labels)
                loss = sum(kd(images, labels).values(), start=task_loss)
    """

    teacher_rows: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | Callable[[Tensor], Tensor],
        methods: Sequence[object],
        *,
        student_embedding: str = "",
        run_student: Callable[[Tensor], object] | None = None,
        student_stages: Sequence[str] | None = None,
        teacher_stages: Sequence[str] | None = None,
        head: ClassShard | None = None,
        input_shape: tuple[int, int, int] = (3, 112, 112),
        plugins: Sequence[object] = (),
        seed: int = 0,
        nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        """
        methods: names, tables {"name": …, options} or objects; their terms keep this order.
        student_embedding: path of the submodule that puts out (b d); "" is the model's output.
        run_student: a forward on images (b 3 h w) alone, where `student(images)` is not one.
        head: this rank's shard of the student's own classifier, for methods that compare logits;
            the teacher's rows are split as it is.
        plugins: objects that answer `model_stages`.
        seed: of the losses' initial weights; the global generators are left as they were.
        nonfinite: what to do where a term or the teacher's embedding is not finite. "raise": the
            next step raises, so that the device need not be waited for; "skip": the step goes on
            without any term, on all ranks, for which it waits.
        """
        super().__init__()
        student = unwrap(student)
        self._teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self._embedding = student_embedding
        self._head = head
        self._checked = False
        self._student = StudentTaps(nn.Identity(), ())  # until `_connect`
        self._replicas: Replicas | None = None
        self._guard: OptimizerGuard | None = None
        self._finite = Finite(nonfinite)
        self._split: tuple[int, int, dist.ProcessGroup | None] | None = None
        self.accumulation = 1  # forwards per optimiser step, where the host sums their gradients
        self.metrics: dict[str, Tensor] = {}  # of the last step, detached
        first = next(student.parameters())
        with undisturbed_generators(seed, first.device):
            # Drawn on the processor, so that a seed gives the same losses on every device.
            images = (torch.rand(2, *input_shape, dtype=first.dtype) * 2 - 1).to(first.device)
            asked = Declarations(methods, plugins)
            stages = asked.stages(student, student_stages)
            ours = probe_student(student, student_embedding, stages, images, run_student)
            theirs = probe_teacher(
                self._teacher, asked.stages(self._teacher.module, teacher_stages), images
            )
            self.taps = asked.taps(ours, theirs)
            self.adapter = self._teacher.adapter = asked.teacher_adapter(theirs)
        self.losses = nn.ModuleDict({tap.name: tap.loss for tap in self.taps})
        self._needs_teacher = _need_teacher(self.taps)
        self._stages = {stage.path: stage.shape for stage in ours.stages}
        check_head(self.taps, ours, head)
        self._take_rows(theirs)
        try:
            self._connect(ours)
            self._teacher.start_cache(images)
        except BaseException:
            self.remove()
            raise
        self.to(first.device)
        if any(p.requires_grad for p in self.parameters()):
            self._guard = OptimizerGuard(student, self)
        if world() is not None:  # or in the first step, if the ranks meet later
            self._replicas = Replicas(self)

    # --- one step ----------------------------------------------------------------------------

    @property
    def pending(self) -> Tensor | None:
        """The images of the student's last forward in training, until their losses are taken."""
        return self._student.images

    @property
    def fired(self) -> bool:
        """Whether the student's hooks ever ran."""
        return self._student.fired

    @property
    def step(self) -> int:
        """How many steps were taken; schedules count in these."""
        return self._finite.step

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(b 3 h w), (b) -> each term's loss (), times its weight; after the student's forward.

        images are what the teacher sees: as a rule those that the student saw.
        """
        seen, begun = self._student.images, self._student.begun
        features = self._student.take()
        labels = checked_labels(labels, images)
        self._finite.check()
        if not self._checked:
            check_shapes(features, self._stages)
        if self._replicas is None:
            self._replicas = Replicas(self)
        if self._guard is not None and self._guard.judged:
            self._guard.remove()
            self._guard = None
        classes = self._finite.classes
        beyond = check_range(labels, classes) if classes else None
        teacher = self._teach(images, labels, begun)
        check_batch(images, features[self._embedding], teacher.embedding if teacher else None)
        step = Step(
            student=features[self._embedding],
            student_features=features,
            teacher=teacher.embedding if teacher else None,
            teacher_features=teacher.features if teacher else {},
            labels=labels,
            parameters=self._own,
            classifier=self._classifier(),
            head=self._head,
        )
        unchecked = None if teacher is None or teacher.finite else teacher.embedding
        if not self._finite.usable(step, unchecked):
            return self._nothing(features)
        values: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind)  # to ask is cheaper than to switch it off
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            for tap, loss in zip(self.taps, self.losses.values(), strict=True):
                value = self._value(tap, loss, step)
                values[tap.name] = self.metrics[tap.name]
                weighted[tap.name] = value * self.weight(tap)
        if not self._checked:
            check_terms(values)
            self._checked = True
            if self._needs_teacher and seen is images:
                self._student.on_enter = self._teacher.begin  # from now on
        if not self._finite.note(values, step, unchecked, beyond):
            return self._nothing(features)
        return weighted

    def _nothing(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms of a step that goes on without them: 0, with a gradient of 0."""
        self.metrics.clear()
        zero = torch.stack([tensor.sum() * 0 for tensor in features.values()]).sum()
        return {tap.name: zero for tap in self.taps}

    def weight(self, tap: Tap) -> float:
        """A term's factor in the step at hand."""
        factor = tap.weight
        if callable(factor):
            factor = factor(self.step)
            check_weight(f"{tap.name}, step {self.step}", factor)
        return factor / self.accumulation if isinstance(tap, ParameterTap) else factor

    def _teach(self, images: Tensor, labels: Tensor, begun: Begun | None) -> TeacherOutput | None:
        if self._checked and not self._needs_teacher:
            return None
        output = self._teacher(images, begun)
        if not self._checked:
            check_teacher(output, images)
            if self._teacher.classifier is not None:
                check_class_order(self._teacher.classifier, output.embedding, labels)
        return output

    def _value(self, tap: Tap, loss: nn.Module, step: Step) -> Tensor:
        result = loss(*tap.arguments(step))
        value: Tensor = result[0] if isinstance(result, tuple) else result
        notes: dict[str, Tensor] = result[1] if isinstance(result, tuple) else {}
        if value.ndim or not value.requires_grad:
            raise KDHooksError(
                f"{tap.name}: a loss must be a scalar with a gradient; found shape "
                f"{tuple(value.shape)}, requires_grad {value.requires_grad}"
            )
        self.metrics[tap.name] = value.detach()
        for key, note in notes.items():
            self.metrics[f"{tap.name}/{key}"] = note.detach()
        return value

    # --- set-up and end ----------------------------------------------------------------------

    def _take_rows(self, teacher: Model) -> None:
        """This rank's rows of the teacher's classifier, split as the student's own are."""
        rows, head = teacher.classifier, self._head
        if rows is None:
            return
        self._finite.classes = rows.total
        if head is not None and head.total != rows.total:
            raise KDHooksError(
                f"teacher classifier has {rows.total} classes, the trainer {head.total}; they must "
                "be the same classes in the same order"
            )
        if any(isinstance(tap, ClassifierShare) for tap in self.taps):
            start, stop = self._bounds(rows)
            self.register_buffer("teacher_rows", rows.slice(start, stop), persistent=False)
            self._split = start, rows.total, head.group if head else None
            for loss in self.losses.values():
                if begin := getattr(loss, "begin", None):
                    begin(self._classifier())

    def _bounds(self, rows: Rows) -> tuple[int, int]:
        """Of this rank's rows."""
        if self._head is None:
            return 0, rows.total
        return self._head.offset, self._head.offset + len(self._head.weight)

    def _classifier(self) -> ClassShard | None:
        if self._split is None:
            return None
        return ClassShard(self.teacher_rows, *self._split)

    def _connect(self, student: Model) -> None:
        """Hook the paths that the taps name, on both sides."""
        assert student.module is not None
        own = [tap for tap in self.taps if isinstance(tap, ParameterTap)]
        self._own = {tap.name: own_parameters(student, tap) for tap in own}
        features = [tap for tap in self.taps if isinstance(tap, FeatureTap)]
        self._teacher.tap([path for tap in features for path in tap.teacher])
        ours = [path for tap in features for path in tap.student]
        self._student = StudentTaps(student.module, [self._embedding, *ours])

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The losses' parameters for an optimizer; no decay for those that a loss says so of.

        A loss, or a module inside it, says so by `no_weight_decay() -> set[str]`: names of its
        parameters, as in timm.
        """
        spared = set[str]()
        for prefix, module in self.named_modules():
            names: Any = getattr(module, "no_weight_decay", None)
            if names is not None:
                spared |= {f"{prefix}.{name}" for name in names()}
        named = dict(self.named_parameters())
        if unknown := spared - named.keys():
            raise KDHooksError(
                f"no_weight_decay names '{min(unknown)}', which is no parameter; "
                f"{near_miss(min(unknown), named)}the losses have: {listed(named)}"
            )
        groups = [
            {
                "params": [p for name, p in named.items() if name not in spared],
                "weight_decay": weight_decay,
            },
            {"params": [named[name] for name in named if name in spared], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def hand_over(self, tap: ClassifierShare) -> Callable[[], Tensor]:
        """For a host whose own head computes this term: reads this rank's teacher rows (c e)."""
        if tap.host_conflict or any(True for _ in tap.loss.parameters()):
            reason = tap.host_conflict or "it has trainable parts of its own"
            raise KDHooksError(f"{tap.name}: the trainer's own head can't compute it; {reason}")
        self.taps = tuple(other for other in self.taps if other is not tap)
        self._needs_teacher = _need_teacher(self.taps)
        del self.losses[tap.name]
        classifier = self._teacher.classifier
        assert classifier is not None
        start, stop = self._bounds(classifier)
        if not any(isinstance(other, ClassifierShare) for other in self.taps):
            del self.teacher_rows
            self._split = None
        return partial(classifier.slice, start, stop)

    @property
    def skipped(self) -> int:
        """Steps that went on without their terms, with nonfinite = "skip"."""
        return self._finite.skipped

    def remove(self) -> None:
        """Take every hook off both models."""
        self._teacher.remove()
        for part in (self._student, self._replicas, self._guard):
            if part is not None:
                part.remove()

    def __enter__(self) -> "Distiller":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self.check_finite()  # of the last step, which no other follows
        finally:
            self.remove()

    def check_finite(self) -> None:
        """Raise where the last step's terms were not finite: before the next, and before a save."""
        self._finite.check()

    def get_extra_state(self) -> Tensor:
        self.check_finite()  # before a checkpoint is written of what it spoilt
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self._finite.step = int(state)


def _need_teacher(taps: Sequence[Tap]) -> bool:
    """False where all losses do without: the teacher then runs in the first step alone."""
    return any(
        tap.needs_teacher if isinstance(tap, ClassifierShare) else True
        for tap in taps
        if not isinstance(tap, ParameterTap)
    )


@contextmanager
def undisturbed_generators(seed: int, device: torch.device) -> Iterator[None]:
    """A seed of our own inside; torch's, numpy's and Python's generators unchanged outside."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
