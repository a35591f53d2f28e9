"""Cosines of embeddings with classifier rows whose lengths are known."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kdhooks.classes.chunked_sums import refuse_second_gradient

_LEAST = 1e-12  # a length that divides is at least this, as in F.normalize


class _Context(FunctionCtx):
    scale: float
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class Cosines(torch.autograd.Function):
    """scale · cos. The product is divided by the rows' lengths, because the rows themselves are
    usually the larger matrix.
    """

    @staticmethod
    def forward(ctx: _Context, x: Tensor, rows: Tensor, lengths: Tensor, scale: float) -> Tensor:
        """(b e), (c e), (c) -> (b c)."""
        length = lengths_of(x)[:, None].to(x.dtype)
        unit = x / length
        cosines = (unit @ rows.T).div_(lengths / scale if scale else torch.inf)
        ctx.scale = scale
        trained = [cosines] if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(rows, lengths, unit, length, *trained)
        return cosines

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the base's types
        ctx: _Context, gradient: Tensor
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


class Lengths(NamedTuple):
    """Lengths (c) of rows, with the rows and their version at that time."""

    values: Tensor
    rows: Tensor
    version: int

    @classmethod
    def of(cls, rows: Tensor, values: Tensor | None = None) -> "Lengths":
        return cls(lengths_of(rows.detach()) if values is None else values, rows, _version(rows))

    def are_of(self, rows: Tensor) -> bool:
        return rows is self.rows and _version(rows) == self.version


def _version(tensor: Tensor) -> int:
    """-1 for an inference tensor, which has no version and cannot change outside of its mode."""
    return -1 if tensor.is_inference() else tensor._version


def lengths_of(rows: Tensor) -> Tensor:
    """(c e) -> (c), in float32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).clamp_(min=_LEAST)
    return lengths
