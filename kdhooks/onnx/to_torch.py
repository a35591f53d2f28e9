"""Recognition networks in ONNX files as torch modules, so that their features can be tapped."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.onnx.files import Array, RecognitionFile, read_recognition_file, require
from kdhooks.onnx.operators import Node
from kdhooks.onnx.session import OnnxModel

if TYPE_CHECKING:
    from onnx import NodeProto


def to_torch(path: str | Path, mean_std: tuple[float, float] | None = None) -> OnnxNetwork:
    """A float network in eval mode, found to agree with onnxruntime before it is returned."""
    reference = OnnxModel(path, mean_std)
    network = OnnxNetwork(read_recognition_file(path, mean_std)).eval()
    pixels = torch.rand(2, 3, *network.size, generator=torch.Generator().manual_seed(0)) * 255
    images = (pixels - network.mean) / network.std
    with torch.no_grad():
        ours, theirs = network(images), reference(images)
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < 1e-3:
        raise KDHooksError(
            f"the torch network of {reference.path.name} must agree with onnxruntime, but differs "
            f"by {error:.1e} of the embedding's length; use OnnxModel, and report this file"
        )
    return network


@dataclass(frozen=True)
class _Step:
    child: str
    inputs: tuple[str, ...]
    output: str


class OnnxNetwork(nn.Module):
    """One child per ONNX node, run in the order of the file.

    Children bear the names of the nodes, with `_` for whatever is not a letter or a digit.
    """

    def __init__(self, file: RecognitionFile) -> None:
        super().__init__()
        self.size = file.size  # height, width
        self.mean = file.mean
        self.std = file.std
        self._input = file.input
        self._output = file.output
        self._steps = self._build(file)
        last_use = {name: step.output for step in self._steps for name in step.inputs}
        last_use[self._output] = ""  # the caller's
        self._finished = {
            step.output: [name for name in step.inputs if last_use[name] == step.output]
            for step in self._steps
        }

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        values = {self._input: images}
        for step in self._steps:
            child = self.get_submodule(step.child)
            values[step.output] = child(*[values[name] for name in step.inputs])
            for name in self._finished[step.output]:
                values.pop(name, None)
        return values[self._output]

    @torch.no_grad()
    def _build(self, file: RecognitionFile) -> list[_Step]:
        """Run one image through: what does not depend on it folds, the rest becomes a child."""
        to_array: Callable[..., Array] = require("onnx.numpy_helper").to_array
        values: dict[str, Array | Tensor | None] = {"": None}  # "": an input left out
        values |= {tensor.name: to_array(tensor) for tensor in file.model.graph.initializer}
        values[file.input] = torch.zeros(1, 3, *file.size)
        steps = []
        for proto in file.model.graph.node:
            node = Node.of(proto, [values[name] for name in proto.input])
            output = proto.output[0]
            if not node.tensors:
                values[output] = _fold(proto, node, file)
            elif node.operator == "Shape":
                ends = slice(node.attributes.get("start"), node.attributes.get("end"))
                values[output] = np.array(node.tensors[0].shape[ends], dtype=np.int64)
            else:
                child = node.to_module().eval()
                values[output] = child(*node.tensors)
                inputs = tuple(n for n in proto.input if isinstance(values[n], Tensor))
                steps.append(_Step(self._adopt(node.name, child), inputs, output))
        return steps

    def _adopt(self, node_name: str, child: nn.Module) -> str:
        name = re.sub(r"\W+", "_", node_name).strip("_") or type(child).__name__
        while hasattr(self, name):  # a namesake, or an attribute of every module
            name += "_"
        self.add_module(name, child)
        return name


def _fold(proto: NodeProto, node: Node, file: RecognitionFile) -> Array:
    """The value of a node that does not depend on the image: say, int8 weights made float."""
    if "." in node.operator:
        raise node.refusal("it is not an operator of the ONNX standard")
    names = [name for name in proto.input if name]
    function = require("onnx.helper").make_function(
        "kdhooks", "fold", names, list(proto.output), [proto], file.model.opset_import
    )
    evaluator = require("onnx.reference").ReferenceEvaluator(function)
    feed = dict(zip(names, (value for value in node.inputs if value is not None), strict=True))
    value: Array = evaluator.run(None, feed, attributes={})[0]
    return value
