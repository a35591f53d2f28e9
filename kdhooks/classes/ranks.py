"""What several ranks compute together: sums, gatherings, means, and answers to the same question.

All differentiable collectives here follow one convention: each rank computes the same loss of the
global batch, and its backward pass differentiates the sum over the ranks. The mean that DDP takes
of the gradients is then the gradient of that loss, with a factor of exactly 1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kdhooks.errors import KDHooksError

T = TypeVar("T")


def first_largest(value: Tensor, index: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """(b), (b) -> (b): the index of the largest value on any rank; the least index if several."""
    if group is None:
        return index
    peak = value.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    winner = torch.where(value == peak, index, torch.iinfo(index.dtype).max)
    dist.all_reduce(winner, dist.ReduceOp.MIN, group)
    return winner


before_gathering: ContextVar[Callable[[dist.ProcessGroup], None] | None] = ContextVar(
    "before_gathering", default=None
)
"""A function to call with the group before each gathering; it may refuse uneven batches."""


class _Known(NamedTuple):
    x: Tensor  # kept alive, so that no other tensor gets its id
    gathered: Tensor
    version: int


_known: ContextVar[dict[tuple[int, int, bool], _Known] | None] = ContextVar("known", default=None)


@contextmanager
def gathering_once() -> Iterator[None]:
    """Losses inside that gather the same tensor share one gathering and one gradient."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def gather(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """(b …) -> (w·b …): the batches of all ranks in rank order, differentiable."""
    if group is None:
        return x
    known, key = _known.get(), (id(x), id(group), torch.is_grad_enabled())
    before = None if known is None else known.get(key)
    if before is not None and before.gathered._version == before.version:
        return before.gathered
    if check := before_gathering.get():
        check(group)
    gathered: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]  # torch's
    if known is not None:
        known[key] = _Known(x, gathered, gathered._version)
    return gathered


def summed(values: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """(…) -> (…): over all ranks, differentiable."""
    if group is None:
        return values
    total: Tensor = _Sum.apply(values, group)  # type: ignore[no-untyped-call]  # torch's
    return total


def mean_of_ranks(counts: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """(…) -> (…), in float64: the mean over the ranks; without a gradient.

    A rank divides the sum over its own samples by the mean number of samples. The mean of these
    quotients, which DDP makes of their gradients, is the mean over the samples of all ranks.
    """
    counts = counts.detach().double()
    if group is None:
        return counts
    return _summed(counts, group) / dist.get_world_size(group)


def world() -> "dist.ProcessGroup | None":
    """The group of all ranks; None if there is only one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


# --- set-up ------------------------------------------------------------------------------------


def answers(mine: T) -> list[T]:
    """The answers of all ranks to one question, in rank order; all ranks ask it together.

    Raises KDHooksError on every rank if a rank has failed instead, inside of `failing_together`.
    It waits for the ranks, and on a GPU for the device, so it is for the set-up and for saving.
    """
    if world() is None:
        return [mine]
    found: list[tuple[T, str]] = [(mine, "")] * dist.get_world_size()
    dist.all_gather_object(found, (mine, ""))
    for rank, (_, failure) in enumerate(found):
        if failure:
            raise _FailedElsewhere(f"rank {rank} has failed: {failure}")
    return [answer for answer, _ in found]


class _FailedElsewhere(KDHooksError):
    """Every rank raises this one by itself."""


@contextmanager
def failing_together() -> Iterator[None]:
    """An error of this rank inside becomes an error of all ranks, at their next `answers`.

    Otherwise they would wait for this one.
    """
    try:
        yield
    except _FailedElsewhere:
        raise
    except Exception as error:
        if world() is not None:
            failure = str(error) or type(error).__name__
            found: list[object] = [None] * dist.get_world_size()
            dist.all_gather_object(found, (None, failure))
        raise


# --- autograd ----------------------------------------------------------------------------------

# They are our own because torch.distributed.nn's are deprecated and their successors private.


class _Context(FunctionCtx):
    group: "dist.ProcessGroup"


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
