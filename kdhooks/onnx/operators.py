"""One ONNX node becomes one torch module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.onnx.files import Array, require

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True)
class Node:
    """A node with its inputs evaluated on one image: an Array is constant, a Tensor is not."""

    operator: str
    name: str
    inputs: Sequence[Array | Tensor | None]  # None: left out
    attributes: dict[str, Any]  # as onnx reads them

    @classmethod
    def of(cls, proto: NodeProto, inputs: Sequence[Array | Tensor | None]) -> Node:
        value_of: Callable[..., Any] = require("onnx.helper").get_attribute_value
        return cls(
            operator=f"{proto.domain}.{proto.op_type}".removeprefix("ai.onnx").lstrip("."),
            name=proto.name or proto.output[0],
            inputs=inputs,
            attributes={attribute.name: value_of(attribute) for attribute in proto.attribute},
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in self.inputs if isinstance(value, Tensor)]

    def constant(self, index: int) -> Array:
        value = self.inputs[index]
        if not isinstance(value, np.ndarray):
            raise self.refusal(f"its input {index} depends on the image")
        return value

    def optional(self, index: int) -> Array | None:
        """A constant input that may be left out."""
        given = index < len(self.inputs) and self.inputs[index] is not None
        return self.constant(index) if given else None

    def to_module(self) -> nn.Module:
        if self.operator not in _MODULES:
            raise self.refusal(f"known are {', '.join(sorted(_MODULES))}")
        return _MODULES[self.operator](self)

    def refusal(self, reason: str) -> KDHooksError:
        return KDHooksError(
            f"ONNX operator {self.operator} (node {self.name!r}) cannot become a torch module: "
            f"{reason}; use OnnxModel, which runs any graph but has no taps"
        )


class Elementwise(nn.Module):
    """Two branches, or a branch and a constant on either side."""

    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        left: Tensor | None = None,
        right: Tensor | None = None,
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


class Concat(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *branches: Tensor) -> Tensor:
        """[(b ...)] -> (b ...)."""
        return torch.cat(branches, self.axis)


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
    if node.attributes.get("training_mode", 0):
        raise node.refusal("it is in training mode; export the network after eval()")
    kind = nn.BatchNorm2d if node.tensors[0].dim() == 4 else nn.BatchNorm1d
    norm = kind(
        len(node.constant(1)),
        eps=node.attributes.get("epsilon", 1e-5),
        momentum=1 - node.attributes.get("momentum", 0.9),  # ONNX weighs the old value
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


def _flatten(node: Node) -> nn.Module:
    if node.attributes.get("axis", 1) != 1:
        raise node.refusal(f"its axis is {node.attributes['axis']}, not 1")
    return nn.Flatten()


def _reshape(node: Node) -> nn.Module:
    image = node.tensors[0]
    target = [image.shape[i] if n == 0 else n for i, n in enumerate(node.constant(1).tolist())]
    if image.reshape(target).shape != image.flatten(1).shape:
        raise node.refusal(f"its shape {target} does not flatten each image")
    return nn.Flatten()


def _concat(node: Node) -> nn.Module:
    axis = node.attributes["axis"]
    if axis % node.tensors[0].dim() == 0 or len(node.tensors) < len(node.inputs):
        raise node.refusal("it joins images of the batch, or constants")
    return Concat(axis)


def _fill(module: nn.Module, **values: Array | None) -> nn.Module:
    state = {name: _float(value) for name, value in values.items() if value is not None}
    module.load_state_dict(state, strict=False, assign=True)
    return module


def _float(value: Array) -> Tensor:
    """A copy: arrays read from a file are read-only."""
    return torch.from_numpy(np.array(value, dtype=np.float32))


_MODULES: dict[str, Callable[[Node], nn.Module]] = {
    "Add": _elementwise(torch.add),
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _elementwise(torch.div),
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node: nn.AdaptiveAvgPool2d(1),
    "Identity": lambda node: nn.Identity(),
    "MatMul": _matmul,
    "Mul": _elementwise(torch.mul),
    "PRelu": _prelu,
    "Relu": lambda node: nn.ReLU(),
    "Reshape": _reshape,
    "Sigmoid": lambda node: nn.Sigmoid(),
    "Sub": _elementwise(torch.sub),
}
