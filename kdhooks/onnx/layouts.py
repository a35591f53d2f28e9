"""Torch modules for ONNX nodes that only rearrange values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from kdhooks.onnx.graphs import FLOATS, Array
from kdhooks.onnx.nodes import Node


class Rearrange(nn.Module):
    """Returns a view of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """(b ...) -> (b ...)."""
        return self.function(x)


class Pick(nn.Module):
    """Selects slices along one axis, in any order."""

    indices: Tensor

    def __init__(self, axis: int, indices: Array) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("indices", torch.from_numpy(np.array(indices, dtype=np.int64)))

    def forward(self, x: Tensor) -> Tensor:
        """(b ...) -> (b ...)."""
        return x.index_select(self.axis, self.indices)


class Concat(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *branches: Tensor) -> Tensor:
        """[(b ...)] -> (b ...)."""
        return torch.cat(branches, self.axis)


def cast(node: Node) -> nn.Module:
    if node.attributes["to"] not in FLOATS:
        raise node.refusal("it rounds to whole numbers")
    return nn.Identity()  # the torch network is float32 throughout


def concat(node: Node) -> nn.Module:
    axis = node.attributes["axis"]
    if axis % node.tensors[0].dim() == 0 or len(node.tensors) < len(node.inputs):
        raise node.refusal("it joins images of the batch, or constants")
    return Concat(axis)


def flatten(node: Node) -> nn.Module:
    if node.attributes.get("axis", 1) != 1:
        raise node.refusal(f"its axis is {node.attributes['axis']}, not 1")
    return nn.Flatten()


def gather(node: Node) -> nn.Module:
    indices, image = node.constant(1), node.tensors[0]
    axis = _axis(node, node.attributes.get("axis", 0))
    indices = indices % image.shape[axis]
    if indices.ndim == 1:
        return Pick(axis, indices)
    if indices.ndim == 0:
        return Rearrange(partial(torch.select, dim=axis, index=int(indices)))
    raise node.refusal(f"its indices {indices.shape} are not a row")


def gather_nd(node: Node) -> nn.Module:
    """Select slices of axis 0: torch's exporter moves the channels there to select some."""
    indices = node.constant(1)
    if node.attributes.get("batch_dims", 0) or indices.ndim != 2 or indices.shape[1] != 1:
        raise node.refusal(f"its indices {indices.shape} are not a column")
    return Pick(0, indices[:, 0])


def reshape(node: Node) -> nn.Module:
    image = node.tensors[0]
    target = [image.shape[i] if n == 0 else n for i, n in enumerate(node.constant(1).tolist())]
    shape = image.reshape(target).shape
    if shape == image.shape:
        return nn.Identity()
    if shape != image.flatten(1).shape:
        raise node.refusal(f"its shape {target} does not flatten each image")
    return nn.Flatten()


def slices(node: Node) -> nn.Module:
    starts, ends = node.setting("starts", 1), node.setting("ends", 2)
    if starts is None or ends is None:
        raise node.refusal("its bounds are missing")
    axes = node.setting("axes", 3) or list(range(len(starts)))
    steps = node.setting("steps", 4) or [1] * len(starts)
    picks = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        kept = np.arange(node.tensors[0].shape[axis])[start:end:step]
        picks.append(Pick(_axis(node, axis), kept))
    return picks[0] if len(picks) == 1 else nn.Sequential(*picks)


def split(node: Node, index: int, count: int) -> nn.Module:
    """Return the module for output `index` of `count`."""
    axis = _axis(node, node.attributes.get("axis", 0))
    length = node.tensors[0].shape[axis]
    part = -(-length // count)
    sizes = node.setting("split", 1) or [min(part, length - part * i) for i in range(count)]
    return Rearrange(partial(torch.narrow, dim=axis, start=sum(sizes[:index]), length=sizes[index]))


def squeeze(node: Node) -> nn.Module:
    shape = node.tensors[0].shape
    given = node.setting("axes", 1)
    axes = [i for i, n in enumerate(shape) if i and n == 1] if given is None else given
    return Rearrange(partial(torch.squeeze, dim=tuple(_axis(node, axis) for axis in axes)))


def transpose(node: Node) -> nn.Module:
    order = node.attributes.get("perm") or range(node.tensors[0].dim())[::-1]
    return Rearrange(partial(torch.permute, dims=tuple(order)))


def _axis(node: Node, axis: int) -> int:
    axis %= node.tensors[0].dim()
    if axis == 0:
        raise node.refusal("its axis is that of the batch")
    return axis
