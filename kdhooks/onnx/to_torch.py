"""Converts recognition networks in ONNX files to torch modules, whose features can be tapped."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.onnx.files import RecognitionFile, read_recognition_file
from kdhooks.onnx.graphs import Array, evaluate, naming, require
from kdhooks.onnx.nodes import Node
from kdhooks.onnx.operators import to_module
from kdhooks.onnx.session import OnnxModel, arranged

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_ALIKE, _ALIKE_HALF = 1e-3, 3e-2  # relative to the embedding's length


def to_torch(
    source: str | Path | RecognitionFile, mean_std: tuple[float, float] | None = None
) -> OnnxNetwork:
    """Return a float network in eval mode; check first that it agrees with onnxruntime.

    source: a path, or a file that `read_recognition_file` has read.
    mean_std: overrides the scale that is derived from the file; for a path only.
    """
    file = (
        source if isinstance(source, RecognitionFile) else read_recognition_file(source, mean_std)
    )
    with naming(file.path):
        return _checked(file)


def _checked(file: RecognitionFile) -> OnnxNetwork:
    reference = OnnxModel(file)
    network = OnnxNetwork(file).eval()
    pixels = torch.rand(2, 3, *network.size, generator=torch.Generator().manual_seed(0)) * 255
    images = (pixels - network.mean) / network.std
    with torch.no_grad():
        ours, theirs = network(images), reference(images)
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < (_ALIKE_HALF if _is_half(file.model) else _ALIKE):
        raise KDHooksError(
            f"the torch network of {file.path.name} must agree with onnxruntime, but differs "
            f"by {error:.1e} of the embedding's length; use OnnxModel, and report this file"
        )
    return network


def _is_half(model: ModelProto) -> bool:
    """Whether weights are float16, so that onnxruntime rounds where torch does not."""
    half = require("onnx").TensorProto.FLOAT16
    constants = [attribute.t for node in model.graph.node for attribute in node.attribute]
    return any(tensor.data_type == half for tensor in [*model.graph.initializer, *constants])


@dataclass(frozen=True)
class _Step:
    child: str
    inputs: tuple[str, ...]
    output: str


class OnnxNetwork(nn.Module):
    """A network with one child for each ONNX node, run in the order of the file.

    Children have the names of the nodes, with `_` in place of anything but letters and digits.
    """

    def __init__(self, file: RecognitionFile) -> None:
        super().__init__()
        self.size = file.size  # height, width
        self.mean = file.mean
        self.std = file.std
        self._channels_last = file.channels_last
        self._whole_pixels = file.whole_pixels
        self._input = file.input
        self._output = file.output
        self._steps = self._build(file)
        last_use = {name: step.output for step in self._steps for name in step.inputs}
        last_use[self._output] = ""  # the caller uses it last
        self._finished = {
            step.output: [name for name in step.inputs if last_use[name] == step.output]
            for step in self._steps
        }

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        values = {self._input: arranged(images, self._channels_last, self._whole_pixels)}
        for step in self._steps:
            child = self.get_submodule(step.child)
            values[step.output] = child(*[values[name] for name in step.inputs])
            for name in self._finished[step.output]:
                values.pop(name, None)
        return values[self._output].flatten(1)

    @torch.no_grad()
    def _build(self, file: RecognitionFile) -> list[_Step]:
        """Run one image: compute nodes that do not depend on it once, and make others children."""
        to_array: Callable[..., Array] = require("onnx.numpy_helper").to_array
        values: dict[str, Array | Tensor | None] = {"": None}  # "": an omitted input
        values |= {tensor.name: to_array(tensor) for tensor in file.model.graph.initializer}
        values[file.input] = arranged(torch.zeros(1, 3, *file.size), file.channels_last)
        steps = []
        for proto in file.model.graph.node:
            node = Node.of(proto, [_found(values, name, proto) for name in proto.input])
            if not node.tensors:
                values |= zip(filter(None, proto.output), _fold(proto, node, file), strict=True)
            elif node.operator == "Shape":
                ends = slice(node.attributes.get("start"), node.attributes.get("end"))
                values[proto.output[0]] = np.array(node.tensors[0].shape[ends], dtype=np.int64)
            else:
                count = len(proto.output) if node.operator == "Split" else 1
                inputs = tuple(n for n in proto.input if isinstance(values[n], Tensor))
                for index, output in enumerate(proto.output[:count]):
                    try:
                        child = to_module(node, index, count).eval()
                        values[output] = child(*node.tensors)
                    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                        raise node.refusal(f"torch says: {error}") from error
                    steps.append(_Step(self._adopt(node.name, child), inputs, output))
        return steps

    def _adopt(self, node_name: str, child: nn.Module) -> str:
        name = re.sub(r"\W+", "_", node_name).strip("_") or type(child).__name__
        while hasattr(self, name):  # of another child, or an attribute of every module
            name += "_"
        self.add_module(name, child)
        return name


def _found(
    values: Mapping[str, Array | Tensor | None], name: str, proto: NodeProto
) -> Array | Tensor | None:
    if name not in values:
        raise KDHooksError(
            f"ONNX node {proto.name or proto.output[0]!r} must read the output of an earlier node; "
            f"found {name!r}, which no converted node returns; use OnnxModel"
        )
    return values[name]


def _fold(proto: NodeProto, node: Node, file: RecognitionFile) -> list[Array]:
    """Compute a node that does not depend on the image, such as int8 weights made float."""
    if "." in node.operator:
        raise node.refusal("it is not an operator of the ONNX standard")
    constants = [value if isinstance(value, np.ndarray) else None for value in node.inputs]
    try:
        return evaluate(proto, constants, file.model)
    except Exception as error:  # the errors of onnx's evaluator have no class in common
        raise node.refusal(f"evaluating it says: {error}") from error
