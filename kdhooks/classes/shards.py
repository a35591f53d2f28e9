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

    One process is the case with one shard and no group. Every method takes and returns the
    *global* batch: call `gather` first.
    """

    weight: Tensor
    offset: int
    total: int
    group: "dist.ProcessGroup | None" = None
    _lengths: "Lengths | None" = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle has no group, which is of this process."""
        return ClassShard, (self.weight, self.offset, self.total)

    def frozen(self) -> "ClassShard":
        """These rows, without a gradient of theirs."""
        if not self.weight.requires_grad:
            return self
        return replace(self, weight=self.weight.detach())

    def measured(self) -> "ClassShard":
        """These rows with their lengths, so that a loss computes them once, not in each chunk.

        Other rows, or rows that have changed since, are measured again when they are compared.
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
        """These rows, for a loss of the global batch that trains them.

        Backward differentiates the sum over ranks, and nobody takes the mean for a shard.
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

        `measure(embedding, chunk)` says by the scores of a chunk of classes what is wanted, so that
        those of all classes are never held. A sample's scores depend on its own embedding and on
        the chunk's rows; all else counts as constant.
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
        """(b e) -> these classes, as many at a time as `over_classes` compares the batch with."""
        for start, rows in row_chunks(embedding, self.weight, self.weight.requires_grad):
            yield self._slice(start, start + len(rows))

    def part(self, chunk: "ClassShard") -> "ClassShard":
        """The classes of another classifier's chunk, of this one."""
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
        """(b e), (b) -> (b): each sample's cosine with its own class, whichever rank holds it;
        0 where that is none.
        """
        rows, _, mine = self.own_rows(labels)
        cosine = (F.normalize(embedding) * F.normalize(rows.to(embedding.dtype))).sum(dim=1)
        return self.sum(cosine * mine)

    def nearest(self, embedding: Tensor) -> Tensor:
        """(b e) -> (b): the class, of those of all ranks, with the largest cosine; the first one
        of several.
        """
        best = embedding.new_full((len(embedding),), -torch.inf)
        winner = torch.zeros_like(best, dtype=torch.long)
        for chunk in self.chunks(embedding):
            cosine, index = chunk.cosines(embedding).max(dim=1)
            winner = torch.where(cosine > best, index + chunk.offset, winner)
            best = torch.maximum(best, cosine)
        return first_largest(best, winner, self.group)

    def add(self, values: Tensor, labels: Tensor, amount: Tensor) -> Tensor:
        """(b c), (b), (b) -> (b c): amount added at each sample's own class."""
        return values.scatter_add(1, *self._at_own(values, labels, amount))

    def add_(self, values: Tensor, labels: Tensor, amount: Tensor) -> Tensor:
        """The same in place, unless the rows are trained: their gradient needs the cosines."""
        if self.weight.requires_grad:
            return self.add(values, labels, amount)
        return values.scatter_add_(1, *self._at_own(values, labels, amount))

    def own_rows(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b) -> (b e), (b), (b): the row of each sample's class here, which of the rows that is,
        and whether it is the sample's own: else the class is another rank's.
        """
        index, mine = located(labels, self.offset, len(self.weight))
        return self.weight[index], index, mine

    def _at_own(self, values: Tensor, labels: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
        """(b c), (b), (b) -> (b 1), (b 1): own class as a column here, and the amount; 0 where
        another rank holds the class.
        """
        local = (labels - self.offset)[:, None]
        column = local.clamp(0, values.shape[1] - 1)
        return column, amount[:, None] * (local == column)


def located(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """(…) -> (…), (…): the row of each class among `count` classes from `start`, and whether the
    class is one of these.
    """
    local = labels - start
    return local.clamp(0, count - 1), (local >= 0) & (local < count)
