"""Graphs that scale their images before one convolution, and the same computations in torch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor

from tests.onnx_samples import pooled, write_graph

Node = helper.make_node
Nodes = list[onnx.NodeProto]

KERNEL = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
CONSTANTS: dict[str, np.ndarray] = {
    "kernel": KERNEL,
    "half": np.array([127.5], np.float32),
    "128th": np.array(0.0078125, np.float32),
    "scalar": np.array(127.5, np.float32),
    "row": np.full(3, 127.5, np.float32),
    "each": np.full((1, 3, 1, 1), 127.5, np.float32),
    "half16": np.array([127.5], np.float16),
    "128th16": np.array([0.0078125], np.float16),
    "two": np.array(2, np.float32),
    "one": np.array(1, np.float32),
    "255": np.array(255, np.float32),
    "mean": MEAN,
    "std": STD,
    "mean255": MEAN * 255,
    "std255": STD * 255,
    "bgr": MEAN[:, ::-1] * 255,
    "bgrstd": STD[:, ::-1] * 255,
    "bgrmiddle": np.array([105, 115, 125], np.float32),
    "diagonal": (np.eye(3, dtype=np.float32) / 127.5).reshape(3, 3, 1, 1),
    "reversed": np.eye(3, dtype=np.float32)[::-1].reshape(3, 3, 1, 1).copy(),
    "depthwise": np.full((3, 1, 1, 1), 1 / 127.5, np.float32),
    "below": np.full(3, -1, np.float32),
    "image": np.random.default_rng(1).uniform(90, 160, (1, 3, 112, 112)).astype(np.float32),
    "ones": np.ones(3, np.float32),
    "zeros": np.zeros(3, np.float32),
    "third": np.full(3, 0.3, np.float32),
    "spread": np.full(3, 4900, np.float32),
    "middle": np.array([125, 115, 105], np.float32),
    "spread1": np.full(3, 0.06, np.float32),
    "middle1": np.array([0.5, 0.45, 0.45], np.float32),
    "grey": np.array([0.299, 0.587, 0.114], np.float32).reshape(1, 3, 1, 1),
    "greys": np.array([[0.299], [0.587], [0.114]], np.float32),
    "turned": np.eye(3, dtype=np.float32)[::-1].copy(),
    "thinned": np.eye(3, dtype=np.float32) / 127.5,
    "255th": np.array(1 / 255, np.float32),
    "127.5th": np.array(1 / 127, np.float32),
    "none": np.array(0, np.uint8),
    "middle8": np.array(127, np.uint8),
    "none8": np.array(0, np.int8),
    "flip": np.array([2, 1, 0]),
    "swap": np.array([0, 2, 1]),
    "start": np.array([-1]),
    "end": np.array([-1000]),
    "axis": np.array([1]),
    "thirds": np.array([1, 1, 1]),
    "rest": np.array([3, 112, 112]),
    "same": np.array([0, 3, 112, 112]),
    "fully": np.array([-1, 3, 112, 112]),
}
SUB_MUL = [Node("Sub", ["x", "half"], ["c"]), Node("Mul", ["c", "128th"], ["y"])]


def written(folder: Path, nodes: Nodes, **options: Any) -> Path:
    """Write a graph whose nodes compute 'y' from 'data', and whose convolution reads 'y'."""
    read = {name for node in nodes for name in node.input} | {"kernel"}
    constants = {name: value for name, value in CONSTANTS.items() if name in read}
    nodes = [*nodes, Node("Conv", ["y", "kernel"], ["maps"]), *pooled("maps")]
    return write_graph(folder / "m.onnx", nodes, constants, **options)


def wanted(arriving: Tensor) -> Tensor:
    """(b 3 h w) -> (b 4): the embedding if the convolution reads these images."""
    return F.conv2d(arriving, torch.from_numpy(KERNEL)).mean(dim=(2, 3))


def pixels(batch: Tensor) -> Tensor:
    return batch * 127.5 + 127.5


def by_128(batch: Tensor) -> Tensor:
    return (pixels(batch) - 127.5) / 128


def by_256ths(batch: Tensor) -> Tensor:
    return (pixels(batch) - 128) / 128


def by_127(batch: Tensor) -> Tensor:
    return batch


def by_imagenet(batch: Tensor) -> Tensor:
    return (pixels(batch) / 255 - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
