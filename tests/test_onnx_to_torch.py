"""`to_torch` compared with onnxruntime and with the exported network."""

import copy
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks.errors import KDHooksError
from kdhooks.onnx import operators
from kdhooks.onnx.files import read_recognition_file
from kdhooks.onnx.session import OnnxModel
from kdhooks.onnx.to_torch import OnnxNetwork, to_torch
from tests.onnx_samples import (
    IResNet,
    export,
    images,
    pooled,
    randomised,
    sface,
    write_graph,
)

Node = helper.make_node


def uniform(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)


def assert_agrees(network: OnnxNetwork, path: Path, count: int = 3) -> None:
    pixels = images(count, network.size[0]) * 127.5 + 127.5
    batch = (pixels - network.mean) / network.std
    with torch.no_grad():
        ours, theirs = network(batch), OnnxModel(path, (network.mean, network.std))(batch)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_children_have_the_names_of_the_nodes(tmp_path: Path) -> None:
    network = to_torch(export(randomised(IResNet()), tmp_path / "m.onnx"))
    children = dict(network.named_children())
    assert isinstance(children["blocks_blocks_0_prelu_PRelu"], nn.PReLU)
    assert isinstance(children["blocks_blocks_1_bn1_BatchNormalization"], nn.BatchNorm2d)
    assert isinstance(children["features_BatchNormalization"], nn.BatchNorm1d)
    assert isinstance(children["fc_Gemm"], nn.Linear)


def test_features_can_be_tapped(tmp_path: Path) -> None:
    exported = randomised(IResNet())
    network = to_torch(export(exported, tmp_path / "m.onnx"))
    seen: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    for module in (
        network.get_submodule("blocks_blocks_0_Add"),
        exported.get_submodule("blocks.0"),
    ):
        module.register_forward_hook(record)
    with torch.no_grad():
        network(images(2))
        exported(images(2))
    assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_equal_names_and_names_of_module_attributes_get_a_suffix(tmp_path: Path) -> None:
    values = ["data", "a", "b", "c", "d", "e"]
    names = ["/twin/x", "twin.x", "forward", "0/1", ""]
    steps = zip(values, values[1:], names, strict=False)
    nodes = [Node("Relu", [x], [y], name=name) for x, y, name in steps]
    path = write_graph(tmp_path / "m.onnx", [*nodes, *pooled("e")], {}, gives=[("b", 3)])
    children = [name for name, _ in to_torch(path, (127.5, 127.5)).named_children()]
    assert children == ["twin_x", "twin_x_", "forward_", "0_1", "e", "pooled", "fc1"]


def test_an_embedding_that_another_node_reads_is_returned(tmp_path: Path) -> None:
    nodes = [*pooled("data"), Node("Relu", ["fc1"], ["unused"])]
    path = write_graph(tmp_path / "m.onnx", nodes, {}, gives=[("b", 3)])
    assert_agrees(to_torch(path), path)


def test_settings_that_matter_in_training_are_kept(tmp_path: Path) -> None:
    nodes = [
        Node("BatchNormalization", ["data", *["k3"] * 4], ["x"], momentum=0.7, name="norm"),
        Node("Dropout", ["x", "ratio"], ["y"], name="drop"),
        *pooled("y"),
    ]
    constants = {"k3": uniform(3), "ratio": np.array(0.25, np.float32)}
    path = write_graph(tmp_path / "m.onnx", nodes, constants, gives=[("b", 3)])
    network = to_torch(path, (127.5, 127.5))
    norm, drop = network.get_submodule("norm"), network.get_submodule("drop")
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(drop, nn.Dropout)
    assert norm.momentum == pytest.approx(0.3)  # torch weighs the new value, ONNX the old one
    assert drop.p == 0.25


