"""Classifiers whose classes are split over ranks: one rank's shard and its softmax."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdhooks.classes.chunked_sums import Wanted, over_rows, row_chunks
from kdhooks.classes.cosines import Cosines, Lengths, lengths_of
from kdhooks.classes.ranks import first_largest, gather, summed


@dataclass(frozen=True)
class ClassShard:
    """This rank's rows (c e) of a classifier with `total` classes, split over `group`.

    Without a group, the shard holds all classes. Every method takes and returns the *global*
    batch: call `gather` first.
    """

    weight: Tensor
    offset: int
    total: int
    group: "dist.ProcessGroup | None" = None
    _lengths: "Lengths | None" = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles lose the group, which belongs to this process."""
        return ClassShard, (self.weight, self.offset, self.total)

    def frozen(self) -> "ClassShard":
        """The shard with detached rows."""
        if not self.weight.requires_grad:
            return self
        return replace(self, weight=self.weight.detach())

    def measured(self) -> "ClassShard":
        """The shard with the lengths of its rows, which a loss then computes once for all chunks.

        Rows that have been replaced or changed since are measured again.
        """
        if self._known_lengths() is not None:
            return self
        return replace(self, _lengths=Lengths.of(self.weight))

    def _known_lengths(self) -> Tensor | None:
        """(c), unless the rows have been replaced or have changed since they were measured."""
        known = self._lengths
        return known.values if known is not None and known.are_of(self.weight) else None

    def _row_lengths(self) -> Tensor:
        """(c)."""
        known = self._known_lengths()
        return lengths_of(self.weight.detach()) if known is None else known

    def trained(self) -> "ClassShard":
        """The shard for a loss of the global batch that trains its rows.

        The backward pass differentiates the sum over ranks. DDP does not average the gradients of a
        shard, so they are divided by the number of ranks here.
        """
        if self.group is None or not self.weight.requires_grad:
            return self
        size, weight = dist.get_world_size(self.group), self.weight.view_as(self.weight)
        weight.register_hook(lambda gradient: gradient / size)
        return replace(self, weight=weight)

    def gather(self, embedding: Tensor) -> Tensor:
        """(b d) -> (w·b d): the batches of all ranks, differentiable."""
        return gather(embedding, self.group)

    def cosines(self, embedding: Tensor, scale: float = 1.0) -> Tensor:
        """(b e) -> (b c): margin-free cosines with this rank's rows, times scale.

        Differentiable once: torch refuses a gradient of this gradient.
        """
        rows, lengths = self.weight.to(embedding.dtype), self._row_lengths()
        cosines: Tensor = Cosines.apply(embedding, rows, lengths, scale)  # type: ignore[no-untyped-call]
        return cosines

    def over_classes(
        self, measure: Callable[[Tensor, "ClassShard"], Wanted], embedding: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(b e) -> logs and means, (b) each, over the classes of all ranks; differentiable.

        `measure(embedding, chunk)` computes the scores of a chunk of classes and returns the sums
        that are wanted of them, so that the scores of all classes are never in memory together. A
        sample's scores may depend on its own embedding and on the chunk's rows; everything else
        counts as constant.
        """

        lengths = self._row_lengths()

        def of_rows(x: Tensor, rows: Tensor, start: int) -> Wanted:
            own = Lengths.of(rows, lengths[start : start + len(rows)])
            return measure(x, ClassShard(rows, self.offset + start, self.total, _lengths=own))

        logs, means, under = over_rows(of_rows, embedding, self.weight)
        shares = [(z - self.logsumexp(z)).exp() for z in under]
        return (
            tuple(self.logsumexp(z) for z in logs),
            tuple(self.sum(share * mean) for share, mean in zip(shares, means, strict=True)),
        )

    def chunks(self, embedding: Tensor) -> "Iterator[ClassShard]":
        """(b e) -> the classes in chunks, of the size that `over_classes` uses for this batch."""
        for start, rows in row_chunks(embedding, self.weight, self.weight.requires_grad):
            yield self._slice(start, start + len(rows))

    def part(self, chunk: "ClassShard") -> "ClassShard":
        """The rows of this classifier for the classes of another classifier's chunk."""
        start = chunk.offset - self.offset
        return self._slice(start, start + len(chunk.weight))

    def _slice(self, start: int, stop: int) -> "ClassShard":
        known, rows = self._known_lengths(), self.weight[start:stop]
        own = None if known is None else Lengths.of(rows, known[start:stop])
        return ClassShard(rows, self.offset + start, self.total, _lengths=own)

    def logsumexp(self, z: Tensor) -> Tensor:
        """(b) -> (b): over all ranks."""
        if self.group is None:
            return z
        peak = z.detach().clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, self.group)
        return self.sum((z - peak).exp()).log() + peak

    def sum(self, values: Tensor) -> Tensor:
        """(…) -> (…): over all ranks."""
        return summed(values, self.group)

    def own(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b e), (b) -> (b): each sample's cosine with its own class, from the rank that holds it;
        0 for a sample without a class.
        """
        rows, _, mine = self.own_rows(labels)
        cosine = (F.normalize(embedding) * F.normalize(rows.to(embedding.dtype))).sum(dim=1)
        return self.sum(cosine * mine)

    def nearest(self, embedding: Tensor) -> Tensor:
        """(b e) -> (b): the class with the largest cosine among those of all ranks; the first one
        if several are equal.
        """
        best = embedding.new_full((len(embedding),), -torch.inf)
        winner = torch.zeros_like(best, dtype=torch.long)
        for chunk in self.chunks(embedding):
            cosine, index = chunk.cosines(embedding).max(dim=1)
            winner = torch.where(cosine > best, index + chunk.offset, winner)
            best = torch.maximum(best, cosine)
        return first_largest(best, winner, self.group)

    def add(self, values: Tensor, labels: Tensor, amount: Tensor) -> Tensor:
        """(b c), (b), (b) -> (b c): add an amount to each sample's score with its own class."""
        return values.scatter_add(1, *self._at_own(values, labels, amount))

    def add_(self, values: Tensor, labels: Tensor, amount: Tensor) -> Tensor:
        """Like `add`; in place unless the rows are trained, whose gradient needs the cosines."""
        if self.weight.requires_grad:
            return self.add(values, labels, amount)
        return values.scatter_add_(1, *self._at_own(values, labels, amount))

    def own_rows(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b) -> (b e), (b), (b): the row of each sample's class, its local number, and whether
        this rank holds that class; if not, the row is any other.
        """
        index, mine = located(labels, self.offset, len(self.weight))
        return self.weight[index], index, mine

    def _at_own(self, values: Tensor, labels: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
        """(b c), (b), (b) -> (b 1), (b 1): the local column of each sample's class, and the amount,
        which is 0 if another rank holds the class.
        """
        local = (labels - self.offset)[:, None]
        column = local.clamp(0, values.shape[1] - 1)
        return column, amount[:, None] * (local == column)


def located(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """(…) -> (…), (…): the row of each class among the `count` classes from `start` on, and
    whether the class is among them; if not, the row is any other.
    """
    local = labels - start
    return local.clamp(0, count - 1), (local >= 0) & (local < count)
