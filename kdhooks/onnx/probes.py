"""Finds the scale and channel of each value that arrives at an ONNX graph's first computations.

Four probe images pass from the graph's input to its first real computations (Conv, Gemm, ...): a
black image, and for each channel an image in which only that channel is 255. The nodes in between
move values (Transpose, Gather, Slice, Split, Concat, Reshape, ...), scale them by constants (Add,
Sub, Mul, Div), or keep their scale (Cast to a float, Identity, Pad, Resize, pooling). So each value
that arrives at a computation is offset + gain * pixel, of one channel.

A 1x1 convolution whose outputs each read one channel is one of the nodes in between: it scales or
reorders the channels. One with a single output turns the image grey, and is not understood. The
same holds for a MatMul if channels come last. Every other convolution is a computation: its weights
are learned, and are not examined. A QuantizeLinear clips the values that arrive, which shows the
range that it expects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kdhooks.onnx.graphs import FLOATS, Array, Constants, evaluate, names_read, needed_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Probes: TypeAlias = list[Array]  # black, then one for each channel

_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}
_MOVES = {
    "Concat", "DepthToSpace", "Flatten", "Gather", "GatherND", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_KEEPS_SCALE = {
    "AveragePool", "DequantizeLinear", "Dropout", "Identity", "MaxPool", "Pad", "QuantizeLinear",
    "Resize", "Upsample",
}  # fmt: skip
_COMPUTES = {
    "BatchNormalization", "Conv", "ConvInteger", "ConvTranspose", "DynamicQuantizeLinear", "Einsum",
    "FusedConv", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "MatMul", "MatMulInteger",
    "QLinearConv", "QLinearMatMul",
}  # fmt: skip
_ONE_BY_ONE = ((3, 3, 1, 1), (3, 1, 1, 1))  # over all channels, or depthwise


@dataclass(frozen=True)
class Arrival:
    """The n values that arrive at one of the first computations."""

    black: Array  # (n), for a black image
    gains: Array  # (3 n), the change with each channel, per unit of the pixel
    statistics: tuple[Array, Array] | None  # (n), a BatchNormalization's mean and deviation
    bn_data: bool  # whether the node has this name, as in networks of MXNet
    limits: tuple[float, float] | None = None  # to which a QuantizeLinear clips

    @property
    def gain(self) -> Array:
        """(n), the change with the pixel, whatever its channel."""
        total: Array = self.gains.sum(axis=0)
        return total

    @property
    def channels(self) -> Array:
        """(n), the channel of each value."""
        channels: Array = np.argmax(self.gains != 0, axis=0)
        return channels


def first_arrivals(
    model: ModelProto, image: str, shape: tuple[int, int, int, int], output: str
) -> tuple[list[Arrival], str]:
    """Return what arrives at the first computations, and the first fault found on the way, or "".

    shape: of one image, with the three channels on axis 1 or on axis 3.
    """
    channel = 1 if shape[1] == 3 else 3
    black = np.zeros(shape)
    whites = [255 * np.moveaxis(np.eye(3)[c].reshape(1, 3, 1, 1), 1, channel) for c in range(3)]
    constants = Constants(model, image)
    known: dict[str, Probes] = {image: [black, *(black + white for white in whites)]}
    arrivals, unknown = [], ""
    for node in needed_nodes(model.graph, output):
        probes = [known[name] for name in names_read(node) if name in known]
        if not probes:
            continue
        try:
            if node.op_type == "Shape":
                constants.tell(node.output[0], evaluate(node, [probes[0][0]], model)[0])
                continue
            if node.op_type == "QuantizeLinear" and node.input[0] in known:
                arrivals += _clipped(node, probes[0], constants)
            outputs = _walk(node, known, constants, model)
            if outputs is None:
                arrivals += [_arrival(node, pixels, constants) for pixels in probes]
                if node.op_type not in _COMPUTES or _turns_grey(node, constants):
                    unknown = unknown or f"{_name(node)} comes before the first convolution"
                    outputs = _computed(node, known, constants, model)  # order may still change
            known |= zip([name for name in node.output if name], outputs or [], strict=False)
        except Exception as error:  # numpy and onnx have no class of errors in common
            unknown = unknown or f"{_name(node)} fails: {error}"
    return arrivals, unknown


def _walk(
    node: NodeProto, known: dict[str, Probes], constants: Constants, model: ModelProto
) -> list[Probes] | None:
    """Return the outputs for each of the probes; None if the node is a computation or unknown."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Conv":
        return _scaled_by_layer(node, known, constants)
    if node.op_type == "MatMul":
        return _scaled_by_product(node, known, constants)
    if node.op_type in _KEEPS_SCALE or (node.op_type == "Cast" and _to_float(node)):
        return [known[node.input[0]]] if node.input[0] in known else None
    scales = node.op_type in _ARITHMETIC and sum(name in known for name in node.input) == 1
    if node.op_type in _MOVES or (scales and not _divides_by(node, known)):
        return _computed(node, known, constants, model)
    return None


