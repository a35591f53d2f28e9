"""Leaves no gradient in the losses' parameters while every term has weight 0.

A loop may clip the norm of all gradients. A norm over more entries may be rounded to another
number, though the new entries are zeros, and the student would no longer train as without kdhooks.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def drop_zero_gradients(
    terms: Mapping[str, Tensor], parameters: Iterable[nn.Parameter], holds: Callable[[], bool]
) -> None:
    """Remove the gradients that the next backward pass through the terms creates.

    terms: all of them are zeros with zero gradients.
    holds: called after that pass; False if it may have created other gradients too.
    """
    without = [p for p in parameters if p.requires_grad and p.grad is None]
    term = next((term for term in terms.values() if term.requires_grad), None)
    if not without or term is None or torch.compiler.is_compiling():
        return

    def drop() -> None:
        if holds():
            for parameter in without:
                parameter.grad = None

    def at_the_end(_: Tensor) -> None:
        # DistributedDataParallel writes its gradients in such a callback, too. A callback that
        # another one queues runs after all of those that the pass itself has queued.
        _after_backward(lambda: _after_backward(drop))

    term.register_hook(at_the_end)


def _after_backward(function: Callable[[], object]) -> None:
    """Call the function at the end of the backward pass that is under way."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)
