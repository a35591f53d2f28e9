"""Sums over more classes than memory should hold scores of: a chunk of classes at a time.

The scores (b c) of two million classes take a gigabyte, and a loss keeps many such matrices. Most
losses need a few sums over the classes alone, and those add up from chunk to chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from kdhooks.errors import KDHooksError

NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 25}  # of a chunk's rows, and of its scores


class Wanted(NamedTuple):
    """What to know of all classes, by the scores (b k) of some; -1e30 leaves a class out."""

    logs: Sequence[Tensor]  # z: log Σ_c exp(z_c)
    means: Sequence[tuple[Tensor, Tensor]] = ()  # v and a constant z: Σ_c softmax(z)_c · v_c


Measure: TypeAlias = Callable[[Tensor, Tensor, int], Wanted]
"""(embedding (b e), rows (k e), the first row's number) -> what is wanted.

A sample's scores depend on its own embedding and on these rows; all else is taken as constant.
"""


def over_rows(measure: Measure, embedding: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b e), (c e) -> (l b) logs, (m b) means, (m b) log Σ_c exp(z_c) of the z that they go by.

    In the embedding's own precision, whatever autocast is on. Differentiable once: a gradient of
    this gradient would be wrong.
    """
    if not torch.is_grad_enabled():
        embedding, rows = embedding.detach(), rows.detach()
    found: tuple[Tensor, Tensor, Tensor]
    found = _OverRows.apply(measure, embedding, rows)  # type: ignore[no-untyped-call]  # torch's
    return found


def chunk_size(embedding: Tensor) -> int:
    """(b e) -> how many rows to compare it with at a time."""
    numbers = NUMBERS.get(embedding.device.type, NUMBERS["cuda"])
    return max(1, numbers // max(embedding.shape))


class _Context(FunctionCtx):
    measure: Measure
    by_rows: bool
    sloped: list[int]
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _OverRows(torch.autograd.Function):
    """Where the rows are frozen, the gradient adds up beside the sums, (b e) for each of them.

    Where they are trained it needs the sums of all chunks, so that backward makes the scores again.
    """

    @staticmethod
    def forward(
        ctx: _Context, measure: Measure, embedding: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, by_embedding, ctx.by_rows = ctx.needs_input_grad
        if ctx.by_rows:
            ctx.measure = measure
        x = embedding.detach().requires_grad_(by_embedding and not ctx.by_rows)
        total = values = x.new_empty(0, 0)
        slopes: dict[int, Tensor] = {}
        logs = 0
        for start, w in row_chunks(x, rows.detach()):
            with _apart(x, x.requires_grad):
                wanted = measure(x, w, start)
                numbers = _numbers(wanted)
                steps = _slopes(numbers, x)
            under = torch.stack([number.log for number in numbers])
            part = torch.stack([(number.p * number.v.detach()).sum(dim=1) for number in numbers])
            if not logs:
                logs, total = len(wanted.logs), torch.full_like(under, -torch.inf)
                values = torch.zeros_like(under)
            before, total = total, torch.logaddexp(total, under)
            old, new = (before - total).exp(), (under - total).exp()
            values = old * values + new * part
            for index, slope in steps.items():
                slope = new[index, :, None] * slope
                if index in slopes:
                    slope += old[index, :, None] * slopes[index]
                slopes[index] = slope
        ctx.sloped = list(slopes)
        ctx.save_for_backward(*((embedding, rows, total) if ctx.by_rows else slopes.values()))
        found = total[:logs], values[logs:], total[logs:]
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's types
        ctx: _Context, by_logs: Tensor, by_means: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient = torch.cat([by_logs, by_means])
        if not ctx.by_rows:
            pairs = zip(ctx.sloped, ctx.saved_tensors, strict=True)
            parts = [gradient[index, :, None] * slope for index, slope in pairs]
            return None, torch.stack(parts).sum(dim=0), None
        embedding, rows, total = ctx.saved_tensors
        by_embedding, by_rows = torch.zeros_like(embedding), torch.empty_like(rows)
        for start, piece in row_chunks(embedding, rows):
            x, w = embedding.detach().requires_grad_(), piece.detach().requires_grad_()
            with _apart(x, True):
                found = _gradients(ctx.measure(x, w, start), gradient, total, (x, w))
            by_embedding += found[0]
            by_rows[start : start + len(w)] = found[1]
        return None, by_embedding, by_rows


def row_chunks(embedding: Tensor, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(b e), (c e) -> the first row's number and the rows (k e) of each chunk."""
    size = chunk_size(embedding)
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


@contextmanager
def _apart(x: Tensor, grad: bool) -> Iterator[None]:
    """A graph of our own: without autocast, and with none of the hooks of a graph around it."""
    # Detached, since an output that its own graph keeps would never be let go of.
    as_they_are = saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
    with torch.set_grad_enabled(grad), torch.autocast(x.device.type, enabled=False), as_they_are:
        yield


class _Number(NamedTuple):
    """What is wanted, of one chunk: Σ_c p_c · v_c with p = softmax(z), or log Σ_c exp(z_c).

    The gradient of both is Σ_c p_c times that of v_c: v of a logarithm is z.
    """

    v: Tensor  # (b k)
    p: Tensor  # (b k)
    log: Tensor  # (b): log Σ_c exp(z_c)


def _numbers(wanted: Wanted) -> list[_Number]:
    if any(z.requires_grad for _, z in wanted.means):
        raise KDHooksError("chunks: a mean must go by a constant z; detach it, or ask for its log")
    pairs = [*((z, z) for z in wanted.logs), *wanted.means]
    once = {id(z): z.detach() for _, z in pairs}  # a z may be wanted several times
    found = {key: _softmax(z) for key, z in once.items()}
    return [_Number(v, *found[id(z)]) for v, z in pairs]


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(b k) -> (b k), (b): softmax(z) and log Σ exp(z).

    Not by torch.logsumexp, whose exp takes a processor ten times as long where it underflows.
    """
    p = z.softmax(dim=1)
    return p, z.amax(dim=1) - p.amax(dim=1).log()


def _slopes(numbers: Sequence[_Number], x: Tensor) -> dict[int, Tensor]:
    """Of each number that depends on x, each sample's gradient (b e)."""
    return {
        index: torch.autograd.grad(number.v, x, number.p, retain_graph=True)[0]
        for index, number in enumerate(numbers)
        if number.v.requires_grad
    }


def _gradients(
    wanted: Wanted, gradient: Tensor, total: Tensor, inputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """(m b), (m b) log Σ exp(z) of all classes -> a chunk's part of the gradient by each input."""
    trained = [
        (number.v, (by * (number.log - log).exp())[:, None] * number.p)
        for number, by, log in zip(_numbers(wanted), gradient, total, strict=True)
        if number.v.requires_grad
    ]
    outputs, weights = zip(*trained, strict=True)
    return torch.autograd.grad(outputs, inputs, weights)
