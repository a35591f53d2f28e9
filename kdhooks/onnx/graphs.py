"""Opens ONNX graphs, with an error for every fault of a file, and evaluates single nodes."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

Array: TypeAlias = NDArray[Any]
Dims: TypeAlias = tuple[int | None, ...]
FLOATS = (1, 10, 11, 16)  # TensorProto's float, float16, double, bfloat16


def require(module: str) -> ModuleType:
    """Import a package of the extra `onnx` only when it is used."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise KDHooksError(
            f"ONNX files need the package {module.split('.')[0]}, which is not installed; run "
            "pip install '.[onnx]' in a clone of kdhooks"
        ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make every error in this block name the file by its whole path."""
    try:
        yield
    except KDHooksError as error:
        if str(path) in str(error):
            raise
        raise KDHooksError(f"ONNX file '{path}': {error}") from error


def read_graph(path: Path) -> ModelProto:
    """Read the graph only; weights in separate files are not read."""
    onnx = require("onnx")
    decode_error: type[Exception] = require("google.protobuf.message").DecodeError
    content = _content(path)
    try:
        model: ModelProto = onnx.load_model_from_string(content)
    except decode_error as error:
        raise _not_onnx(path, content) from error
    if not model.graph.node:  # some other formats are parsed as an empty model
        raise _not_onnx(path, content)
    return model


def load_graph(path: Path) -> tuple[ModelProto, str]:
    """Read a model with its weights, inline its functions, and compute its files' SHA-256."""
    model = read_graph(path)
    parts = [path, *_weight_files(path, model)]
    try:
        require("onnx.external_data_helper").load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # the versions of onnx raise different classes
        raise KDHooksError(
            f"{path} must find its weights in the files beside it, but reading fails: {error}; "
            f"copy the file and the files beside it again"
        ) from error
    if model.functions:
        model = require("onnx.inliner").inline_local_functions(model)
    _sort(model.graph, path.name)
    return model, hashlib.sha256(b"".join(map(_content, parts))).hexdigest()


def image_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """Return the inputs that a caller must feed; some exporters also list weights as inputs."""
    weights = {tensor.name for tensor in graph.initializer}
    read = {name for node in graph.node for name in names_read(node)}
    return [value for value in graph.input if value.name in read - weights]


def names_read(node: NodeProto) -> Iterator[str]:
    """Yield the inputs of a node, and those of nodes in the branches of an If or body of a Loop."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from names_read(inner)


def dims(value: ValueInfoProto) -> Dims:
    """Return a shape, with None for an open axis; () also if the file declares no shape."""
    axes = value.type.tensor_type.shape.dim
    return tuple(axis.dim_value if axis.dim_value > 0 else None for axis in axes)


def described(values: Iterable[ValueInfoProto]) -> str:
    """Return names with their shapes, for an error message."""
    shown = [
        f"{value.name} {dims(value)}".replace("None", "?")
        if value.type.HasField("tensor_type")
        else f"{value.name} (no tensor)"
        for value in values
    ]
    return ", ".join(shown) or "nothing"


def evaluate(proto: NodeProto, inputs: Sequence[Array | None], model: ModelProto) -> list[Array]:
    """Compute the outputs of one node of the model; None stands for an omitted input."""
    names = [name for name in dict.fromkeys(proto.input) if name]
    function = require("onnx.helper").make_function(
        "kdhooks", "node", names, [name for name in proto.output if name], [proto],
        model.opset_import,
    )  # fmt: skip
    evaluator = require("onnx.reference").ReferenceEvaluator(function)
    feed = {name: value for name, value in zip(proto.input, inputs, strict=True) if name}
    return [np.asarray(output) for output in evaluator.run(None, feed, attributes={})]


def needed_nodes(graph: GraphProto, output: str) -> list[NodeProto]:
    """Return the nodes that this output depends on, in the order of the file."""
    needed, nodes = {output}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(names_read(node))
            nodes.append(node)
    return nodes[::-1]


class Constants:
    """The values of a graph that do not depend on its image, each computed when it is first read.

    `tell` sets the shape of a value that depends on the image; from then on, this shape counts as
    constant.
    """

    def __init__(self, model: ModelProto, image: str) -> None:
        self._model = model
        self._to_array: Callable[..., Array] = require("onnx.numpy_helper").to_array
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._values: dict[str, Array] = {}
        self._variable = {image}
        for node in model.graph.node:
            if node.op_type != "Shape" and self._variable & set(names_read(node)):
                self._variable |= set(node.output)

    def tell(self, name: str, value: Array) -> None:
        self._values[name] = value

    def get(self, name: str) -> Array | None:
        """Return a value; None if it depends on the image, or on a shape that was not told."""
        if name in self._values:
            return self._values[name]
        if name in self._weights:
            self._values[name] = self._to_array(self._weights[name])
        elif name in self._producers and name not in self._variable:
            node = self._producers[name]
            inputs = [self.get(operand) if operand else None for operand in node.input]
            given = [value for value, operand in zip(inputs, node.input, strict=True) if operand]
            if any(value is None for value in given):
                return None
            names = [output for output in node.output if output]
            self._values |= zip(names, evaluate(node, inputs, self._model), strict=True)
        return self._values.get(name)


def _sort(graph: GraphProto, name: str) -> None:
    """Move each node after those that it reads; some converters append nodes at the end."""
    pending, ordered, unsorted = list(graph.node), [], False
    missing = {output for node in pending for output in node.output}
    while pending:
        later = []
        for node in pending:
            if missing.isdisjoint(names_read(node)):
                ordered.append(node)
                missing -= set(node.output)
            else:
                later.append(node)
        if len(later) == len(pending):
            raise KDHooksError(
                f"the nodes of {name} must not form a cycle, but {later[0].name!r} depends on one; "
                "export the file again"
            )
        pending, unsorted = later, unsorted or bool(later)
    if unsorted:
        del graph.node[:]
        graph.node.extend(ordered)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise KDHooksError(
            f"an ONNX file must exist, but {path} does not; check the path, or let "
            f"kdhooks.onnx.session.insightface_model find it"
        ) from error
    except OSError as error:
        raise KDHooksError(
            f"an ONNX file must be readable, but {path} is not ({error.strerror}); check the path "
            f"and its permissions"
        ) from error


def _weight_files(path: Path, model: ModelProto) -> list[Path]:
    named = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [path.parent / name for name in sorted(named)]
    for file in files:
        if not file.is_file():
            raise KDHooksError(
                f"{path.name} keeps weights in {file.name}, which must lie beside it, but "
                f"{file} does not exist; copy it there"
            )
    return files


def _not_onnx(path: Path, content: bytes) -> KDHooksError:
    return KDHooksError(
        f"{path} must be an ONNX model, but its {len(content)} bytes are not; "
        f"fetch it again: it may be cut short, a web page or a Git LFS pointer"
    )
