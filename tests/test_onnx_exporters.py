"""ONNX files from several exporters and converters, compared with their network in float64."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.onnx.session import OnnxModel
from kdhooks.onnx.to_torch import to_torch
from tests.onnx_samples import (
    IResNet,
    MobileFaceNet,
    export,
    images,
    opened_like_insightface,
    randomised,
    taught,
)

Node = helper.make_node


class Pixels(nn.Module):
    """A network that scales the pixels itself."""

    def __init__(self, network: nn.Module, divisor: float = 127.5) -> None:
        super().__init__()
        self.network, self.divisor = network, divisor

    def forward(self, pixels: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        y: Tensor = self.network((pixels - 127.5) / self.divisor)
        return y


class Flipped(nn.Module):
    """Takes RGB images and reverses them for a BGR network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        y: Tensor = self.network(images[:, [2, 1, 0]])
        return y


def own(network: nn.Module, batch: Tensor) -> Tensor:
    """(b 3 h w) -> (b e): the embeddings of the network itself, computed in float64."""
    with torch.no_grad():
        embedding: Tensor = copy.deepcopy(network).double()(batch.double())
        return embedding.float()


def assert_near(found: Tensor, network: nn.Module, batch: Tensor, by: float = 1e-4) -> None:
    """Compare the embeddings, and their differences from the mean as well.

    These networks embed all images close to one point, so only the differences distinguish them.
    """
    expected = own(network, batch)
    assert ((found - expected).norm(dim=1) <= 1e-3 * expected.norm(dim=1)).all()
    apart, wanted = found - found.mean(dim=0), expected - expected.mean(dim=0)
    assert ((apart - wanted).norm(dim=1) <= by * wanted.norm(dim=1)).all()


def photos() -> Tensor:
    """(4 3 112 112), each with its own colours."""
    colours = torch.tensor([[-0.6, 0.2, 0.7], [0.6, 0.1, -0.4], [0.0, -0.7, 0.6], [0.7, 0.6, -0.7]])
    return colours.view(4, 3, 1, 1) + images(4) * 0.3


@pytest.mark.parametrize(
    "seen", [lambda x: x.flip(1), lambda x: x * 127.5 + 127.5, lambda x: x / 2]
)
def test_other_channels_and_scales_would_be_noticed(seen: Callable[[Tensor], Tensor]) -> None:
    network = randomised(IResNet())
    with pytest.raises(AssertionError):
        assert_near(own(network, seen(photos())), network, photos(), by=0.2)


def dynamo(network: nn.Module, path: Path) -> Path:
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (images(2),),
            str(path),
            dynamo=True,
            input_names=["data"],
            output_names=["fc1"],
            dynamic_shapes=({0: torch.export.Dim("b")},),
            verbose=False,
        )
    return path


