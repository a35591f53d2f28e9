"""What an ONNX face-recognition file says about itself, read without running it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

Array: TypeAlias = NDArray[Any]
Dims: TypeAlias = tuple[int | None, ...]

_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}


@dataclass(frozen=True)
class RecognitionFile:
    """One image tensor in, one embedding out; the model wants (pixels - mean) / std, RGB."""

    path: Path
    model: ModelProto
    input: str
    output: str
    batch: int | None  # None: any
    size: tuple[int, int]  # height, width
    mean: float
    std: float
    sha256: str  # of the file, and of the external weight files it names, if any


def read_recognition_file(
    path: str | Path, mean_std: tuple[float, float] | None = None
) -> RecognitionFile:
    """`mean_std` overrules what the graph says about the scale of its images."""
    path = Path(path).expanduser()
    model, parts = _load(path)
    inputs = image_inputs(model.graph)
    shapes = [dims(value) for value in inputs]
    if len(inputs) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise KDHooksError(
            f"a recognition model takes one image tensor (b 3 h w), but {path.name} takes "
            f"{_listing(inputs)}; choose another file, or export it in NCHW order"
        )
    outputs = list(model.graph.output)
    if len(outputs) != 1 or len(dims(outputs[0])) not in (0, 2):  # 0: shape not written down
        raise KDHooksError(
            f"a recognition model gives one embedding (b e), but {path.name} gives "
            f"{_listing(outputs)}; choose another file: this may be a detector"
        )
    batch, _, height, width = shapes[0]
    if batch not in (None, 1):
        raise KDHooksError(
            f"the batch of {path.name} must be open or 1, got {batch}; "
            f"export it with dynamic_axes for axis 0"
        )
    if height is None or width is None:
        raise KDHooksError(
            f"{path.name} must say how large its images are, got {_listing(inputs)}; "
            f"export it with a fixed height and width"
        )
    mean, std = mean_std or _mean_std(model.graph, inputs[0].name, path.name)
    return RecognitionFile(
        path=path,
        model=model,
        input=inputs[0].name,
        output=outputs[0].name,
        batch=batch,
        size=(height, width),
        mean=mean,
        std=std,
        sha256=hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest(),
    )


def read_graph(path: Path) -> ModelProto:
    """The graph alone: weights kept in files of their own stay there."""
    onnx = require("onnx")
    if not path.is_file():
        raise KDHooksError(
            f"an ONNX file must exist, but {path} does not; check the path, or let "
            f"kdhooks.onnx.session.insightface_model find it"
        )
    decode_error: type[Exception] = require("google.protobuf.message").DecodeError
    try:
        model: ModelProto = onnx.load(path, load_external_data=False)
    except decode_error as error:
        raise _not_onnx(path) from error
    if not model.graph.node:  # a few other formats parse, as a model of nothing
        raise _not_onnx(path)
    return model


def require(module: str) -> ModuleType:
    """Import a package of the extra `onnx` only when it is used."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise KDHooksError(
            f"ONNX files need the package {module.split('.')[0]}, which is not installed; "
            f"pip install kdhooks[onnx]"
        ) from error


def image_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """What a caller must feed; some exporters list weights as inputs, even ones no node reads."""
    weights = {tensor.name for tensor in graph.initializer}
    read = {name for node in graph.node for name in node.input}
    return [value for value in graph.input if value.name in read - weights]


def dims(value: ValueInfoProto) -> Dims:
    """A shape, None for an open axis; the empty tuple also when the file gives no shape."""
    return tuple(dim.dim_value or None for dim in value.type.tensor_type.shape.dim)


def _load(path: Path) -> tuple[ModelProto, list[Path]]:
    """The model with its weights and nothing but images to feed, and all files it came from."""
    model = read_graph(path)
    named = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    weights = [path.parent / name for name in sorted(named)]
    for part in weights:
        if not part.is_file():
            raise KDHooksError(
                f"{path.name} keeps weights in {part.name}, which must lie beside it, but "
                f"{part} does not exist; copy it there"
            )
    require("onnx.external_data_helper").load_external_data_for_model(model, str(path.parent))
    fed = image_inputs(model.graph)
    del model.graph.input[:]
    model.graph.input.extend(fed)
    return model, [path, *weights]


def _mean_std(graph: GraphProto, image: str, name: str) -> tuple[float, float]:
    """What to do to pixels before the graph: insightface's rule, checked on the numbers."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    to_array: Callable[..., Array] = require("onnx.numpy_helper").to_array

    value, black, white = image, np.zeros(1), np.full(1, 255.0)
    while True:
        users = [node for node in graph.node if value in node.input]
        if len(users) != 1 or users[0].op_type not in _ARITHMETIC:
            break
        node = users[0]
        if any(operand != value and operand not in constants for operand in node.input):
            break
        black, white = (
            _ARITHMETIC[node.op_type](
                *(x if operand == value else to_array(constants[operand]) for operand in node.input)
            )
            for x in (black, white)
        )
        value = node.output[0]
    if users and users[0].name == "bn_data":  # MXNet networks that normalise by statistics
        return 0.0, 1.0
    if value == image:
        return 127.5, 127.5
    if np.allclose(black, -1, atol=0.02) and np.allclose(white, 1, atol=0.02):
        return 0.0, 1.0
    raise KDHooksError(
        f"a graph that scales its images is expected to bring 0..255 to -1..1, but {name} brings "
        f"it to {black.min():.4g}..{white.max():.4g}; say what it expects: mean_std=(mean, std)"
    )


def _listing(values: list[ValueInfoProto]) -> str:
    shown = [f"{value.name} {dims(value)}".replace("None", "?") for value in values]
    return ", ".join(shown) or "nothing"


def _not_onnx(path: Path) -> KDHooksError:
    return KDHooksError(
        f"{path} must be an ONNX model, but its {path.stat().st_size} bytes are not; "
        f"fetch it again: it may be a web page or a Git LFS pointer"
    )
