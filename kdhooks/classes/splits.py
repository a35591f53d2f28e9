"""Which rank holds which classes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdhooks.classes.ranks import answers, gather, summed, world
from kdhooks.classes.shards import ClassShard, located


@dataclass(frozen=True)
class ClassSplit:
    """This rank's classes, range(start, stop). The ranks of `group` share all classes.

    Without a group, this rank holds all of them.
    """

    start: int
    stop: int
    total: int
    group: "dist.ProcessGroup | None" = None

    @classmethod
    def whole(cls, total: int) -> "ClassSplit":
        return cls(0, total, total)

    @classmethod
    def of(cls, shard: ClassShard) -> "ClassSplit":
        """The split of a shard's rows."""
        return cls(shard.offset, shard.offset + len(shard.weight), shard.total, shard.group)

    @classmethod
    def even(cls, total: int, group: "dist.ProcessGroup | None") -> "ClassSplit":
        """An even split, as in arcface_torch: the first ranks hold one class more than the others.

        If there are fewer classes than ranks, every rank holds all of them.
        """
        if group is None or total < dist.get_world_size(group):
            return cls.whole(total)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        share, more = divmod(total, size)
        start = rank * share + min(rank, more)
        return cls(start, start + share + (rank < more), total, group)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles lose the group, which belongs to this process."""
        return ClassSplit, (self.start, self.stop, self.total)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_part_alone(self) -> bool:
        """Whether this is the split of a copy, which has lost the group."""
        return self.group is None and len(self) < self.total

    def shard(self, rows: Tensor) -> ClassShard:
        """The shard with this rank's rows (c e)."""
        return ClassShard(rows, self.start, self.total, self.group)

    def of_all(self, x: Tensor) -> Tensor:
        """(b …) -> (w·b …): the batches of the ranks that share the classes, differentiable."""
        return gather(x, self.group)

    def own(self, x: Tensor, size: int) -> Tensor:
        """(w·b …) -> (b …): this rank's batch, of `size` samples, among those of the ranks."""
        if self.group is None:
            return x
        rank = dist.get_rank(self.group)
        return x[rank * size : (rank + 1) * size]

    def sum(self, values: Tensor) -> Tensor:
        """(…) -> (…): over the ranks that share the classes, differentiable."""
        return summed(values, self.group)

    def places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(…) -> (…), (…): the local row of each class, and whether this rank holds the class."""
        return located(labels, self.start, len(self))

    def on_any_rank(self, found: bool) -> bool:
        """Whether any rank has found something; all ranks ask this together."""
        return found if self.group is None else any(answers(found))


@dataclass(frozen=True)
class ClassTables:
    """How the methods of a run store their class tables."""

    head: ClassShard | None = None  # the student's own classifier
    sharded: bool = True
    learnt_whole: bool = False  # for a host that saves the state of only one rank
    frozen: torch.dtype = torch.float32  # the dtype of frozen class rows

    def split(self, total: int, *, learnt: bool = False) -> ClassSplit:
        """How to split a table of `total` classes. learnt: whether training changes the table.

        The split is that of the student's own classifier if it has one, or else an even split.
        """
        if not self.sharded or (learnt and self.learnt_whole):
            return ClassSplit.whole(total)
        if self.head is not None and self.head.group is not None and self.head.total == total:
            return self.beside_head(total)
        return ClassSplit.even(total, world())

    def beside_head(self, total: int) -> ClassSplit:
        """The split of the student's own classifier, for scores that are compared with its own."""
        return ClassSplit.whole(total) if self.head is None else ClassSplit.of(self.head)

    def described(self) -> list[str]:
        """Lines that are the same on all ranks of a run."""
        lines = [
            f"class tables with sharded = {self.sharded}, learnt_whole = {self.learnt_whole} and "
            f"rows in {self.frozen}"
        ]
        if self.head is not None:
            split = "whole" if self.head.group is None else "split"
            lines.append(f"a {split} classifier of the student with {self.head.total} classes")
        return lines
