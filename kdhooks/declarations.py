"""The declarations of a method: its taps, the loss on each, and the loss's weight.

The class of a tap determines the arguments of its loss, the outputs of the models that it needs,
whether it needs the teacher and the labels, and which models it accepts. A new kind of tap is
therefore one new class here.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import ClassVar, TypeAlias

from torch import Tensor, nn

from kdhooks.classes.rows import Rows
from kdhooks.classes.shards import ClassShard
from kdhooks.classes.splits import ClassTables
from kdhooks.errors import KDHooksError, near_miss
from kdhooks.paths import find
from kdhooks.points import Points
from kdhooks.schedules import Scheduled
from kdhooks.stages import Stage

Weight: TypeAlias = Scheduled
"""A loss's factor, at least 0: a number, a schedule, or a function from the step to a number."""


@dataclass(frozen=True)
class Model:
    """The student or the teacher as a method sees it when it declares its taps, already probed."""

    module: nn.Module | None  # None: embeddings only, as from an ONNX file
    embedding_dim: int
    stages: tuple[Stage, ...] = ()
    classifier: Rows | None = None  # the teacher's rows (c e); None on the student's side
    without_rows: str = ""  # for errors: the teachers without rows, if others have them
    embedding: str = ""  # path of the submodule that returns the embedding; "": the output
    joins: int = 1  # number of teachers; with several, a path starts with a teacher's number
    probe: Callable[[str], Stage] | None = field(default=None, repr=False, compare=False)
    probed: dict[str, Stage] = field(default_factory=dict, init=False, repr=False, compare=False)
    points: Points | None = field(default=None, repr=False, compare=False)
    tables: ClassTables = field(default_factory=ClassTables, repr=False, compare=False)

    def path(self, name: str, owner: str) -> str:
        """Return the path of the one submodule that a path, a name or a pattern stands for."""
        if self.points is None:  # it has no submodules, only an embedding
            return self.embedding if name == "embedding" else name
        return self.points.one(name, owner)

    def paths(self, names: Sequence[str], owner: str) -> tuple[str, ...]:
        """Return the paths of all submodules that paths, names and patterns stand for."""
        if self.points is None:
            return tuple(self.path(name, owner) for name in names)
        return self.points.several(names, owner)

    def stage(self, path: str, owner: str) -> Stage:
        """Return any submodule as a `Stage`; a forward probes it unless it was probed before.

        path: a path or a name, as for `path`. owner: the subject of errors, such as
            "fitnet: student".
        """
        path = self.path(path, owner)
        for stage in (*self.stages, *self.probed.values()):
            if stage.path == path:
                return stage
        if path == self.embedding:
            return Stage(path, (self.embedding_dim,))
        if self.module is None or self.probe is None:
            raise KDHooksError(
                f"{owner} has no submodule '{path}': it is no torch module, and only its "
                "embedding is known; kdhooks.onnx.to_torch turns an ONNX file into one"
            )
        find(self.module, path, owner)
        self.probed[path] = self.probe(path)
        return self.probed[path]


@dataclass(frozen=True)
class Step:
    """The inputs of one step's losses, at least in float32."""

    student: Tensor  # embedding (b d)
    student_features: Mapping[str, Tensor]
    teacher: Tensor | None  # embedding (b e); None if no term needs the teacher
    teacher_features: Mapping[str, Tensor]
    labels: Tensor | None  # (b); None if no term needs labels
    parameters: Mapping[str, Sequence[Tensor]]  # of the student, by the tap's name
    classifier: ClassShard | None  # this rank's rows of the teacher's classifier
    head: ClassShard | None  # this rank's rows of the student's own classifier


