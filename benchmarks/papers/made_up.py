"""Small made-up faces, pairs and a teacher, to try the benchmark without real ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.papers.settings import SETTINGS

PEOPLE = 10
IMAGES = 6  # of each person
DIM = 128  # of the teacher's embedding, as SFace's
SFACE_STAGES = tuple(SETTINGS["B"].recorded.values())


def write_faces(folder: Path) -> None:
    """Write each person's images: one pattern of colours, with noise of its own in each image."""
    generator = np.random.default_rng(0)
    for person in range(PEOPLE):
        pattern = generator.integers(40, 215, (7, 7, 3))
        (folder / f"p{person}").mkdir(parents=True)
        for image in range(IMAGES):
            noisy = pattern + generator.integers(-20, 20, pattern.shape)
            pixels = np.kron(noisy, np.ones((16, 16, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"p{person}" / f"p{person}_{image + 1:04d}.png")


def write_pairs(path: Path) -> None:
    """Write two folds of pairs, in the format of LFW's pairs.txt, of the last four people."""
    lines = [f"2\t{IMAGES}"]
    for one, other in ((PEOPLE - 4, PEOPLE - 3), (PEOPLE - 2, PEOPLE - 1)):
        lines += [f"p{p}\t{i}\t{i + 1}" for p in (one, other) for i in range(1, IMAGES, 2)]
        lines += [f"p{one}\t{i}\tp{other}\t{i}" for i in range(1, IMAGES + 1)]
    path.write_text("\n".join(lines) + "\n")


def write_teacher(path: Path, stages: Sequence[str] = SFACE_STAGES) -> None:
    """Write a network of random weights as ONNX; its stages have the sizes of SFace's.

    stages: their three names, from shallow to deep.
    """
    import onnx
    from onnx import helper, numpy_helper

    generator = np.random.default_rng(0)
    shapes = {
        "w0": (8, 3, 4, 4),
        "w1": (16, 8, 3, 3),
        "w2": (32, 16, 3, 3),
        "w3": (DIM, 32 * 7 * 7),
    }
    weights = [
        numpy_helper.from_array(
            (generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name
        )
        for name, shape in shapes.items()
    ]
    first, second, third = stages
    nodes = [
        helper.make_node("Conv", ["data", "w0"], ["x0"], "conv0", strides=[4, 4]),
        helper.make_node("Relu", ["x0"], ["x1"], first),
        helper.make_node("Conv", ["x1", "w1"], ["x2"], "conv1", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["x2"], ["x3"], second),
        helper.make_node("Conv", ["x3", "w2"], ["x4"], "conv2", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["x4"], ["x5"], third),
        helper.make_node("Flatten", ["x5"], ["x6"], "flatten"),
        helper.make_node("Gemm", ["x6", "w3"], ["embedding"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "made_up",
        [helper.make_tensor_value_info("data", onnx.TensorProto.FLOAT, ["b", 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["b", DIM])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
