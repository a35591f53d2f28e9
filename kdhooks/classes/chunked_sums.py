"""Sums over all classes, whose scores are computed for a chunk of classes at a time.

The scores (b c) of two million classes take a gigabyte, and a loss keeps many such matrices. Most
losses need only a few sums over the classes, which can be added up from chunk to chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks

from kdhooks.errors import KDHooksError

# The most numbers in a chunk's rows, and in its scores. On a CPU they should fit into the cache. On
# a GPU each chunk costs the host about fifty launches; trained rows need more memory.
NUMBERS = {"cpu": 1 << 20, "cuda": 3 << 25, "cuda, trained": 1 << 26}


class Wanted(NamedTuple):
    """The sums that are wanted over all classes, from the scores (b k) of a chunk.

    A score of -1e30 or -inf leaves its class out.
    """

    logs: Sequence[Tensor]  # z: log Σ_c exp(z_c)
    means: Sequence[tuple[Tensor, Tensor]] = ()  # finite v and a constant z: Σ softmax(z) · v


Measure: TypeAlias = Callable[[Tensor, Tensor, int], Wanted]
"""(embedding (b e), rows (k e), the number of the first row) -> the sums that are wanted.

A sample's scores may depend on its own embedding and on these rows; everything else counts as
constant.
"""


def over_rows(measure: Measure, embedding: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b e), (c e) -> (l b) logs, (m b) means, (m b) log Σ_c exp(z_c) for the z of each mean.

    Computed in the embedding's own precision, with or without autocast. A gradient of the gradient
    is refused.
    """
    if not torch.is_grad_enabled():
        embedding, rows = embedding.detach(), rows.detach()
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _OverRows.apply
    if torch.compiler.is_compiling():
        # Each chunk would be compiled again, up to the limit of recompilations, and a compiled
        # measure may refuse that several gradients are taken of it.
        apply = torch.compiler.disable(apply)  # pyright: ignore[reportAssignmentType]  # a function
    return apply(measure, embedding, rows)