@dataclass(frozen=True)
class Tap:
    """A named, weighted loss. Each subclass defines the arguments of its loss.

    A loss returns a scalar, or a scalar and a dict of scalars to log.
    needs_teacher, needs_labels: False if the loss ignores them; it must then accept None for them.
    """

    name: str
    loss: nn.Module
    weight: Weight = 1.0
    needs_teacher: bool = field(default=True, kw_only=True)
    needs_labels: bool = field(default=True, kw_only=True)

    contract: ClassVar[str]
    """The first line of the docstring of the loss's forward: the shapes of its arguments."""
    needs_head: ClassVar[bool] = False
    """Whether the loss trains the student's own classifier."""
    needs_classifier: ClassVar[bool] = False
    """Whether the loss is computed on the rows of the teacher's classifier."""
    inherits_classifier: ClassVar[bool] = False
    """Whether a host whose own head is a margin softmax may compute the loss itself."""
    per_optimizer_step: ClassVar[bool] = False
    """Whether the loss counts once per optimizer step, however many batches are accumulated."""

    def __post_init__(self) -> None:
        check_name(self.name, type(self).__name__)
        if not isinstance(self.loss, nn.Module):
            raise KDHooksError(
                f"{self.name}: loss must be an nn.Module, so that its parameters are found; "
                f"found {type(self.loss).__name__}"
            )
        if not callable(self.weight):
            check_weight(self.name, self.weight)

    @property
    def student_paths(self) -> tuple[str, ...]:
        """The student's submodules whose outputs the loss sees, besides the embedding."""
        return ()

    @property
    def teacher_paths(self) -> tuple[str, ...]:
        return ()

    def arguments(self, step: Step) -> tuple[object, ...]:
        """The arguments that the loss is called with."""
        raise AssertionError("a subclass of Tap must define its arguments")

    def resolved(self, student: Model, teacher: Model) -> "Tap":
        """The same tap with the paths of submodules in place of their names."""
        return self

    def check(self, student: Model, teacher: Model, head: ClassShard | None) -> None:
        """Refuse models that this tap does not fit. head: the student's own classifier."""

    def described(self) -> str:
        """For a report: "fcd on the embedding"."""
        return f"{self.name} on the embedding"


