"""Products of each sample with the rows of some classes, on the ranks that hold them."""

from collections.abc import Iterator

import torch
from einops import einsum
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kdhooks.classes.chunked_sums import refuse_second_gradient
from kdhooks.classes.splits import ClassSplit

_NUMBERS = 1 << 23  # in the rows that are in memory at the same time


def relations(
    x: Tensor, rows: Tensor, classes: Tensor, split: ClassSplit, *, moving: bool = False
) -> Tensor:
    """(b e), (c e), (b k) -> (b k): x · row of each class; 0 for -1 and for other ranks' classes.

    The sum over the ranks has all products. moving: whether the rows change before the backward
    pass; a copy of them (b k e) is then kept. Only x gets a gradient, and only a first one.
    """
    places, mine = split.places(classes)
    if moving:
        return einsum(x, rows[places].to(x), "b e, b k e -> b k") * mine
    found: Tensor = _Relations.apply(x, rows, places, mine)  # type: ignore[no-untyped-call]
    return found


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]


class _Relations(torch.autograd.Function):
    """Works on a part of the samples at a time, and looks rows up again in the backward pass."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, rows: Tensor, places: Tensor, mine: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places, mine)
        found = x.new_empty(places.shape)
        for part, near in _looked_up(x, rows, places):
            found[part] = einsum(x[part], near, "b e, b k e -> b k")
        return found.mul_(mine)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the base's types
        ctx: _Context, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_gradient()
        rows, places, mine = ctx.saved_tensors
        gradient = gradient * mine
        by_x = gradient.new_empty(len(gradient), rows.shape[1])
        for part, near in _looked_up(gradient, rows, places):
            by_x[part] = einsum(gradient[part], near, "b k, b k e -> b e")
        return by_x, None, None, None


def _looked_up(like: Tensor, rows: Tensor, places: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the samples, each with the rows (p k e) of its classes, in the dtype of `like`."""
    size = max(1, _NUMBERS // max(1, places.shape[1] * rows.shape[1]))
    for start in range(0, len(places), size):
        part = slice(start, start + size)
        yield part, rows[places[part]].to(like.dtype)