def chunk_size(embedding: Tensor, trained: bool) -> int:
    """(b e) -> the number of rows in a chunk."""
    on_cpu = embedding.device.type == "cpu"
    numbers = NUMBERS["cpu" if on_cpu else "cuda, trained" if trained else "cuda"]
    return max(1, numbers // max(embedding.shape))


class _Context(FunctionCtx):
    measure: Measure
    by_rows: bool
    sloped: list[int]
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _OverRows(torch.autograd.Function):
    """If the rows are frozen, the gradient (b e) of each sum adds up together with the sum.

    If they are trained, the gradient needs the sums of all chunks first, so the backward pass
    computes the scores again.
    """

    @staticmethod
    def forward(
        ctx: _Context, measure: Measure, embedding: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, by_embedding, ctx.by_rows = ctx.needs_input_grad
        if ctx.by_rows:
            ctx.measure = measure
        x = embedding.detach().requires_grad_(by_embedding and not ctx.by_rows)
        logs, total, values = 0, x.new_empty(0, 0), x.new_empty(0, 0)
        slopes: dict[int, Tensor] = {}
        with _apart(x, x.requires_grad):
            for start, w in row_chunks(x, rows.detach(), ctx.by_rows):
                wanted = measure(x, w, start)
                numbers = _numbers(wanted)
                under = torch.stack([number.log for number in numbers])
                part = [(n.p * n.v.detach()).sum(dim=1) for n in numbers[len(wanted.logs) :]]
                means = torch.stack(part) if part else under[:0]
                steps = _slopes(numbers, x)
                if start == 0:
                    logs, total, values, slopes = len(wanted.logs), under, means, steps
                    continue
                share = torch.sigmoid(under - total)  # of this chunk among all so far
                share = torch.where(under == -torch.inf, 0, share)  # even if all are -inf so far
                total = torch.logaddexp(total, under)
                values = values.lerp(means, share[logs:])
                for index, slope in steps.items():
                    slopes[index].lerp_(slope, share[index, :, None])
        ctx.sloped = list(slopes)
        ctx.save_for_backward(*((embedding, rows, total) if ctx.by_rows else slopes.values()))
        found = total[:logs], values, total[logs:]
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the base's types
        ctx: _Context, by_logs: Tensor, by_means: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_gradient()
        gradient = torch.cat([by_logs, by_means])
        if not ctx.by_rows:
            pairs = zip(ctx.sloped, ctx.saved_tensors, strict=True)
            parts = [gradient[index, :, None] * slope for index, slope in pairs]
            return None, torch.stack(parts).sum(dim=0), None
        embedding, rows, total = ctx.saved_tensors
        by_embedding, by_rows = torch.zeros_like(embedding), torch.empty_like(rows)
        for start, piece in row_chunks(embedding, rows, trained=True):
            x, w = embedding.detach().requires_grad_(), piece.detach().requires_grad_()
            with _apart(x, True):
                found = _gradients(ctx.measure(x, w, start), gradient, total, (x, w))
            by_embedding += found[0]
            by_rows[start : start + len(w)] = found[1]
        return None, by_embedding, by_rows


def refuse_second_gradient() -> None:
    """For a backward pass, where grad mode is on only if a gradient of the gradient is wanted."""
    if torch.is_grad_enabled():
        raise KDHooksError(
            "scores over classes are differentiable once; found create_graph = True; take the "
            "gradient of the gradient without the methods that compare classes"
        )


def row_chunks(embedding: Tensor, rows: Tensor, trained: bool) -> Iterator[tuple[int, Tensor]]:
    """(b e), (c e) -> the number of the first row, and the rows (k e), of each chunk."""
    size = chunk_size(embedding, trained)
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


@contextmanager
def _apart(x: Tensor, grad: bool) -> Iterator[None]:
    """A separate graph: without autocast, and without the hooks of an outer graph."""
    # Detached, since an output that its own graph holds would never be freed.
    as_they_are = saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
    with torch.set_grad_enabled(grad), torch.autocast(x.device.type, enabled=False), as_they_are:
        yield


class _Number(NamedTuple):
    """One sum over a chunk: Σ_c p_c · v_c with p = softmax(z), or log Σ_c exp(z_c).

    The gradient of both is Σ_c p_c times the gradient of v_c. For a logarithm, v is z.
    """

    v: Tensor  # (b k)
    p: Tensor  # (b k)
    log: Tensor  # (b): log Σ_c exp(z_c)


def _numbers(wanted: Wanted, trained: bool = False) -> list[_Number]:
    """trained: only the sums that have a gradient."""
    if any(z.requires_grad for _, z in wanted.means):
        raise KDHooksError("chunks: a mean must go by a constant z; detach it, or ask for its log")
    pairs = _pairs(wanted)
    if trained:
        pairs = [(v, z) for v, z in pairs if v.requires_grad]
    once = {id(z): z.detach() for _, z in pairs}  # several sums may share a z
    found = {key: _softmax(z) for key, z in once.items()}
    return [_Number(v, *found[id(z)]) for v, z in pairs]


def _pairs(wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
    """The v and the z of each sum."""
    return [*((z, z) for z in wanted.logs), *wanted.means]


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(b k) -> (b k), (b): softmax(z) and log Σ exp(z); 0 and -inf if z is -inf in all of a chunk.

    Not by torch.logsumexp, whose exp takes a processor ten times as long where it underflows.
    """
    p, peak = z.softmax(dim=1), z.amax(dim=1)
    gone = peak == -torch.inf
    log = torch.where(gone, peak, peak - p.amax(dim=1).log())
    return p.masked_fill_(gone[:, None], 0), log


def _slopes(numbers: Sequence[_Number], x: Tensor) -> dict[int, Tensor]:
    """The gradient (b e) of each sum that depends on x, by its index."""
    return {
        index: torch.autograd.grad(number.v, x, number.p, retain_graph=True)[0]
        for index, number in enumerate(numbers)
        if number.v.requires_grad
    }


def _gradients(
    wanted: Wanted, gradient: Tensor, total: Tensor, inputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """(m b), (m b) log Σ exp(z) of all classes -> a chunk's part of the gradient by each input."""
    trained = [index for index, (v, _) in enumerate(_pairs(wanted)) if v.requires_grad]
    numbers = _numbers(wanted, trained=True)
    weights = [
        (gradient[index] * (number.log - total[index]).exp())[:, None] * number.p
        for index, number in zip(trained, numbers, strict=True)
    ]
    return torch.autograd.grad([number.v for number in numbers], inputs, weights)
