"""Converts one ONNX node to one torch module."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kdhooks.onnx.graphs import Array
from kdhooks.onnx.layouts import (
    cast,
    concat,
    flatten,
    gather,
    gather_nd,
    reshape,
    slices,
    split,
    squeeze,
    transpose,
)
from kdhooks.onnx.nodes import Node


class Elementwise(nn.Module):
    """Combines two branches, or a branch and a constant on either side."""

    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        left: Tensor | None,
        right: Tensor | None,
    ) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """(b ...) -> (b ...) with a constant, else (b ...), (b ...) -> (b ...)."""
        if self.left is not None:
            return self.function(self.left, first)
        if self.right is not None:
            return self.function(first, self.right)
        assert second is not None
        return self.function(first, second)


def to_module(node: Node, index: int, count: int) -> nn.Module:
    """Return the module for output `index` of `count`; only Split has several outputs in use."""
    if node.operator == "Split":
        return split(node, index, count)
    if node.operator not in _MODULES:
        raise node.refusal(f"the known ones are {', '.join(sorted([*_MODULES, 'Split']))}")
    return _MODULES[node.operator](node)


def _elementwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Node], nn.Module]:
    def module(node: Node) -> nn.Module:
        left, right = (
            None if isinstance(value, Tensor) else _float(node.constant(index))
            for index, value in enumerate(node.inputs)
        )
        return Elementwise(function, left, right)

    return module


def _conv(node: Node) -> nn.Module:
    weight, bias = node.constant(1), node.optional(2)
    if node.attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise node.refusal("its padding is automatic; export it with explicit pads")
    groups = node.attributes.get("group", 1)
    top, left, bottom, right = node.attributes.get("pads", (0, 0, 0, 0))
    symmetric = (top, left) == (bottom, right)
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        kernel_size=weight.shape[2:],
        stride=tuple(node.attributes.get("strides", (1, 1))),
        padding=(top, left) if symmetric else 0,
        dilation=tuple(node.attributes.get("dilations", (1, 1))),
        groups=groups,
        bias=bias is not None,
        device="meta",  # draws no random numbers
    )
    _fill(conv, weight=weight, bias=bias)
    return conv if symmetric else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def _batch_norm(node: Node) -> nn.Module:
    kind = nn.BatchNorm2d if node.tensors[0].dim() == 4 else nn.BatchNorm1d
    norm = kind(
        len(node.constant(1)),
        eps=node.attributes.get("epsilon", 1e-5),
        momentum=1 - node.attributes.get("momentum", 0.9),  # ONNX gives the old value's weight
    )
    names = ("weight", "bias", "running_mean", "running_var")
    return _fill(norm, **{name: node.constant(1 + index) for index, name in enumerate(names)})


def _prelu(node: Node) -> nn.Module:
    slope, shape = node.constant(1), node.tensors[0].shape
    per_channel = (1, shape[1]) + (1,) * (len(shape) - 2)
    if slope.size != 1 and (1,) * (len(shape) - slope.ndim) + slope.shape != per_channel:
        raise node.refusal(f"its slope {slope.shape} is not one number or one per channel")
    return _fill(nn.PReLU(slope.size), weight=slope.reshape(-1))


def _gemm(node: Node) -> nn.Module:
    if node.attributes.get("transA", 0):
        raise node.refusal("it transposes its input")
    weight = node.constant(1) if node.attributes.get("transB", 0) else node.constant(1).T
    bias = node.optional(2)
    if bias is not None:
        bias = np.broadcast_to(bias.reshape(-1), len(weight)) * node.attributes.get("beta", 1.0)
    return _linear(weight * node.attributes.get("alpha", 1.0), bias)


def _matmul(node: Node) -> nn.Module:
    if node.constant(1).ndim != 2:
        raise node.refusal(f"its right side {node.constant(1).shape} is not a matrix")
    return _linear(node.constant(1).T, None)


def _linear(weight: Array, bias: Array | None) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _fill(linear, weight=weight, bias=bias)


def _clip(node: Node) -> nn.Module:
    low, high = node.optional(1), node.optional(2)
    return nn.Hardtanh(
        node.attributes.get("min", -np.inf) if low is None else float(low),
        node.attributes.get("max", np.inf) if high is None else float(high),
    )


def _dropout(node: Node) -> nn.Module:
    ratio = node.optional(1)
    return nn.Dropout(node.attributes.get("ratio", 0.5) if ratio is None else float(ratio))


def _fill(module: nn.Module, **values: Array | None) -> nn.Module:
    state = {name: _float(value) for name, value in values.items() if value is not None}
    module.load_state_dict(state, strict=False, assign=True)
    return module


def _float(value: Array) -> Tensor:
    """Return a float32 copy, since arrays from a file are read-only."""
    return torch.from_numpy(np.array(value, dtype=np.float32))


_MODULES: dict[str, Callable[[Node], nn.Module]] = {
    "Add": _elementwise(torch.add),
    "BatchNormalization": _batch_norm,
    "Cast": cast,
    "Clip": _clip,
    "Concat": concat,
    "Conv": _conv,
    "Div": _elementwise(torch.div),
    "Dropout": _dropout,
    "Flatten": flatten,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node: nn.AdaptiveAvgPool2d(1),
    "Identity": lambda node: nn.Identity(),
    "MatMul": _matmul,
    "Mul": _elementwise(torch.mul),
    "PRelu": _prelu,
    "Relu": lambda node: nn.ReLU(),
    "Reshape": reshape,
    "Sigmoid": lambda node: nn.Sigmoid(),
    "Slice": slices,
    "Squeeze": squeeze,
    "Sub": _elementwise(torch.sub),
    "Transpose": transpose,
}