def _computed(
    node: NodeProto, known: dict[str, Probes], constants: Constants, model: ModelProto
) -> list[Probes] | None:
    """Compute the outputs for each of the probes; None if an input is unknown and not constant."""
    operands: list[Sequence[Array | None]] = [
        known.get(name) or [constants.get(name)] * 4 for name in node.input
    ]
    if any(x[0] is None for x, name in zip(operands, node.input, strict=True) if name):
        return None
    arithmetic = _ARITHMETIC.get(node.op_type)
    results = [
        evaluate(node, inputs, model)
        if arithmetic is None
        else [arithmetic(*(np.asarray(x, np.float64) for x in inputs))]
        for inputs in zip(*operands, strict=True)
    ]
    return [list(probes) for probes in zip(*results, strict=True)]


def _scaled_by_layer(
    node: NodeProto, known: dict[str, Probes], constants: Constants
) -> list[Probes] | None:
    """Return the outputs of a 1x1 convolution if each of them reads one channel."""
    probes, weight = known.get(node.input[0]), _operand(node, 1, constants)
    bias = _operand(node, 2, constants) if len(node.input) > 2 else np.zeros(1)
    if probes is None or weight is None or bias is None or weight.shape not in _ONE_BY_ONE:
        return None
    matrix = weight.reshape(3, -1).astype(np.float64)
    matrix = np.diag(matrix[:, 0]) if matrix.shape[1] == 1 else matrix
    if ((matrix != 0).sum(axis=1) != 1).any():
        return None
    return [[np.einsum("kc,bchw->bkhw", matrix, x) + bias.reshape(1, -1, 1, 1) for x in probes]]


def _scaled_by_product(
    node: NodeProto, known: dict[str, Probes], constants: Constants
) -> list[Probes] | None:
    """Return the outputs of a MatMul (b h w 3) @ (3 3) whose outputs each read one channel.

    None if it is another product.
    """
    probes, matrix = known.get(node.input[0]), _operand(node, 1, constants)
    if probes is None or matrix is None or matrix.shape != (3, 3) or probes[0].ndim != 4:
        return None
    if ((matrix != 0).sum(axis=0) != 1).any():
        return None
    return [[x @ matrix.astype(np.float64) for x in probes]]


def _turns_grey(node: NodeProto, constants: Constants) -> bool:
    shapes = {"Conv": (1, 3, 1, 1), "MatMul": (3, 1)}
    weight = _operand(node, 1, constants) if node.op_type in shapes else None
    return weight is not None and weight.shape == shapes[node.op_type]


def _operand(node: NodeProto, index: int, constants: Constants) -> Array | None:
    try:
        return constants.get(node.input[index])
    except Exception:  # weights that only onnxruntime can unpack belong to no scaling
        return None


def _clipped(node: NodeProto, probes: Probes, constants: Constants) -> list[Arrival]:
    """Return what arrives at a QuantizeLinear, if the limits to which it clips are known."""
    scale = constants.get(node.input[1])
    zero = constants.get(node.input[2]) if len(node.input) > 2 else np.zeros(1, np.uint8)
    if scale is None or zero is None or zero.dtype.kind not in "iu":
        return []
    bounds = np.iinfo(zero.dtype)
    low = scale * (float(bounds.min) - zero.astype(float))
    high = scale * (float(bounds.max) - zero.astype(float))
    limits = float(low.min()), float(high.max())
    return [replace(_arrival(node, probes, constants), limits=limits)]


def _divides_by(node: NodeProto, known: dict[str, Probes]) -> bool:
    return node.op_type == "Div" and node.input[1] in known


def _to_float(node: NodeProto) -> bool:
    return any(x.name == "to" and x.i in FLOATS for x in node.attribute)


def _arrival(node: NodeProto, probes: Probes, constants: Constants) -> Arrival:
    black, *whites = (probe.reshape(-1) for probe in probes)
    if not black.size:
        raise ValueError("nothing is left of the image")
    statistics = None
    if node.op_type == "BatchNormalization":
        mean, variance = constants.get(node.input[3]), constants.get(node.input[4])
        if mean is not None and variance is not None:
            pixels = len(black) // len(mean)
            statistics = np.repeat(mean, pixels), np.sqrt(np.repeat(variance, pixels))
    gains = (np.stack(whites) - black) / 255
    return Arrival(black, gains, statistics, bn_data=node.name == "bn_data")


def _name(node: NodeProto) -> str:
    return f"{node.op_type} (node {node.name or node.output[0]!r})"
