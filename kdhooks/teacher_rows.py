"""This rank's rows of the teacher's classifier, and the term that a host's head computes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kdhooks.classes.per_class import PerClass
from kdhooks.classes.ranks import gather
from kdhooks.classes.rows import Rows
from kdhooks.classes.shards import ClassShard
from kdhooks.classes.splits import ClassSplit, ClassTables
from kdhooks.declarations import InheritedClassifier, Tap
from kdhooks.errors import KDHooksError


class TeacherRows(PerClass):
    """This rank's rows of the teacher's classifier."""

    rows: Tensor

    def __init__(
        self,
        rows: Rows,
        split: ClassSplit,
        losses: Iterable[nn.Module],
        dtype: torch.dtype,
        kept: torch.dtype,
        taken_by: ClassShard | None = None,
    ) -> None:
        """
        losses: those with a method `prepare` receive the rows once, in `dtype`.
        kept: the dtype in which the rows are stored.
        taken_by: the student's own classifier, if the host copies these rows into it. They are
            then not stored here too.
        """
        super().__init__(split, "teacher.classifier")
        own = rows.slice(split.start, split.stop)
        for loss in losses:
            if prepare := getattr(loss, "prepare", None):
                prepare(split.shard(own.to(dtype)))
        self.keep_rows("rows", own, kept)
        self._taken_by = taken_by
        if taken_by is not None:
            self.rows = self.rows[:0].clone()  # a view would keep all rows in memory

    def shard(self) -> ClassShard:
        taken = self._taken_by
        return self.split.shard(self.rows if taken is None else taken.weight.detach())

    @torch.no_grad()
    def accuracy(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b e), (b) -> (): the share of all ranks' samples that are nearest to their own class.

        Samples with labels below 0 have no class and do not count; 0 if there are no others.
        """
        shard = self.shard()
        labels = gather(labels, shard.group)
        hits = shard.nearest(gather(embedding, shard.group)) == labels
        return hits.sum() / (labels >= 0).sum().clamp(min=1)


def rows_for(
    taps: Sequence[Tap],
    rows: Rows | None,
    tables: ClassTables,
    dtype: torch.dtype,
    inherited: "Inherited | None",
) -> TeacherRows | None:
    """Return this rank's rows for the losses of these taps; None if no loss needs them.

    dtype: that of the losses. inherited: the term that the host's head computes with the rows.
    """
    if rows is None or not any(tap.needs_classifier for tap in taps):
        return None
    losses = [tap.loss for tap in taps]
    head = tables.head
    compared = inherited is not None or any(tap.needs_head for tap in taps)
    if head is not None and (compared or head.group is not None):
        split = tables.beside_head(rows.total)
    else:
        learnt = any(hasattr(loss, "prepare") for loss in losses)
        split = tables.split(rows.total, learnt=learnt)
    kept = dtype if tables.frozen == torch.float32 else tables.frozen
    taken_by = head if inherited is not None and kept == dtype else None
    return TeacherRows(rows, split, losses, dtype, kept, taken_by)


@dataclass(frozen=True)
class Inherited:
    """A term that the host's own head computes, with the teacher's rows, not its own."""

    name: str
    weight: float
    rows: Callable[[], Tensor]  # reads this rank's rows (c e) of the teacher's classifier


def check_classes(rows: Rows | None, head: ClassShard | None) -> None:
    """Refuse a teacher with another number of classes than the trainer's head."""
    if rows is not None and head is not None and head.total != rows.total:
        raise KDHooksError(
            f"teacher classifier has {rows.total} classes, the trainer {head.total}; they must "
            "be the same classes in the same order"
        )


def left_to_host(
    taps: Sequence[Tap], rows: Rows | None, split: Callable[[int], ClassSplit]
) -> tuple[Inherited | None, tuple[Tap, ...]]:
    """Return the term that a margin softmax of the host computes, or None; and all other terms."""
    for tap in taps:
        if not (isinstance(tap, InheritedClassifier) and tap.weight != 0):
            continue
        if tap.host_conflict or any(True for _ in tap.loss.parameters()):
            reason = tap.host_conflict or "it has trainable parts of its own"
            raise KDHooksError(f"{tap.name}: the trainer's own head can't compute it; {reason}")
        if callable(tap.weight):
            raise KDHooksError(
                f"{tap.name}: its weight must be a number if the trainer's head computes it, "
                "since no other loss trains with the labels; set head = 'own' for a schedule"
            )
        assert rows is not None
        own = split(rows.total)
        read = partial(rows.slice, own.start, own.stop)
        others = tuple(other for other in taps if other is not tap)
        return Inherited(tap.name, tap.weight, read), others
    return None, tuple(taps)
