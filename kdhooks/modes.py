"""Runs a model in eval mode without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode, then restore the mode of each submodule, and each buffer.

    Observers of quantisation-aware training update their buffers in eval mode, too.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (buffer, buffer.detach().clone())
        for buffer in model.buffers()
        if not (buffer.is_meta or isinstance(buffer, nn.UninitializedBuffer))
    ]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # a version may not show it
                    buffer.resize_(before.shape).copy_(before)