def check_name(name: str, subject: str) -> None:
    """Refuse a text that cannot be the name of a term. subject: the subject of the error."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise KDHooksError(
            f"{subject}: a name must consist of lower case letters, digits and underscores, "
            f"since it becomes a key of logs and checkpoints; found '{name}'"
        )
    if name in ("task", "teacher"):
        raise KDHooksError(
            f"{subject}: a name must not be one that kdhooks itself logs; found '{name}'; choose "
            f"another, such as '{name}_term'"
        )
    if hasattr(nn.ModuleDict(), name):  # it keeps the losses by name
        raise KDHooksError(
            f"{subject}: a name must not be that of an attribute of torch's modules; found "
            f"'{name}'; choose another, such as '{name}_term'"
        )


def check_weight(name: str, weight: float) -> None:
    """Refuse everything but a finite number of at least 0."""
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise KDHooksError(
            f"{name}: weight must be a number, a function of the step, or in a recipe a table; "
            f"found {weight!r}"
        )
    if not math.isfinite(weight) or weight < 0:
        raise KDHooksError(f"{name}: weight must be finite and at least 0; found {weight}")


@dataclass(frozen=True)
class EmbeddingTap(Tap):
    """loss(student (b d), teacher (b e), labels (b))."""

    contract = "(b d), (b e), (b) -> ()."

    def arguments(self, step: Step) -> tuple[object, ...]:
        return step.student, step.teacher, step.labels


@dataclass(frozen=True)
class FeatureTap(Tap):
    """loss(student [(b k h w)], teacher [(b k h w)], labels (b)), one entry per path.

    student, teacher: paths or names of single submodules; `path@2` is the output of a submodule's
        second call, and `path:in` its input.
    """

    student: tuple[str, ...] = field(kw_only=True)
    teacher: tuple[str, ...] = field(kw_only=True)

    contract = "[(b k h w)], [(b k h w)], (b) -> ()."

    @property
    def student_paths(self) -> tuple[str, ...]:
        return self.student

    @property
    def teacher_paths(self) -> tuple[str, ...]:
        return self.teacher

    def arguments(self, step: Step) -> tuple[object, ...]:
        ours = [step.student_features[path] for path in self.student]
        theirs = [step.teacher_features[path] for path in self.teacher]
        return ours, theirs, step.labels

    def resolved(self, student: Model, teacher: Model) -> Tap:
        ours = tuple(student.path(path, f"{self.name}: student") for path in self.student)
        theirs = tuple(teacher.path(path, f"{self.name}: teacher") for path in self.teacher)
        if (ours, theirs) == (tuple(self.student), tuple(self.teacher)):
            return self
        return replace(self, student=ours, teacher=theirs)

    def check(self, student: Model, teacher: Model, head: ClassShard | None) -> None:
        sides = (
            ("student", student.module, self.student),
            ("teacher", teacher.module, self.teacher),
        )
        for side, module, paths in sides:
            if module is None:
                continue
            for path in paths:
                find(module, path, f"{self.name}: {side}")

    def described(self) -> str:
        ours, theirs = (
            ", ".join(path or "output" for path in paths) for paths in (self.student, self.teacher)
        )
        return f"{self.name} on {ours} <- {theirs}"


@dataclass(frozen=True)
class ClassifierShare(Tap):
    """loss(student (b d), teacher (b e), labels (b), classifier), b the global batch.

    classifier is this rank's `ClassShard` of the rows of the teacher's classifier. A loss that
    stores values per class may define `prepare(classifier)`, which is called once.
    """

    contract = "(b d), (b e), (b), classifier -> ()."
    needs_classifier = True

    def arguments(self, step: Step) -> tuple[object, ...]:
        assert step.classifier is not None
        shard = step.classifier
        given = (
            step.student,
            step.teacher if self.needs_teacher else None,
            step.labels if self.needs_labels else None,
        )
        batch = (None if tensor is None else shard.gather(tensor) for tensor in given)
        return *batch, shard

    def check(self, student: Model, teacher: Model, head: ClassShard | None) -> None:
        if teacher.classifier is None:
            raise KDHooksError(
                f"{self.name} needs the teacher's classifier, and none is given"
                f"{teacher.without_rows}; set teacher.classifier to checkpoint_gpu_*.pt shards, a "
                "tensor file (c e), or class means made with kdhooks.class_means"
            )

    def described(self) -> str:
        return f"{self.name} on the classifier"


@dataclass(frozen=True)
class InheritedClassifier(ClassifierShare):
    """A `ClassifierShare` whose loss is a softmax that the student's own head may compute.

    A host with such a head replaces its rows by the teacher's, frozen, and trains the student on
    them. In other hosts, kdhooks computes the loss.
    host_conflict: the reason why a host's head cannot compute this loss; "" if it can.
    """

    host_conflict: str = field(default="", kw_only=True)

    inherits_classifier = True


@dataclass(frozen=True)
class ComparedClassifiers(ClassifierShare):
    """A `ClassifierShare` whose loss also gets `head`, the `ClassShard` of the student's own rows.

    It compares the student's scores on these rows with the teacher's scores on the teacher's rows.
    """

    contract = "(b d), (b e), (b), classifier, head -> ()."
    needs_head = True

    def arguments(self, step: Step) -> tuple[object, ...]:
        assert step.head is not None
        return *super().arguments(step), step.head.trained()

    def check(self, student: Model, teacher: Model, head: ClassShard | None) -> None:
        super().check(student, teacher, head)
        if head is None:
            raise KDHooksError(
                f"{self.name} compares class scores, and the student's own classifier is not "
                "known; pass Distiller(…, head=ClassShard(weight, 0, classes)), in MMEngine name "
                "it as classifier = 'head.fc.weight', in Lightning as "
                "Distill(…, classifier='head.weight'), or use fcd, which needs none"
            )
        if head.weight.shape[1] != student.embedding_dim:
            raise KDHooksError(
                f"{self.name}: the student's classifier must be as wide as its embedding; found "
                f"rows of width {head.weight.shape[1]} and an embedding of width "
                f"{student.embedding_dim}"
            )
        if not head.weight.requires_grad:
            raise KDHooksError(
                f"{self.name}: the student's classifier must be trained; found rows that do not "
                "require grad (a head that samples classes may copy their rows); use fcd, or a "
                "head that trains all its rows"
            )


@dataclass(frozen=True)
class ParameterTap(Tap):
    """loss(parameters [(…)]), once per optimizer step, on named parameters of the student."""

    needs_teacher: bool = field(default=False, init=False)
    needs_labels: bool = field(default=False, init=False)
    parameters: tuple[str, ...] = field(kw_only=True)

    contract = "[(…)] -> ()."
    per_optimizer_step = True

    def arguments(self, step: Step) -> tuple[object, ...]:
        return (step.parameters[self.name],)

    def check(self, student: Model, teacher: Model, head: ClassShard | None) -> None:
        self.of(student)

    def described(self) -> str:
        return f"{self.name} on {len(self.parameters)} parameters"

    def of(self, student: Model) -> list[nn.Parameter]:
        """Return the student's parameters that this tap names; refuse missing and frozen ones."""
        assert student.module is not None
        known = dict(student.module.named_parameters())
        for name in self.parameters:
            if name not in known:
                raise KDHooksError(
                    f"{self.name}: student has no parameter '{name}'; {near_miss(name, known)}"
                    f"it has {len(known)} parameters"
                )
            if not known[name].requires_grad:
                raise KDHooksError(
                    f"{self.name}: student parameter '{name}' is frozen; leave it out"
                )
        return [known[name] for name in self.parameters]
