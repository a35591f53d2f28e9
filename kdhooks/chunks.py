"""Losses over more classes than memory should hold scores of: a chunk of classes at a time.

The scores (b c) of two million classes take a gigabyte, and a loss keeps many such matrices. Most
losses need a few sums over the classes alone, and those add up from chunk to chunk.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Measure: TypeAlias = Callable[[Tensor, Tensor, int], Sequence[Tensor]]
"""(embedding (b e), rows (k e), the first row's number) -> m numbers of each sample, (b) each.

They depend on that sample's embedding and on these rows; all else is taken as constant.
"""

NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 25}  # of a chunk's rows, and of its scores
CHUNKS = 64  # at most, since a gradient (b e) is kept of each


def measured(measure: Measure, embedding: Tensor, rows: Tensor) -> Tensor:
    """(b e), (c e) -> (m n b): what `measure` finds in each of n chunks of rows.

    Differentiable once: a gradient of this gradient would be wrong.
    """
    size = chunk_size(embedding, rows)
    found: Tensor = _Measured.apply(measure, embedding, rows, size)  # type: ignore[no-untyped-call]
    return found


def chunk_size(embedding: Tensor, rows: Tensor) -> int:
    """(b e), (c e) -> how many rows to compare with at a time."""
    numbers = NUMBERS.get(embedding.device.type, NUMBERS["cuda"])
    return max(1, numbers // max(embedding.shape), -(-len(rows) // CHUNKS))


class _Context(FunctionCtx):
    measure: Measure
    size: int
    slopes: list[tuple[int, int, Tensor]]
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _Measured(torch.autograd.Function):
    """Where the rows are frozen, gradients are taken on the way: (b e) for each number and chunk.

    The gradient of rows that are trained needs the sums over all chunks, so that backward measures
    each chunk again.
    """

    @staticmethod
    def forward(
        ctx: _Context, measure: Measure, embedding: Tensor, rows: Tensor, size: int
    ) -> Tensor:
        ctx.measure, ctx.size, ctx.slopes = measure, size, []
        _, by_embedding, by_rows, _ = ctx.needs_input_grad
        if by_rows:
            ctx.save_for_backward(embedding, rows)
        x, w = embedding.detach().requires_grad_(by_embedding and not by_rows), rows.detach()
        numbers = []
        for chunk, start in enumerate(range(0, len(w), size)):
            with torch.set_grad_enabled(x.requires_grad):
                found = measure(x, w[start : start + size], start)
            for index, number in enumerate(found):
                if number.requires_grad:
                    one = torch.ones_like(number)
                    (slope,) = torch.autograd.grad(number, x, one, retain_graph=True)
                    ctx.slopes.append((index, chunk, slope))
            numbers.append(torch.stack([number.detach() for number in found]))
        return torch.stack(numbers, dim=1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's types
        ctx: _Context, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.slopes:
            parts = [gradient[m, n][:, None] * slope for m, n, slope in ctx.slopes]
            return None, sum(parts[1:], start=parts[0]), None, None
        embedding, rows = ctx.saved_tensors
        by_embedding, by_rows = torch.zeros_like(embedding), torch.empty_like(rows)
        for chunk, start in enumerate(range(0, len(rows), ctx.size)):
            piece = slice(start, start + ctx.size)
            with torch.enable_grad():
                x, w = embedding.detach().requires_grad_(), rows[piece].detach().requires_grad_()
                numbers = torch.stack(list(ctx.measure(x, w, start)))
            found = torch.autograd.grad(numbers, (x, w), gradient[:, chunk])
            by_embedding += found[0]
            by_rows[piece] = found[1]
        return None, by_embedding, by_rows, None
