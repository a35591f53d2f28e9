"""Computes the losses of the methods in each step: student outputs -> teacher outputs -> losses.

For each batch, `student(images)` runs the hooks of `StudentTaps`, which record the student's
outputs and, from the second step on, let the `TeacherSession` run ahead. `kd(images, labels)` is
`Distiller.forward`: it takes these outputs, gets the teacher's from the session, and calls each
tap's loss on both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdhooks.asking import Declarations
from kdhooks.balance import Balance, Weighted, check_losses, compare, gradient_at
from kdhooks.classes.per_class import is_split, whole_tables
from kdhooks.classes.ranks import answers, failing_together, world
from kdhooks.classes.shards import ClassShard
from kdhooks.classes.splits import ClassTables
from kdhooks.declarations import Step, Tap
from kdhooks.errors import KDHooksError
from kdhooks.finite import Finite, Question, of_embedding, of_terms
from kdhooks.first_step import (
    check_class_order,
    check_shapes,
    check_teacher,
    check_terms,
    tapped_shapes,
)
from kdhooks.generators import undisturbed_generators
from kdhooks.guards import (
    Untouched,
    check_batch,
    check_images,
    check_models,
    check_range,
    check_same_images,
    checked_labels,
    refuse_labelled,
)
from kdhooks.kinds import Bounds, Option
from kdhooks.optimizer_guard import OptimizerGuard
from kdhooks.options import REQUIRED, check_arguments
from kdhooks.parameter_groups import parameter_groups
from kdhooks.paths import unwrap
from kdhooks.replicas import Replicas, own_buffers, refuse_different
from kdhooks.schedules import Scheduled
from kdhooks.student_taps import StudentTaps
from kdhooks.task_weight import TaskWeight
from kdhooks.teacher.fingerprints import weights_of
from kdhooks.teacher.input_transform import check_input
from kdhooks.teacher.session import TeacherOutput
from kdhooks.teacher.sessions import open_session
from kdhooks.teacher.several import Teachers, listed_teachers, one_or_several
from kdhooks.teacher.teacher import Teacher
from kdhooks.teacher_rows import Inherited, check_classes, left_to_host, rows_for
from kdhooks.terms import (
    comparable,
    described,
    named_in_epochs,
    shown_number,
    tapped_parameters,
    value_of,
    varying_numbers,
    weight_at,
    zeros,
)
from kdhooks.views.entrance import Around, Entrance
from kdhooks.views.student_view import StudentView
from kdhooks.views.viewing import Viewing
from kdhooks.zero_gradients import drop_zero_gradients

_ARGUMENTS = {
    "student": Option(nn.Module, REQUIRED),
    "student_embedding": Option(str, ""),
    "run_student": Option(Callable | None, None),
    "student_stages": Option(Sequence[str] | None, None),
    "teacher_stages": Option(Sequence[str] | None, None),
    "head": Option(ClassShard | None, None),
    "host_head": Option(Literal["margin"] | None, None),
    "input_shape": Option(tuple[int, int, int], REQUIRED, bounds=Bounds(least=1)),
    "student_view": Option(nn.Module | None, None),
    "plugins": Option(Sequence[object], ()),
    "labels": Option(bool, True),
    "task_weight": Option(Scheduled, 1.0, bounds=Bounds(least=0)),
    "log_teacher_accuracy": Option(int, 100, bounds=Bounds(least=0)),
    "steps_per_epoch": Option(int | None, None, bounds=Bounds(least=1)),
    "seed": Option(int, 0, bounds=Bounds(least=0, most=2**63 - 1)),
    "nonfinite": Option(Literal["raise", "skip"], "raise"),
    "sharded": Option(bool, True),
    "learnt_whole": Option(bool, False),
    "table_dtype": Option(Literal["float32", "float16"], "float32"),
}
_ACCURACY = "teacher/accuracy"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Distiller(nn.Module):
    """The losses of one or more methods between a student in training and a frozen teacher.

    It owns the losses, not the models: `parameters()` must be optimized in addition to those of the
    student, and `state_dict()` holds the losses' parameters and state and the step, but no teacher.

        with Distiller(student, teacher, ["fcd"]) as kd:
            for images, labels in loader:
                task_loss = criterion(student(images), labels)
                loss = sum(kd(images, labels).values(), start=task_loss)
    """

    @failing_together()
    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher
        | nn.Module
        | Callable[[Tensor], Tensor]
        | Sequence[Teacher | nn.Module | Callable[[Tensor], Tensor]],
        methods: Sequence[object],
        *,
        student_embedding: str = "",
        run_student: Callable[[Tensor], object] | None = None,
        student_stages: Sequence[str] | None = None,
        teacher_stages: Sequence[str] | None = None,
        head: ClassShard | None = None,
        host_head: Literal["margin"] | None = None,
        input_shape: tuple[int, int, int] = (3, 112, 112),
        student_view: nn.Module | None = None,
        plugins: Sequence[object] = (),
        labels: bool = True,
        task_weight: Scheduled = 1.0,
        log_teacher_accuracy: int = 100,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        nonfinite: Literal["raise", "skip"] = "raise",
        sharded: bool = True,
        learnt_whole: bool = False,
        table_dtype: Literal["float32", "float16"] = "float32",
    ) -> None:
        """
        teacher: a frozen model or function, or a list of several. The methods see the mean of the
            cosines of several teachers, and a tap names one of them by its number: `0.layer3`.
        methods: names, tables {"name": …, options} or objects; their terms keep this order.
        student_embedding: path of the submodule that returns (b d); "" is the model's output.
        run_student: runs the student on images (b 3 h w), if `student(images)` does not.
        head: this rank's shard of the student's own classifier, for methods that compare logits;
            the teacher's rows are split in the same way.
        host_head: "margin" if the host's own head is a margin softmax that can take over the
            teacher's rows. It then computes a term that inherits the classifier; see `inherited`.
        student_view: a module (b 3 h w) -> (b 3 h w), such as `StudentView`, that changes the
            student's images in training. The teacher sees the unchanged images.
        plugins: objects that answer `model_stages` or `student_view`.
        labels: False if there are none; labels that are passed to `kd` are then ignored.
        task_weight: the factor of the trainer's own loss, which the loop multiplies by
            `kd.task_weight`: a number, a schedule, or a function from the step to a number.
        log_teacher_accuracy: the interval, in steps, at which `metrics` holds the teacher's
            accuracy on the batch, "teacher/accuracy", if a term uses the class rows; 0 for never.
        steps_per_epoch: the number of batches in an epoch, for schedules that count epochs.
        seed: the seed of the losses' initial weights and of the student's views; the global
            generators keep their states.
        nonfinite: the reaction to a term or a teacher's embedding that is not finite. "raise": the
            next step raises an error, so that no step waits for the device. "skip": the step
            continues without any term, on all ranks; each step then waits for the device.
        sharded: whether each rank keeps the methods' class tables for its own classes only: those
            of `head`, or an equal share. Each rank then saves its own state dict; see also
            `whole_state_dict`.
        learnt_whole: True for a host that saves the state of only one rank: every rank then keeps
            whole tables, if training changes them.
        table_dtype: the dtype of class rows that training does not change: the teacher's, and
            coupleface's prototypes.
        """
        super().__init__()
        given = check_arguments("Distiller", _ARGUMENTS, locals())
        student = unwrap(student)
        taught_by = _taught_by(teacher, student)
        first = next(student.parameters())

        # The state of the run.
        self.step = 0  # number of steps taken, which schedules count
        self.steps_per_epoch = steps_per_epoch  # a host may set it before the first step
        self.accumulation = 1  # forwards per optimizer step, if the host sums their gradients
        self.metrics: dict[str, Tensor] = {}  # values of the last step, detached
        self._embedding = student_embedding
        self._head = head
        self._dtype = torch.promote_types(first.dtype, torch.float32)
        self._first_step_over = False
        self._finite = Finite(nonfinite)
        self._replicas: Replicas | None = None  # if there are several ranks

        # The declarations of the methods, for both models as they are probed on random images.
        with undisturbed_generators(seed, first.device):
            # Drawn on the CPU, so that a seed creates the same losses on every device.
            images = (torch.rand(2, *input_shape, dtype=first.dtype) * 2 - 1).to(first.device)
            asked = Declarations(methods, plugins)
            self.student_view = asked.student_view(student_view)
            self._entrance = self._entrance_for(images, seed)
            ours = asked.student(student, student_embedding, student_stages, images, run_student)
            self._tables = ClassTables(head, sharded, learnt_whole, _DTYPES[table_dtype])
            theirs = asked.teacher(taught_by, teacher_stages, images, self._tables)
            rows = theirs.classifier
            if world() is not None:  # before a method asks the other ranks
                described = [] if rows is None else [f"teacher.classifier: {rows.described()}"]
                refuse_different([*asked.described(), *self._tables.described(), *described])
            self.taps = asked.taps(ours, theirs, head)
            if not labels:
                refuse_labelled([tap.name for tap in self.taps if tap.needs_labels])
            self.adapter = asked.teacher_adapter(theirs)

        # The losses, and the class rows that they or the host's head need.
        if labels or any(tap.needs_classifier for tap in self.taps):
            check_classes(rows, head)
        self.inherited: Inherited | None = None  # the term that the host's head computes
        if host_head is not None:
            self.inherited, self.taps = left_to_host(self.taps, rows, self._tables.beside_head)
        self.losses = nn.ModuleDict({tap.name: tap.loss for tap in self.taps})
        self._task_weight = TaskWeight(given["task_weight"], self.inherited)
        self.teacher_rows = rows_for(self.taps, rows, self._tables, self._dtype, self.inherited)

        # The needs of each step.
        self._varying = varying_numbers(self.losses)
        self._stages = tapped_shapes(self.taps, ours)
        self._own = tapped_parameters(self.taps, ours)
        self._needs_teacher = any(tap.needs_teacher for tap in self.taps)
        self._needs_labels = [tap.name for tap in self.taps if tap.needs_labels]
        self._ignores_labels = not labels
        # The number of classes that labels are compared with; 0 if they are not.
        self._classes = rows.total if rows is not None and self._needs_labels else 0
        measured = labels and self.teacher_rows is not None and self._needs_teacher
        self._measured = log_teacher_accuracy if measured else 0  # interval in steps; 0: never

        # The connection to both models, which `remove` ends.
        self.to(first.device)
        self._convert_losses()
        # DistributedDataParallel reads this attribute: it must not synchronise these buffers.
        self._ddp_params_and_buffers_to_ignore = sorted(own_buffers(self))
        self._connect(student, taught_by, images)

    # --- one step ----------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        teacher_images: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """(b 3 h w), (b) -> each term's loss (), times its weight; after the student's forward.

        images: the images passed to the student, RGB, (pixel - 127.5) / 127.5.
        labels: class numbers; None if no term needs them.
        teacher_images: another view of the same samples for the teacher; by default `images`.
        indices: (b) indices of the samples in the training set, if the teacher is a table of
            embeddings.
        """
        if self._session is None:
            raise KDHooksError(
                "a copy of a Distiller has no teacher and no hooks; create a Distiller for the "
                "copied student, and load the state dict of the original"
            )
        try:
            inputs, questions = self._inputs(images, labels, teacher_images, indices)
            return self._terms(inputs, questions)
        except BaseException:
            self._session.drop_ahead()
            raise

    def _inputs(
        self,
        images: Tensor,
        labels: Tensor | None,
        teacher_images: Tensor | None,
        indices: Tensor | None,
    ) -> tuple[Step, list[Question]]:
        """Return the inputs of the losses, and questions about them that the device answers later.

        On the CPU, a question is answered immediately, by an error if need be; answers of another
        device are read in the next step.
        """
        # `take` drops these.
        seen, given, version = self._student.images, self._student.inputs, self._student.version
        features = self._student.take()
        self._finite.check()
        theirs = images if teacher_images is None else teacher_images
        check_images(theirs)
        if self._ignores_labels:
            labels = None
        labels = checked_labels(labels, images, self._needs_labels)
        questions: list[Question] = []
        if question := check_same_images(seen, given, version, images):
            questions.append(question)
        if (
            labels is not None
            and self._classes
            and (question := check_range(labels, self._classes))
        ):
            questions.append(question)
        if not self._first_step_over:
            self._check_first(features)
        teacher = self._teach(theirs, labels, indices)
        check_batch(images, features[self._embedding], teacher.embedding if teacher else None)
        if not self._first_step_over and self._needs_teacher and seen is theirs:
            # From the next step on: the teacher is on its device and sees the student's images.
            self._student.on_enter = self._session.run_ahead
            self._student.on_failure = self._session.drop_ahead
        if teacher is not None and not teacher.finite:
            questions.append(of_embedding(teacher.embedding, labels))
        inputs = Step(
            student=features[self._embedding],
            student_features=features,
            teacher=teacher.embedding if teacher else None,
            teacher_features=teacher.features if teacher else {},
            labels=labels,
            parameters=self._own,
            classifier=None if self.teacher_rows is None else self.teacher_rows.shard(),
            head=self._head,
        )
        return inputs, questions

    def _teach(
        self, images: Tensor, labels: Tensor | None, indices: Tensor | None
    ) -> TeacherOutput | None:
        """The teacher's output in the dtype of the losses; None if no term needs it."""
        if self._first_step_over and not self._needs_teacher:
            return None
        output = self._session(images, indices)
        if output.embedding.dtype != self._dtype:
            output = output.each(lambda tensor: tensor.to(self._dtype))
        if not self._first_step_over:
            self._check_teacher(output, images, labels)
        return output

    def _check_teacher(self, output: TeacherOutput, images: Tensor, labels: Tensor | None) -> None:
        """Check the teacher's output in the first step."""
        ordered = labels if self._needs_labels or self.inherited else None
        replicas = self._replicas
        with nullcontext() if replicas is None else replicas.same_sizes(len(images)):
            for who, teacher, part in self._session.of_each(output):
                check_input(teacher.transform, images, who)
                check_teacher(part, images, who)
                rows = teacher.classifier
                if ordered is not None and rows is not None:
                    split = self._tables.split(rows.total) if is_split(self) else None
                    check_class_order(rows, part.embedding, ordered, who, split)

    def _check_first(self, features: Mapping[str, Tensor]) -> None:
        check_shapes(features, self._stages)
        self._dtype = features[self._embedding].dtype
        self._convert_losses()  # the student or kd may have been converted meanwhile
        if self.teacher_rows is not None:
            self.teacher_rows.to(self._dtype)
        if self._replicas is None and world() is not None:
            self._replicas = self._new_replicas()

    def _convert_losses(self) -> None:
        if any(p.dtype != self._dtype for p in self.losses.parameters()):
            self.losses.to(self._dtype)

    def _terms(self, inputs: Step, questions: list[Question]) -> dict[str, Tensor]:
        """Return each term's loss, times its weight."""
        number = self.step + 1
        if self._finite.skips:
            tapped = [*inputs.teacher_features.values(), *inputs.student_features.values()]
            if not self._finite.usable(number, tapped, questions):
                return self._skipped(inputs)
            questions = []
        if self._replicas is None:
            weighted = self._losses(inputs)
        else:
            with self._replicas.one_step(len(inputs.student)):
                weighted = self._losses(inputs)
        values = {name: self.metrics[name] for name in weighted}
        if not self._first_step_over:
            check_terms(values)
            self._first_step_over = True
        if not self._finite.note(number, [of_terms(values), *questions]):
            return self._skipped(inputs)
        self.step = number
        if self._guard.noting:
            self._guard.note(weighted)
        return weighted

    def _losses(self, inputs: Step) -> dict[str, Tensor]:
        """Compute every tap's loss, times its weight, and `metrics`."""
        shared = [*inputs.student_features.values(), *inputs.teacher_features.values()]
        shared += [tensor for tensor in (inputs.teacher, inputs.labels) if tensor is not None]
        untouched = Untouched(shared)
        weighted: dict[str, Tensor] = {}
        for number in self._varying:
            number.move(self.step, self.steps_per_epoch)
        idle = bool(self.taps)  # whether every weight is 0
        kind = inputs.student.device.type
        autocast = torch.is_autocast_enabled(kind)  # cheaper than switching it off
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            for tap, loss in zip(self.taps, self.losses.values(), strict=True):
                value, logged = value_of(tap, loss, inputs)
                self.metrics.update(logged)
                weight = self.weight(tap)
                idle = idle and weight == 0
                weighted[tap.name] = value * weight
                untouched.check(tap.name)
            if self._measured:
                self.metrics.pop(_ACCURACY, None)  # the value of an earlier step
                if self.step % self._measured == 0:
                    self._measure_teacher(inputs)
        if idle:
            following = self.step + 1
            drop_zero_gradients(weighted, self.parameters(), lambda: self.step == following)
        return weighted

    def _measure_teacher(self, inputs: Step) -> None:
        if self.teacher_rows is None or inputs.teacher is None or inputs.labels is None:
            return
        self.metrics[_ACCURACY] = self.teacher_rows.accuracy(inputs.teacher, inputs.labels)

    def _skipped(self, inputs: Step) -> dict[str, Tensor]:
        """Count a step that continues without its terms, and return a zero for each of them."""
        self.step += 1
        self.metrics.clear()
        return zeros(self.taps, inputs.student_features)

    def weight(self, tap: Tap, step: int | None = None) -> float:
        """Return a term's factor in a step, by default the current one."""
        factor = tap.weight
        if callable(factor):
            now = self.step if step is None else step
            factor = weight_at(tap.name, factor, now, self.steps_per_epoch)
        return factor / self.accumulation if tap.per_optimizer_step else factor

    def compare_gradients(self, task_loss: Tensor, terms: Mapping[str, Tensor]) -> Balance:
        """Compare the gradients of a step's losses at the student's parameters.

            terms = kd(images, labels)
            print(kd.compare_gradients(task_loss, terms))

        Losses of different papers differ in scale. The result shows which of them the student
        learns from, and the weight that would make a term's gradient as long as that of the
        trainer's own loss. It takes one or two more backward passes for each loss, and leaves every
        gradient of the training as it is. Terms of weight 0 are left out.

        On several ranks, all must call it. Each of them gets the figures of its own batch.

        task_loss: the trainer's own loss (), before its backward pass.
        terms: what `kd` returned in this step.
        """
        check_losses(task_loss, terms, [tap.name for tap in self.taps])
        last = max(self.step - 1, 0)  # `kd` has counted its step
        compared = {
            tap.name: comparable(tap, terms[tap.name], last)
            for tap in self.taps
            if self.weight(tap, last) != 0
        }
        with self._guard.measuring() as parameters:
            task = Weighted(task_loss, self.task_weight)
            found = compare(task, compared, partial(gradient_at, parameters))
            gradient_at(parameters, task_loss)  # can the training still run its backward pass?
        return found

    # --- between the steps -------------------------------------------------------------------

    @property
    def pending(self) -> Tensor | None:
        """The images of the student's last forward in training, until kd takes its outputs."""
        return self._student.images

    @property
    def task_weight(self) -> float:
        """The factor of the trainer's own loss on the student's last forward in training.

        It is the same before and after `kd` computes the terms of that forward.
        """
        step = self.step if self._student.waiting else max(self.step - 1, 0)
        return self._task_weight.at(step, self.steps_per_epoch)

    @property
    def labelled(self) -> Sequence[str]:
        """The terms that need labels."""
        return self._needs_labels

    @property
    def by_index(self) -> bool:
        """Whether kd needs `indices`, since a teacher is a table of embeddings."""
        return self._session is not None and self._session.by_index

    @property
    def in_epochs(self) -> list[str]:
        """The names whose schedules count epochs: terms, and "task_weight"."""
        task = ["task_weight"] if self._task_weight.in_epochs else []
        return task + named_in_epochs(self.taps, self.losses)

    @property
    def fired(self) -> bool:
        """Whether the student's hooks ever ran."""
        return self._student.fired

    @property
    def skipped(self) -> int:
        """The number of steps that continued without their terms, with nonfinite = "skip"."""
        return self._finite.skipped

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Neither distil nor refuse the student's forwards and optimizer steps in this block."""
        before, self._student.paused = self._student.paused, True
        try:
            yield
        finally:
            self._student.paused = before

    def discard(self) -> None:
        """Drop the student's last forward, whose terms are not needed."""
        self._student.discard()
        if self._session is not None:  # None in a copy
            self._session.drop_ahead()

    def advise(self, advice: str) -> None:
        """Add a host's advice to errors about terms that are not trained."""
        self._guard.host_advice = f"; {advice}"

    def view_by(self, around: Around) -> None:
        """Let a host apply the view to its own image format; see `Around`."""
        if self._entrance is not None:
            self._entrance.around = around

    def check_finite(self) -> None:
        """Raise an error if the last step was not finite; called before each step and each save."""
        self._finite.check()

    # --- set-up and end ----------------------------------------------------------------------

    def _connect(self, student: nn.Module, teacher: Teacher | Teachers, images: Tensor) -> None:
        """Register everything that `remove` removes. If one part raises, undo the others."""
        ours = [path for tap in self.taps for path in tap.student_paths]
        theirs = [path for tap in self.taps for path in tap.teacher_paths]
        with ExitStack() as undo:
            self._student = StudentTaps(student, [self._embedding, *ours])
            self._student.view = self._entrance
            undo.callback(self._student.remove)
            self._session = open_session(teacher, theirs, self.adapter, like=images)
            undo.callback(self._session.close)
            trains_head = any(tap.needs_head for tap in self.taps)
            rows = self._head.weight if trains_head and self._head is not None else None
            self._guard = OptimizerGuard(student, self, self._student, rows)
            self._guard.more = self._task_weight.check_asked
            undo.callback(self._guard.remove)
            if world() is not None:  # else the first step creates them, if there are ranks by then
                self._replicas = self._new_replicas()
            undo.pop_all()

    def _entrance_for(self, images: Tensor, seed: int) -> Entrance | None:
        """Create the hook for the student's view, after trying the view on images (b 3 h w)."""
        if self.student_view is None:
            return None
        viewing = Viewing(self.student_view, seed)
        viewing(images)
        for part in self.student_view.modules():
            if isinstance(part, StudentView):
                part.expect_first_batch()  # of the training; the images above are random
        return Entrance(viewing, lambda: (self.step, self.accumulation))

    def _new_replicas(self) -> Replicas:
        declared = described(self.taps)
        declared.append(f"task_weight {shown_number(self._task_weight.value)}")
        declared.append(f"teacher/accuracy every {self._measured} steps")
        for who, teacher in self._session.named:
            digest = weights_of(teacher.module or teacher.forward)
            declared.append(f"a {who} with weights of SHA-256 {digest}")
        if self._entrance is not None:
            declared.append(self._entrance.described())
        sharded = self._head is not None and self._head.group is not None
        return Replicas(self, declared, sharded)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the losses' parameters for an optimizer; see `kdhooks.parameter_groups`."""
        return parameter_groups(self, weight_decay)

    def whole_state_dict(self) -> dict[str, Any]:
        """Return the state dict with the class tables of all ranks; any number of ranks loads it.

        All ranks must call this together.
        """
        with failing_together():
            state = self.state_dict()
        answers(None)  # whether all ranks have one
        return {**state, **whole_tables(self)}

    def remove(self) -> None:
        """Remove every hook from both models."""
        self._student.remove()
        if self._session is not None:  # a copy of a Distiller has none of these
            self._session.close()
        for part in (self._guard, self._replicas):
            if part is not None:
                part.remove()

    def __enter__(self) -> "Distiller":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self.check_finite()  # no next step will check the last one
        finally:
            self.remove()

    def get_extra_state(self) -> Tensor:
        self.check_finite()  # so that no checkpoint is written after a step that is not finite
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)


def _taught_by(teacher: object, student: nn.Module) -> Teacher | Teachers:
    """Return the teachers, which must not be the student."""
    for one in listed_teachers(teacher):  # before a new Teacher freezes its module
        check_models(student, one.module if isinstance(one, Teacher) else one)
    return one_or_several(teacher)
