"""Reads the properties of an ONNX face-recognition file, without running it.

Its images are (b 3 h w) or (b h w 3), its embeddings (b e) or (b e 1 1). The batch axis may be
open, in any notation, or 1. If a file has several outputs, one must be chosen by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdhooks.errors import KDHooksError, near_miss
from kdhooks.onnx.graphs import (
    Constants,
    described,
    dims,
    image_inputs,
    load_graph,
    naming,
    needed_nodes,
    require,
)
from kdhooks.onnx.pixels import check_order, mean_std
from kdhooks.onnx.probes import first_arrivals

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto


@dataclass(frozen=True)
class RecognitionFile:
    """A model that takes one image tensor, (pixels - mean) / std, and returns one embedding."""

    path: Path
    model: ModelProto  # with its weights; the images are its only input, the embedding its output
    input: str
    output: str
    batch: int | None  # None: any
    size: tuple[int, int]  # height, width
    mean: float
    std: float
    channels_last: bool  # images are (b h w 3)
    whole_pixels: bool  # images are uint8
    sha256: str  # of the file and of its external weight files, if any


def read_recognition_file(
    path: str | Path,
    mean_std: tuple[float, float] | None = None,
    *,
    order: str | None = None,
    size: Sequence[int] | None = None,
    output: str | None = None,
) -> RecognitionFile:
    """Read a file, and check that it is a recognition network.

    mean_std: overrides the scale that is derived from the graph.
    order: of the channels that the graph expects, "rgb" or "bgr", if it cannot be derived.
    size: height and width, if the file leaves them open.
    output: name of the embedding, if the file has several outputs.
    """
    path = Path(path).expanduser()
    with naming(path):
        model, sha256 = load_graph(path)
        image = _image(model, path.name)
        batch, *axes = dims(image)
        channels_last = axes[0] != 3
        chosen = _embedding(model, output, path.name)
        nodes = needed_nodes(model.graph, chosen.name)
        del model.graph.node[:]  # the other nodes may have no equivalent in torch
        model.graph.node.extend(nodes)
        _refuse_training(model, image.name, path.name)
        height, width = _size(image, axes[:2] if channels_last else axes[1:], size, path.name)
        shape = (1, height, width, 3) if channels_last else (1, 3, height, width)
        whole = image.type.tensor_type.elem_type == require("onnx").TensorProto.UINT8
        mean, std = _scale(model, image.name, shape, chosen.name, mean_std, order, whole, path.name)
        _leave_open(model, image, chosen, (batch, *shape[1:]))
    return RecognitionFile(
        path=path,
        model=model,
        input=image.name,
        output=chosen.name,
        batch=batch,
        size=(height, width),
        mean=mean,
        std=std,
        channels_last=channels_last,
        whole_pixels=whole,
        sha256=sha256,
    )


def _image(model: ModelProto, name: str) -> ValueInfoProto:
    inputs = image_inputs(model.graph)
    shapes = [dims(value) for value in inputs]
    if len(inputs) != 1 or len(shapes[0]) != 4 or 3 not in (shapes[0][1], shapes[0][3]):
        raise KDHooksError(
            f"a recognition model takes one image tensor (b 3 h w) or (b h w 3), but {name} takes "
            f"{described(inputs)}; choose another file, or export it with such an input only"
        )
    if shapes[0][0] not in (None, 1):
        raise KDHooksError(
            f"the batch of {name} must be open or 1, got {shapes[0][0]}; "
            f"export it with dynamic_axes for axis 0"
        )
    return inputs[0]


def _size(
    image: ValueInfoProto, found: Sequence[int | None], given: Sequence[int] | None, name: str
) -> tuple[int, int]:
    height, width = found
    if given is not None:
        if height not in (None, given[0]) or width not in (None, given[1]):
            raise KDHooksError(
                f"teacher.input.size must fit the input of {name}, {described([image])}; found "
                f"{list(given)}; leave it out, or use the size of the file"
            )
        height, width = given
    if height is None or width is None:
        raise KDHooksError(
            f"{name} must declare the size of its images, got {described([image])}; "
            f"export it with a fixed height and width, or set teacher.input.size"
        )
    return height, width


def _embedding(model: ModelProto, wanted: str | None, name: str) -> ValueInfoProto:
    outputs = {value.name: value for value in model.graph.output}
    listing = described(outputs.values())
    if wanted is not None and wanted not in outputs:
        raise KDHooksError(
            f"teacher.output must be an output of {name}; found {wanted!r}; "
            f"{near_miss(wanted, outputs)}its outputs are: {listing}"
        )
    if wanted is None and len(outputs) > 1:
        raise KDHooksError(
            f"a recognition model returns one embedding (b e), but {name} returns {listing}; set "
            "teacher.output to the name of the embedding; if there are many, the file may be a "
            "detector"
        )
    chosen: list[ValueInfoProto] = [outputs[wanted]] if wanted else list(outputs.values())
    if not chosen or not _may_embed(chosen[0]):
        raise KDHooksError(
            f"a recognition model returns one embedding (b e), but {name} returns "
            f"{described(chosen)}; choose another file: this may be a detector"
        )
    return chosen[0]


def _may_embed(value: ValueInfoProto) -> bool:
    """Whether the shape is (b e) or (b e 1 1), or is not declared."""
    shape = dims(value)
    if not value.type.HasField("tensor_type"):
        return False
    return len(shape) in (0, 2) or (len(shape) == 4 and {*shape[2:]} <= {None, 1})


def _refuse_training(model: ModelProto, image: str, name: str) -> None:
    """Refuse nodes in training mode: embeddings would be random, or depend on the whole batch."""
    constants = Constants(model, image)
    for node in model.graph.node:
        modes = [x.i for x in node.attribute if x.name == "training_mode"]
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            modes = [constants.get(node.input[2])]
        # Before opset 14, only the additional outputs show training mode.
        more = node.op_type == "BatchNormalization" and len([x for x in node.output if x]) > 1
        if more or any(modes):
            raise KDHooksError(
                f"a recognition model must be exported in eval mode, but in {name} "
                f"{node.op_type} (node {node.name or node.output[0]!r}) is in training mode; call "
                "eval() before the export, and export with training=TrainingMode.EVAL"
            )


def _scale(
    model: ModelProto,
    image: str,
    shape: tuple[int, int, int, int],
    output: str,
    said: tuple[float, float] | None,
    order: str | None,
    whole: bool,
    name: str,
) -> tuple[float, float]:
    arrivals, unknown = first_arrivals(model, image, shape, output)
    if order is None:
        check_order(arrivals, name)
    if whole and said not in (None, (0, 1)):
        raise KDHooksError(
            f"the images of {name} are uint8 pixels in 0..255; found mean and std {said}; "
            "leave both out"
        )
    if said is not None:
        return said
    return (0.0, 1.0) if whole and not unknown else mean_std(arrivals, unknown, name)


def _leave_open(
    model: ModelProto,
    image: ValueInfoProto,
    output: ValueInfoProto,
    shape: tuple[int | None, ...],
) -> None:
    """Declare the shape of the images, and clear that of the output, since onnxruntime checks both.

    Some files declare open axes as -1 or 0, which onnxruntime takes literally. insightface's packs
    declare an output of batch 1, which conflicts with the buffer of a larger batch.
    """
    graph = model.graph
    for axis, length in zip(image.type.tensor_type.shape.dim, shape, strict=True):
        if length is None:
            axis.dim_param = "kdhooks_batch"
        else:
            axis.dim_value = length
    output.type.tensor_type.ClearField("shape")
    kept_input, kept_output = type(image)(), type(output)()
    kept_input.CopyFrom(image)
    kept_output.CopyFrom(output)
    for values in (graph.input, graph.output):
        del values[:]
    graph.input.append(kept_input)
    graph.output.append(kept_output)