def test_gradients_reach_the_images_and_every_parameter(tmp_path: Path) -> None:
    network = to_torch(export(randomised(IResNet()), tmp_path / "m.onnx"))
    batch = images(2).requires_grad_()
    network(batch).square().sum().backward()
    assert batch.grad is not None
    assert batch.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_converting_draws_no_random_numbers(tmp_path: Path) -> None:
    path = export(randomised(IResNet()), tmp_path / "m.onnx")
    before = torch.get_rng_state()
    to_torch(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_and_state_dicts_carry_everything(tmp_path: Path) -> None:
    path = export(randomised(IResNet()), tmp_path / "m.onnx")
    network = to_torch(path)
    assert not network.training
    emptied = copy.deepcopy(network)
    for value in emptied.state_dict().values():
        value.zero_()
    emptied.load_state_dict(network.state_dict())
    assert_close(emptied(images(2)), network(images(2)), rtol=0, atol=0)


CASES: dict[str, list[onnx.NodeProto]] = {
    "constant minus branch": [Node("Sub", ["k", "data"], ["y"])],
    "branch divided by constant": [Node("Div", ["data", "k"], ["y"])],
    "constant divided by branch": [
        Node("Add", ["data", "k4"], ["x"]),
        Node("Div", ["k", "x"], ["y"]),
    ],
    "two branches": [
        Node("Sigmoid", ["data"], ["gate"]),
        Node("Mul", ["data", "gate"], ["x"]),
        Node("Sub", ["x", "gate"], ["y"]),
    ],
    "a branch with itself": [Node("Mul", ["data", "data"], ["y"])],
    "asymmetric padding": [Node("Conv", ["data", "kernel"], ["y"], pads=[0, 1, 2, 0])],
    "strides and dilations": [
        Node("Conv", ["data", "kernel", "b4"], ["y"], strides=[2, 3], dilations=[1, 2])
    ],
    "groups": [Node("Conv", ["data", "depthwise"], ["y"], group=3)],
    "one slope": [Node("PRelu", ["data", "one"], ["y"])],
    "slope per channel": [Node("PRelu", ["data", "k"], ["y"])],
    "clip": [Node("Clip", ["data", "low", "high"], ["y"])],
    "clip from below": [Node("Clip", ["data", "low"], ["y"])],
    "clip from above": [Node("Clip", ["data", "", "high"], ["y"])],
    "concat": [Node("Relu", ["data"], ["x"]), Node("Concat", ["x", "data"], ["y"], axis=1)],
    "identity and dropout": [
        Node("Identity", ["data"], ["x"]),
        Node("Dropout", ["x", "high"], ["y"]),
    ],
    "normalisation": [Node("BatchNormalization", ["data", *["k3"] * 4], ["y"], epsilon=0.1)],
    "weights computed from constants": [
        Node("Constant", [], ["two"], value_float=2.0),
        Node("Mul", ["kernel", "two"], ["doubled"]),
        Node("Conv", ["data", "doubled"], ["y"]),
    ],
    "int8 weights in blocks": [
        Node("DequantizeLinear", ["int8", "scales", "zeros"], ["flat"], axis=1, block_size=9),
        Node("Reshape", ["flat", "kernel_shape"], ["w"]),
        Node("Conv", ["data", "w"], ["y"]),
    ],
}

CONSTANTS = {
    "k": uniform(3, 1, 1),
    "k3": uniform(3),
    "k4": np.array(4, np.float32),
    "one": uniform(1),
    "low": np.array(-0.25, np.float32),
    "high": np.array(0.5, np.float32),
    "kernel": uniform(4, 3, 3, 3) - 1,
    "depthwise": uniform(6, 1, 3, 3) - 1,
    "b4": uniform(4),
    "int8": np.random.default_rng(0).integers(-128, 128, (4, 27), dtype=np.int8),
    "scales": uniform(4, 3) / 128,
    "zeros": np.random.default_rng(1).integers(-9, 9, (4, 3), dtype=np.int8),
    "kernel_shape": np.array([4, 3, 3, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_agree(tmp_path: Path, case: str) -> None:
    nodes = [*CASES[case], *pooled("y")]
    path = write_graph(tmp_path / "m.onnx", nodes, CONSTANTS, gives=[("b", "k")])
    assert_agrees(to_torch(path, mean_std=(127.5, 127.5)), path)


HEADS: dict[str, list[onnx.NodeProto]] = {
    "matrix product and bias": [
        Node("MatMul", ["x", "weight"], ["z"]),
        Node("Add", ["z", "b5"], ["fc1"]),
    ],
    "gemm": [Node("Gemm", ["x", "weight"], ["fc1"])],
    "scaled gemm": [Node("Gemm", ["x", "turned", "b5"], ["fc1"], transB=1, alpha=0.5, beta=3.0)],
    "gemm with one bias": [Node("Gemm", ["x", "weight", "one"], ["fc1"])],
    "rectified": [Node("PRelu", ["x", "slope"], ["z"]), Node("Gemm", ["z", "weight"], ["fc1"])],
    "normalised": [
        Node("Gemm", ["x", "weight"], ["z"]),
        Node("BatchNormalization", ["z", *["b5"] * 4], ["fc1"]),
    ],
}


@pytest.mark.parametrize("flatten", ["Flatten", "Reshape"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_agree(tmp_path: Path, head: str, flatten: str) -> None:
    constants = {
        "weight": uniform(192, 5) - 1,
        "turned": uniform(5, 192) - 1,
        "b5": uniform(5),
        "one": uniform(1),
        "slope": uniform(192),
        "shape": np.array([0, -1]),
    }
    inputs = ["data"] if flatten == "Flatten" else ["data", "shape"]
    nodes = [Node(flatten, inputs, ["x"]), *HEADS[head]]
    path = write_graph(
        tmp_path / "m.onnx", nodes, constants, takes=("b", 3, 8, 8), gives=[("b", 5)]
    )
    assert_agrees(to_torch(path, mean_std=(127.5, 127.5)), path)


REFUSED: list[tuple[onnx.NodeProto, str]] = [
    (Node("Softmax", ["data"], ["y"]), "the known ones are Add, BatchNormalization, Cast, "),
    (
        Node("FusedConv", ["data", "kernel"], ["y"], domain="com.microsoft", activation="Relu"),
        "the known ones are Add, ",
    ),
    (Node("Conv", ["data", "kernel"], ["y"], auto_pad="SAME_UPPER"), "its padding is automatic"),
    (Node("Gemm", ["fc1", "row"], ["y"], transA=1), "it transposes its input"),
    (Node("PRelu", ["data", "wide"], ["y"]), "its slope (112,) is not one number or one per"),
    (Node("MatMul", ["data", "stack"], ["y"]), "its right side (3, 112, 112) is not a matrix"),
    (Node("MatMul", ["data", "data"], ["y"]), "its input 1 depends on the image"),
    (Node("Cast", ["data"], ["y"], to=onnx.TensorProto.INT32), "it rounds to whole numbers"),
    (Node("Gather", ["data", "first"], ["y"], axis=0), "its axis is that of the batch"),
    (Node("Gather", ["data", "pair"], ["y"], axis=1), "its indices (2, 2) are not a row"),
    (Node("GatherND", ["data", "triple"], ["y"]), "its indices (1, 3) are not a column"),
    (Node("Flatten", ["data"], ["y"], axis=2), "its axis is 2, not 1"),
    (Node("Reshape", ["data", "rows"], ["y"]), "its shape [-1, 3, 12544] does not flatten each"),
    (Node("Concat", ["data", "data"], ["y"], axis=0), "it joins images of the batch, or constants"),
    (Node("Concat", ["image", "data"], ["y"], axis=1), "it joins images of the batch, or const"),
]


@pytest.mark.parametrize(("node", "reason"), REFUSED)
def test_a_node_that_cannot_be_converted_is_refused(
    tmp_path: Path, node: onnx.NodeProto, reason: str
) -> None:
    constants = {
        "kernel": CONSTANTS["kernel"],
        "k3": uniform(3),
        "row": uniform(1, 5),
        "wide": uniform(112),
        "stack": uniform(3, 112, 112),
        "first": np.array([0]),
        "pair": np.array([[0, 1], [1, 2]]),
        "triple": np.array([[0, 0, 0]]),
        "rows": np.array([-1, 3, 12544]),
        "image": uniform(1, 3, 112, 112),
    }
    # The embedding does not depend on y; the node is refused anyway.
    path = write_graph(tmp_path / "m.onnx", pooled("data"), constants, takes=(1, 3, 112, 112))
    file = read_recognition_file(path)
    file.model.graph.node.append(node)
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    start = f"ONNX operator {operator} (node 'y') cannot become a torch module: {reason}"
    with pytest.raises(KDHooksError, match=re.escape(start) + ".*; use OnnxModel, which runs any"):
        to_torch(file)


def test_a_node_that_torch_refuses_is_refused(tmp_path: Path) -> None:
    nodes = [
        Node("Gather", ["data", "red"], ["rows"], axis=1),
        Node("Conv", ["rows", "along"], ["y"], name="rows"),
        *pooled("y"),
    ]
    constants = {"red": np.array(0), "along": uniform(4, 112, 3)}
    path = write_graph(tmp_path / "m.onnx", nodes, constants)
    with pytest.raises(KDHooksError, match=r"Conv \(node 'rows'\) cannot become .*: torch says: "):
        to_torch(path)


def test_constants_of_another_domain_are_refused(tmp_path: Path) -> None:
    inputs = ["int8", "scale", "zero"]
    nodes = [
        Node("DequantizeLinear", inputs, ["kernel"], domain="com.microsoft"),
        Node("Conv", ["data", "kernel"], ["y"]),
        *pooled("y"),
    ]
    constants: dict[str, np.ndarray] = {
        "int8": np.ones((4, 3, 3, 3), np.int8),
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
    }
    path = write_graph(tmp_path / "m.onnx", nodes, constants)
    with pytest.raises(KDHooksError, match=r"com\.microsoft\.DequantizeLinear \(node 'kernel'\)"):
        to_torch(path)


def test_a_network_that_disagrees_is_not_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(randomised(IResNet()), tmp_path / "m.onnx")
    monkeypatch.setitem(operators._MODULES, "PRelu", lambda node: nn.ReLU())
    with pytest.raises(KDHooksError, match=r"of m\.onnx must agree .* differs by \d\.\de-0\d of"):
        to_torch(path)


def test_sface_agrees_to_five_digits() -> None:
    path = sface()
    network = to_torch(path)
    assert sum(p.numel() for p in network.parameters()) > 9.6e6
    assert "conv_14_relu" in dict(network.named_children())
    assert (network.mean, network.std, network.size) == (0, 1, (112, 112))
    assert_agrees(network, path, count=2)