EXPORTERS: dict[str, Callable[[nn.Module, Path], Path]] = {
    "torchscript": export,
    "torchscript, one image": lambda network, path: export(network, path, open_batch=False),
    "torch2onnx": lambda network, path: opened_like_insightface(
        export(network, path, open_batch=False)
    ),
    "dynamo": dynamo,
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("kind", [IResNet, MobileFaceNet])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_exporters_of_torch(
    tmp_path: Path, exporter: str, kind: type[nn.Module], convert: bool
) -> None:
    network = randomised(kind())
    path = EXPORTERS[exporter](network, tmp_path / "m.onnx")
    assert_near(taught(path, photos(), convert), network, photos())


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_exporters_of_torch_with_pixels(tmp_path: Path, exporter: str, convert: bool) -> None:
    network = randomised(IResNet())
    path = EXPORTERS[exporter](Pixels(network).eval(), tmp_path / "m.onnx")
    assert_near(taught(path, photos(), convert), network, photos())


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_exporters_of_torch_with_a_flip(tmp_path: Path, exporter: str, convert: bool) -> None:
    network = Flipped(randomised(IResNet())).eval()
    path = EXPORTERS[exporter](network, tmp_path / "m.onnx")
    with pytest.raises(KDHooksError, match=r"specify teacher\.input\.order"):
        taught(path, photos(), convert)
    found = taught(path, photos(), convert, input={"order": "rgb"})
    assert_near(found, network, photos())


def by_onnxruntime(path: Path, keep_io_types: bool) -> None:
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    half = float16.convert_float_to_float16(onnx.load(path), keep_io_types=keep_io_types)
    onnx.save(half, path)


def by_onnxconverter(path: Path, keep_io_types: bool) -> None:
    float16 = pytest.importorskip("onnxconverter_common.float16")
    half = float16.convert_float_to_float16(onnx.load(path), keep_io_types=keep_io_types)
    onnx.save(half, path)


@pytest.mark.filterwarnings("ignore")  # the converters warn of numbers that float16 cannot hold
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("keep_io_types", [False, True])
@pytest.mark.parametrize("converter", [by_onnxruntime, by_onnxconverter])
def test_converters_to_float16(
    tmp_path: Path,
    converter: Callable[[Path, bool], None],
    keep_io_types: bool,
    scaled: bool,
    convert: bool,
) -> None:
    network = randomised(IResNet())
    path = export(Pixels(network, 128.0).eval() if scaled else network, tmp_path / "m.onnx")
    converter(path, keep_io_types)
    batch = photos() * (127.5 / 128) if scaled else photos()
    assert_near(taught(path, photos(), convert), network, batch, by=0.2)


def by_onnxsim(path: Path) -> None:
    simplified, _ = pytest.importorskip("onnxsim").simplify(onnx.load(path))
    onnx.save(simplified, path)


def by_onnxslim(path: Path) -> None:
    onnx.save(pytest.importorskip("onnxslim").slim(onnx.load(path)), path)


def by_optimizer(path: Path) -> None:
    onnx.save(pytest.importorskip("onnxoptimizer").optimize(onnx.load(path)), path)


def by_session(path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(path.read_bytes(), options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("simplifier", [by_onnxsim, by_onnxslim, by_optimizer, by_session])
def test_simplifiers(
    tmp_path: Path, simplifier: Callable[[Path], None], scaled: bool, convert: bool
) -> None:
    network = randomised(IResNet())
    path = export(Pixels(network).eval() if scaled else network, tmp_path / "m.onnx")
    simplifier(path)
    assert_near(taught(path, photos(), convert), network, photos())


class Paddle(nn.Module):
    """The network that the graph below computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.PReLU(8)
        self.fc = nn.Linear(8, 16)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        x: Tensor = self.act(self.norm(self.conv(images))).mean(dim=(2, 3))
        y: Tensor = self.fc(x)
        return y


def paddle_graph(network: Paddle, path: Path, scaled: bool) -> Path:
    """Write the network in the style of Paddle's converter: numbered names, weights as Constant
    nodes, scale and bias as Mul and Add of constants, -1 for an open axis, and a final Identity.
    """
    weights = {
        "conv2d_0.w_0": network.conv.weight,
        "batch_norm_0.w_0": network.norm.weight,
        "batch_norm_0.b_0": network.norm.bias,
        "batch_norm_0.w_1": network.norm.running_mean,
        "batch_norm_0.w_2": network.norm.running_var,
        "prelu_0.w_0": network.act.weight.reshape(8, 1, 1),
        "linear_0.w_0": network.fc.weight.T,
        "linear_0.b_0": network.fc.bias,
    }
    arrays = {name: x.detach().numpy() for name, x in weights.items() if x is not None}
    arrays |= {
        "axes": np.array([2, 3], np.int64),
        "scale": np.array([2 / 255], np.float32),
        "bias": np.array([-1], np.float32),
    }
    nodes = [
        Node("Constant", [], [name], f"p2o.Constant.{i}", value=numpy_helper.from_array(value))
        for i, (name, value) in enumerate(arrays.items())
    ]
    first = "x"
    if scaled:
        nodes += [
            Node("Identity", ["x"], ["x0"], "p2o.Identity.0"),
            Node("Mul", ["x0", "scale"], ["scale_0.tmp_0"], "p2o.Mul.0"),
            Node("Add", ["scale_0.tmp_0", "bias"], ["scale_0.tmp_1"], "p2o.Add.0"),
        ]
        first = "scale_0.tmp_1"
    norm = [f"batch_norm_0.{name}" for name in ("w_0", "b_0", "w_1", "w_2")]
    nodes += [
        Node("Conv", [first, "conv2d_0.w_0"], ["c"], "p2o.Conv.0", strides=[2, 2], pads=[1] * 4),
        Node("BatchNormalization", ["c", *norm], ["n"], "p2o.BatchNormalization.0"),
        Node("PRelu", ["n", "prelu_0.w_0"], ["a"], "p2o.PRelu.0"),
        Node("GlobalAveragePool", ["a"], ["p"], "p2o.GlobalAveragePool.0"),
        Node("Squeeze", ["p", "axes"], ["s"], "p2o.Squeeze.0"),
        Node("MatMul", ["s", "linear_0.w_0"], ["m"], "p2o.MatMul.0"),
        Node("Add", ["m", "linear_0.b_0"], ["linear_0.tmp_1"], "p2o.Add.1"),
        Node("Identity", ["linear_0.tmp_1"], ["save_infer_model/scale_0.tmp_1"], "p2o.Identity.1"),
    ]
    takes = helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 3, 112, 112])
    gives = helper.make_tensor_value_info(
        "save_infer_model/scale_0.tmp_1", TensorProto.FLOAT, [-1, 16]
    )
    graph = helper.make_graph(nodes, "paddle-onnx", [takes], [gives])
    opset = [helper.make_opsetid("", 14)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_style_of_paddles_converter(tmp_path: Path, scaled: bool, convert: bool) -> None:
    network = Paddle()
    randomised(network)
    path = paddle_graph(network, tmp_path / "m.onnx", scaled)
    assert_near(taught(path, photos(), convert), network, photos())


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_may_round_to_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime rounds to float16 only on a GPU, so `Rounding` simulates it on the CPU."""

    class Rounding(OnnxModel):
        def __call__(self, images: Tensor) -> Tensor:
            """(b 3 h w) -> (b e)."""
            return super().__call__(images) * 1.01

    monkeypatch.setattr("kdhooks.onnx.to_torch.OnnxModel", Rounding)
    path = export(randomised(IResNet()), tmp_path / "m.onnx")
    with pytest.raises(KDHooksError, match="must agree with onnxruntime, but differs"):
        to_torch(path)
    by_onnxruntime(path, keep_io_types=True)
    to_torch(path)
