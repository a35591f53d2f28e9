"""Classifiers whose classes are split over ranks: rows on disk, one rank's shard, its softmax.

The convention of every collective here: each rank ends up with the same loss of the global
batch, and its backward differentiates the sum over ranks, so that the mean that DDP takes of the
gradients is the gradient of that loss, with factor exactly 1.
"""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kdhooks.classes.chunked_sums import Wanted, over_rows, refuse_second_gradient, row_chunks
from kdhooks.errors import KDHooksError

_LEAST = 1e-12  # a length that divides is at least this, as in F.normalize


class Rows:
    """The rows (c e) of a teacher's classifier, or its class means; read by slice.

    Files are memory-mapped, so a rank that needs only its own classes never holds the others.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        self.total = sum(len(part) for part in self._parts)
        self.dim = int(self._parts[0].shape[1])

    @classmethod
    def open(cls, source: "Tensor | str | Path | Rows") -> "Rows":
        """From a tensor (c e), a file, or a glob of `checkpoint_gpu_{rank}.pt` shards."""
        if isinstance(source, Rows):
            return source
        if isinstance(source, Tensor):
            return cls([_checked(source, "the tensor given")])
        paths = _in_rank_order(str(source))
        parts = [_read(path) for path in paths]
        _check_one_run(parts, paths)
        return cls(parts)

    def slice(self, start: int, stop: int) -> Tensor:
        """(stop-start e) in float32, a copy."""
        pieces, offset = [], 0
        for part in self._parts:
            low, high = max(start - offset, 0), min(stop - offset, len(part))
            if low < high:
                pieces.append(part[low:high].float())
            offset += len(part)
        return torch.cat(pieces) if pieces else torch.empty(0, self.dim)

    def chunks(self, size: int = 65536) -> Iterator[tuple[int, Tensor]]:
        """(offset, (<=size e)) over all rows, unit length."""
        for start in range(0, self.total, size):
            yield start, F.normalize(self.slice(start, min(start + size, self.total)))

    def nearest(self, embedding: Tensor) -> Tensor:
        """(b e) -> (b): the class whose row has the largest cosine with each embedding."""
        best = embedding.new_full((len(embedding),), -2.0)
        winner = torch.zeros(len(embedding), dtype=torch.long, device=embedding.device)
        unit = F.normalize(embedding)
        for start, rows in self.chunks():
            value, index = (unit @ rows.to(unit).T).max(dim=1)
            winner = torch.where(value > best, index + start, winner)
            best = torch.maximum(best, value)
        return winner


def _in_rank_order(pattern: str) -> list[Path]:
    literal = Path(pattern).expanduser()
    if literal.is_file():  # whatever its name means as a glob
        return [literal]
    paths = [Path(p) for p in glob.glob(str(literal))]
    if not paths:
        raise KDHooksError(
            f"teacher classifier: no file matches '{pattern}'; name a tensor file (c e), or the "
            "trainer's shards as …/checkpoint_gpu_*.pt (config.save_all_states writes them)"
        )
    if len(paths) == 1:
        return paths
    ranks = {_rank(path): path for path in paths}
    if sorted(ranks) != list(range(len(paths))):
        found = ", ".join(path.name for path in sorted(paths))
        raise KDHooksError(
            f"teacher classifier: shards must be numbered 0 to {len(paths) - 1} without a gap; "
            f"found {found}"
        )
    return [ranks[rank] for rank in range(len(paths))]


def _rank(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1


def _read(path: Path) -> Tensor:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise KDHooksError(
            f"teacher classifier: '{path}' is not a file that torch.save wrote ({error})"
        ) from error
    for key in ("state_dict_softmax_fc", "weight"):
        if isinstance(content, dict):
            content = content.get(key, content)
    if not isinstance(content, Tensor):
        raise KDHooksError(
            f"teacher classifier: '{path}' holds no rows; expected a tensor (c e), a state dict "
            "with 'weight', or arcface_torch's checkpoint_gpu_{rank}.pt"
        )
    return _checked(content, f"'{path}'")


def _checked(rows: Tensor, where: str) -> Tensor:
    if rows.ndim != 2 or not rows.is_floating_point() or not len(rows):
        raise KDHooksError(
            f"teacher classifier: rows must be a floating point matrix (c e); {where} has shape "
            f"{tuple(rows.shape)} and dtype {rows.dtype}"
        )
    return rows.detach()


def _check_one_run(parts: Sequence[Tensor], paths: Sequence[Path]) -> None:
    """Contiguous splits of one classifier: the first ranks own one row more, widths agree."""
    sizes = [len(part) for part in parts]
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1 or sizes != sorted(sizes, reverse=True) or sizes[0] - sizes[-1] > 1:
        shapes = ", ".join(
            f"{path.name} {tuple(part.shape)}" for path, part in zip(paths, parts, strict=True)
        )
        raise KDHooksError(
            f"teacher classifier: shards of one run differ by one row at most; found {shapes}"
        )


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
    _lengths: "_Lengths | None" = field(default=None, repr=False, compare=False)

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
        return replace(self, _lengths=_Lengths.of(self.weight))

    def _known_lengths(self) -> Tensor | None:
        """(c), unless the rows have been replaced or have changed since they were measured."""
        known = self._lengths
        return known.values if known is not None and known.are_of(self.weight) else None

    def _row_lengths(self) -> Tensor:
        """(c)."""
        known = self._known_lengths()
        return _lengths(self.weight.detach()) if known is None else known

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
        cosines: Tensor = _Cosines.apply(embedding, rows, lengths, scale)  # type: ignore[no-untyped-call]
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
            own = _Lengths.of(rows, lengths[start : start + len(rows)])
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
        own = None if known is None else _Lengths.of(rows, known[start:stop])
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
        if self.group is None:
            return values
        summed: Tensor = _Sum.apply(values, self.group)  # type: ignore[no-untyped-call]  # torch's
        return summed

    def own(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b e), (b) -> (b): each sample's cosine with its own class, whichever rank holds it;
        0 where that is none.
        """
        rows, _, mine = self.own_rows(labels)
        cosine = (F.normalize(embedding) * F.normalize(rows.to(embedding.dtype))).sum(dim=1)
        return self.sum(cosine * mine)

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
        local = labels - self.offset
        mine = (local >= 0) & (local < len(self.weight))
        index = local.clamp(0, len(self.weight) - 1)
        return self.weight[index], index, mine

    def _at_own(self, values: Tensor, labels: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
        """(b c), (b), (b) -> (b 1), (b 1): own class as a column here, and the amount; 0 where
        another rank holds the class.
        """
        local = (labels - self.offset)[:, None]
        column = local.clamp(0, values.shape[1] - 1)
        return column, amount[:, None] * (local == column)


def gather(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """(b …) -> (w·b …): the batches of all ranks in rank order, differentiable."""
    if group is None:
        return x
    gathered: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]  # torch's
    return gathered


def world() -> "dist.ProcessGroup | None":
    """All ranks, for state that every rank must agree on; None where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


# Our own, since those of torch.distributed.nn are deprecated and what follows them is private.


class _Context(FunctionCtx):
    group: "dist.ProcessGroup"


class _CosinesContext(FunctionCtx):
    scale: float
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _Cosines(torch.autograd.Function):
    """scale · cos. Divides the product by the rows' lengths, and not the rows, which are usually
    the larger matrix.
    """

    @staticmethod
    def forward(
        ctx: _CosinesContext, x: Tensor, rows: Tensor, lengths: Tensor, scale: float
    ) -> Tensor:
        """(b e), (c e), (c) -> (b c)."""
        length = _lengths(x)[:, None].to(x.dtype)
        unit = x / length
        cosines = (unit @ rows.T).div_(lengths / scale if scale else torch.inf)
        ctx.scale = scale
        trained = [cosines] if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(rows, lengths, unit, length, *trained)
        return cosines

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the base's types
        ctx: _CosinesContext, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_gradient()
        rows, lengths, unit, length, *trained = ctx.saved_tensors
        gradient = (gradient / lengths).to(rows.dtype)
        by_x = by_rows = None
        if ctx.needs_input_grad[0]:
            by_x = gradient @ rows
            along = (by_x * unit).sum(dim=1, keepdim=True)
            by_x.addcmul_(unit, along, value=-1).mul_(ctx.scale / length)
        if trained:
            along = ((gradient * trained[0]).sum(dim=0) / lengths).to(rows.dtype)
            by_rows = gradient.T @ (unit * ctx.scale)
            by_rows.addcmul_(rows, along[:, None], value=-1)
        return by_x, by_rows, None, None


class _Lengths(NamedTuple):
    """Lengths (c) of rows, and which rows these were, in which version."""

    values: Tensor
    rows: Tensor
    version: int

    @classmethod
    def of(cls, rows: Tensor, values: Tensor | None = None) -> "_Lengths":
        return cls(_lengths(rows.detach()) if values is None else values, rows, _version(rows))

    def are_of(self, rows: Tensor) -> bool:
        return rows is self.rows and _version(rows) == self.version


def _version(tensor: Tensor) -> int:
    """An inference tensor has none, and cannot be changed outside of its mode."""
    return -1 if tensor.is_inference() else tensor._version


def _lengths(rows: Tensor) -> Tensor:
    """(c e) -> (c), in float32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).clamp_(min=_LEAST)
    return lengths


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, values: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group, x = group, x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = _summed(gradients[0], ctx.group).chunk(dist.get_world_size(ctx.group))
        return parts[dist.get_rank(ctx.group)], None


def _summed(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total
