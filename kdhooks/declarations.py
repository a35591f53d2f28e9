"""What a method declares: where it taps, which loss it computes there, and with what weight."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor, nn

from kdhooks.classes.rows import Rows
from kdhooks.classes.shards import ClassShard, gather
from kdhooks.errors import KDHooksError

Weight: TypeAlias = float | Callable[[int], float]
"""A factor of the loss: a number, or a function of the training step (0 is the first)."""


@dataclass(frozen=True)
class Stage:
    """The end of one stage of a backbone: its path, and the shape it gives without the batch."""

    path: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """k of a map (k h w) or of tokens (n k)."""
        return self.shape[0] if len(self.shape) == 3 else self.shape[-1]


@dataclass(frozen=True)
class Model:
    """One side, as a method sees it while it declares: probed once, before the first step."""

    module: nn.Module | None  # None: embeddings only, as from an ONNX file
    embedding_dim: int
    stages: tuple[Stage, ...] = ()
    classifier: Rows | None = None  # the teacher's rows (c e); None on the student's side


@dataclass(frozen=True)
class Step:
    """What the losses of one step may see, in float32 at least."""

    student: Tensor  # embedding (b d)
    student_features: Mapping[str, Tensor]
    teacher: Tensor | None  # embedding (b e); None where no method needs the teacher
    teacher_features: Mapping[str, Tensor]
    labels: Tensor  # (b)
    parameters: Mapping[str, Sequence[Tensor]]  # of the student, by the tap's name
    classifier: ClassShard | None  # the teacher's rows
    head: ClassShard | None  # the student's own


@dataclass(frozen=True)
class Tap:
    """A named, weighted loss; its kind says what the loss is called with.

    A loss returns a scalar, or a scalar and a dict of detached scalars to log.
    """

    name: str
    loss: nn.Module
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise KDHooksError(
                f"{type(self).__name__}: a name is lower case letters, digits and underscores, "
                f"since it becomes a key of logs and checkpoints; found '{self.name}'"
            )
        if not isinstance(self.loss, nn.Module):
            raise KDHooksError(
                f"{self.name}: loss must be an nn.Module, so that its parameters are found; "
                f"found {type(self.loss).__name__}"
            )
        if not callable(self.weight):
            check_weight(self.name, self.weight)

    def arguments(self, step: Step) -> tuple[object, ...]:
        raise AssertionError("a tap is one of the four kinds")


def check_weight(name: str, weight: float) -> None:
    """Refuse what is not a finite number of at least 0."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise KDHooksError(
            f"{name}: weight must be a number, a function of the step, or in a recipe a table; "
            f"found {weight!r}"
        )
    if not math.isfinite(weight) or weight < 0:
        raise KDHooksError(f"{name}: weight must be finite and at least 0; found {weight}")


@dataclass(frozen=True)
class EmbeddingTap(Tap):
    """loss(student (b d), teacher (b e), labels (b))."""

    def arguments(self, step: Step) -> tuple[object, ...]:
        return step.student, step.teacher, step.labels


@dataclass(frozen=True)
class FeatureTap(Tap):
    """loss(student [(b k h w)], teacher [(b k h w)], labels (b)), one entry a path."""

    student: tuple[str, ...] = field(kw_only=True)
    teacher: tuple[str, ...] = field(kw_only=True)

    def arguments(self, step: Step) -> tuple[object, ...]:
        ours = [step.student_features[path] for path in self.student]
        theirs = [step.teacher_features[path] for path in self.teacher]
        return ours, theirs, step.labels


@dataclass(frozen=True)
class ClassifierShare(Tap):
    """loss(student (b d), teacher (b e), labels (b), classifier), b the global batch.

    classifier is this rank's `ClassShard` of the teacher's rows. Modes:
    inherit: these rows replace the student's classifier, frozen. A host whose own head is a margin
    softmax takes the rows over and computes the loss itself, unless `host_conflict` says why not.
    centres: kdhooks computes the loss on these rows, next to the host's.
    compare: as centres; the student's own `ClassShard` is the fifth argument.

    A loss that keeps something of each class may define `begin(classifier)`, called once.
    """

    mode: Literal["inherit", "centres", "compare"] = field(default="inherit", kw_only=True)
    needs_teacher: bool = field(default=True, kw_only=True)  # False: the loss gets teacher=None
    host_conflict: str = field(default="", kw_only=True)

    def arguments(self, step: Step) -> tuple[object, ...]:
        assert step.classifier is not None
        group = step.classifier.group
        teacher = step.teacher if self.needs_teacher else None
        batch = (
            gather(step.student, group),
            None if teacher is None else gather(teacher, group),
            gather(step.labels, group),
        )
        if self.mode == "compare":
            assert step.head is not None
            return *batch, step.classifier, step.head.trained()
        return *batch, step.classifier


@dataclass(frozen=True)
class ParameterTap(Tap):
    """loss(parameters [(…)]), once per optimiser step; the student's own, named by path."""

    parameters: tuple[str, ...] = field(kw_only=True)

    def arguments(self, step: Step) -> tuple[object, ...]:
        return (step.parameters[self.name],)
