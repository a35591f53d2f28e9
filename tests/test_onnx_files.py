"""The contract of ONNX files: their batches, sizes and outputs; and files that violate it."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.testing import assert_close

from kdhooks.errors import KDHooksError
from kdhooks.onnx.graphs import read_graph
from kdhooks.onnx.session import OnnxModel, insightface_model
from kdhooks.onnx.to_torch import to_torch
from kdhooks.recipe import Recipe
from tests.onnx_samples import IResNet, export, images, pooled, randomised, taught, write_graph

Node = helper.make_node


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return randomised(IResNet())


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(network, tmp_path_factory.mktemp("onnx") / "iresnet.onnx")


def changed(file: Path, folder: Path, axes: Sequence[int | str | None]) -> Path:
    """Write the file with other axes for its images; None leaves the axis empty."""
    model = onnx.load(file)
    shape = model.graph.input[0].type.tensor_type.shape
    for axis, length in zip(shape.dim, axes, strict=True):
        axis.Clear()
        if isinstance(length, int):
            axis.dim_value = length
        elif length is not None:
            axis.dim_param = length
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("batch", [-1, 0, "b", "None", None])
def test_an_open_batch_may_have_any_notation(
    file: Path, network: nn.Module, tmp_path: Path, batch: int | str | None, convert: bool
) -> None:
    path = changed(file, tmp_path, [batch, 3, 112, 112])
    with torch.no_grad():
        expected = network(images(3))
    assert_close(taught(path, images(3), convert), expected, rtol=1e-4, atol=1e-5)
    assert not OnnxModel(path).one_by_one


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("open_axis", [-1, 0, "h", None])
def test_an_open_size_is_taken_from_the_recipe(
    file: Path, network: nn.Module, tmp_path: Path, open_axis: int | str | None, convert: bool
) -> None:
    path = changed(file, tmp_path, ["b", 3, open_axis, open_axis])
    with pytest.raises(KDHooksError, match=r"width, or set teacher\.input\.size") as raised:
        taught(path, images(1), convert)
    assert str(path) in str(raised.value)
    with torch.no_grad():
        expected = network(images(3))
    found = taught(path, images(3), convert, input={"size": [112, 112]})
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_open_size_that_the_graph_cannot_take_is_refused(file: Path, tmp_path: Path) -> None:
    path = changed(file, tmp_path, ["b", 3, "h", "w"])
    with pytest.raises(
        KDHooksError,
        match=r"must load m\.onnx, but fails: .*; a newer .* if the file leaves its size open, it "
        r"may need another teacher\.input\.size than \[96, 96\]",
    ):
        taught(path, images(1), convert=False, input={"size": [96, 96]})


def test_a_graph_that_fails_on_an_image_is_refused(tmp_path: Path) -> None:
    nodes = [Node("Gather", ["data", "seven"], ["x"], axis=1), *pooled("x")]
    path = write_graph(tmp_path / "m.onnx", nodes, {"seven": np.array([7])}, gives=[("b", 1)])
    with pytest.raises(KDHooksError, match=r"Gather \(node 'x'\) fails: "):
        OnnxModel(path)
    with pytest.raises(
        KDHooksError,
        match=r"onnxruntime must run m\.onnx on an image \(1, 3, 112, 112\), but fails: .*; choose",
    ):
        OnnxModel(path, (127.5, 127.5))


def test_a_size_other_than_the_files_is_refused(file: Path) -> None:
    with pytest.raises(
        KDHooksError,
        match=r"size must fit the input of iresnet\.onnx, data \(\?, 3, 112, 112\); found "
        r"\[96, 112\]; leave it out",
    ):
        taught(file, images(1), convert=False, input={"size": [96, 112]})


def two_outputs(path: Path, names: Sequence[str] = ("fc1", "norm")) -> Path:
    """Write a graph with an embedding, and a number that `to_torch` cannot convert."""
    graph = helper.make_graph(
        [*pooled("data"), Node("ReduceL2", ["fc1"], ["norm"], axes=[1], keepdims=1)],
        "sample",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["b", 3, 112, 112])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", width])
            for name, width in (("fc1", 3), ("norm", 1))
            if name in names
        ],
    )
    opsets = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize("convert", [False, True])
def test_one_of_several_outputs_is_chosen_by_name(tmp_path: Path, convert: bool) -> None:
    path = two_outputs(tmp_path / "m.onnx")
    with pytest.raises(
        KDHooksError, match=r"returns fc1 \(\?, 3\), norm \(\?, 1\); set teacher\.output"
    ):
        taught(path, images(1), convert)
    with pytest.raises(
        KDHooksError,
        match=r"teacher\.output must be an output of m\.onnx; found 'fc'; did you mean 'fc1'\? its "
        r"outputs are: fc1 \(\?, 3\), norm \(\?, 1\)",
    ):
        taught(path, images(1), convert, output="fc")
    found = taught(path, images(2), convert, output="fc1")
    assert_close(found, images(2).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_the_other_output_can_be_chosen(tmp_path: Path) -> None:
    path = two_outputs(tmp_path / "m.onnx")
    found = taught(path, images(2), convert=False, output="norm")
    expected = images(2).mean(dim=(2, 3)).norm(dim=1, keepdim=True)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_pack_may_hold_a_file_of_several_outputs(tmp_path: Path) -> None:
    pack = tmp_path / "models" / "ours"
    pack.mkdir(parents=True)
    nodes = [Node("Identity", ["data"], [name]) for name in ("fc1", "fc2")]
    path = write_graph(pack / "m.onnx", nodes, {}, gives=[(1, 512), (1, 1)])
    with pytest.raises(KDHooksError, match=r"ours holds none: m\.onnx"):
        insightface_model("ours", tmp_path)
    assert insightface_model("ours", tmp_path, output="fc1") == path


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        ({"onnx": "m.onnx", "output": 0}, "teacher.output must be a string; found 0"),
        (
            {"module": nn.Identity(), "output": "fc1"},
            "teacher.output belongs to teacher.onnx or teacher.insightface; found module",
        ),
    ],
)
def test_the_key_output_is_checked(tmp_path: Path, teacher: dict[str, Any], match: str) -> None:
    (tmp_path / "m.onnx").touch()
    if "onnx" in teacher:
        teacher = {**teacher, "onnx": tmp_path / "m.onnx"}
    with pytest.raises(KDHooksError, match=match):
        Recipe.read({"teacher": teacher, "methods": ["fcd"]})


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("shape", [("b", 3, 1, 1), None])
def test_embeddings_with_axes_of_one_are_flattened(
    tmp_path: Path, shape: tuple[str | int, ...] | None, convert: bool
) -> None:
    nodes = [Node("GlobalAveragePool", ["data"], ["fc1"])]
    path = write_graph(tmp_path / "m.onnx", nodes, {}, gives=[shape])
    found = taught(path, images(3), convert)
    assert_close(found, images(3).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [False, True])
def test_a_squeeze_at_the_end_leaves_the_batch(tmp_path: Path, convert: bool) -> None:
    nodes = [
        Node("GlobalAveragePool", ["data"], ["pooled"]),
        Node("Squeeze", ["pooled", "axes"], ["fc1"]),
    ]
    path = write_graph(tmp_path / "m.onnx", nodes, {"axes": np.array([2, -1])}, gives=[("b", 3)])
    found = taught(path, images(3), convert)
    assert_close(found, images(3).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [False, True])
def test_nodes_may_stand_in_any_order(tmp_path: Path, convert: bool) -> None:
    nodes = [*pooled("y"), Node("Mul", ["c", "s"], ["y"]), Node("Sub", ["data", "h"], ["c"])]
    constants = {"h": np.array(127.5, np.float32), "s": np.array(1 / 127.5, np.float32)}
    path = write_graph(tmp_path / "m.onnx", nodes, constants, gives=[("b", 3)])
    found = taught(path, images(3), convert)
    assert_close(found, images(3).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_nodes_in_a_circle_are_refused(tmp_path: Path) -> None:
    nodes = [Node("Add", ["data", "b"], ["a"], name="first"), Node("Relu", ["a"], ["b"])]
    path = write_graph(tmp_path / "m.onnx", [*nodes, *pooled("b")], {}, gives=[("b", 3)])
    with pytest.raises(
        KDHooksError, match=r"nodes of m\.onnx must not form a cycle, but 'first' dep"
    ):
        OnnxModel(path)


@pytest.mark.parametrize("convert", [False, True])
def test_local_functions_are_inlined(tmp_path: Path, convert: bool) -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    body = [
        Node("Constant", [], ["h"], value_float=127.5),
        Node("Sub", ["x", "h"], ["c"]),
        Node("Div", ["c", "h"], ["y"]),
    ]
    function = helper.make_function("own", "Normalise", ["x"], ["y"], body, opsets[:1])
    graph = helper.make_graph(
        [Node("Normalise", ["data"], ["y"], domain="own"), *pooled("y")],
        "sample",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["b", 3, 112, 112])],
        [helper.make_tensor_value_info("fc1", TensorProto.FLOAT, ["b", 3])],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    found = taught(tmp_path / "m.onnx", images(3), convert)
    assert_close(found, images(3).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def assert_refused(path: Path, match: str) -> None:
    for opened in (OnnxModel, to_torch):
        with pytest.raises(KDHooksError, match=match) as raised:
            opened(path)
        assert str(path) in str(raised.value)


def test_a_file_cut_short_is_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    content = file.read_bytes()
    for length in (1, 100, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:length])
        assert_refused(path, "must be an ONNX model, but its|onnxruntime .* must load")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, r"must be readable, but .* is not \(Is a directory\); check the path")


def test_a_file_without_permission_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(KDHooksError, match=r"iresnet\.onnx is not \(Permission denied\); check"):
        read_graph(file)


def test_external_weights_cut_short_are_refused(file: Path, tmp_path: Path) -> None:
    path, weights = tmp_path / "split.onnx", tmp_path / "split.bin"
    onnx.save(
        onnx.load(file), path, save_as_external_data=True, location=weights.name, size_threshold=0
    )
    weights.write_bytes(weights.read_bytes()[:100])
    assert_refused(path, "split.onnx")


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("kind", ["BatchNormalization", "Dropout"])
def test_a_network_exported_in_training_mode_is_refused(
    tmp_path: Path, kind: str, convert: bool
) -> None:
    """onnxruntime would use the statistics of the batch, and drop values at random."""
    layers = {
        "BatchNormalization": helper.make_node(
            kind, ["data", "w", "b", "m", "v"], ["y", "m2", "v2"], training_mode=1
        ),
        "Dropout": helper.make_node(kind, ["data", "ratio", "train"], ["y"]),
    }
    constants = {name: np.full(3, 0.5, np.float32) for name in "wbmv"}
    constants |= {"ratio": np.array(0.5, np.float32), "train": np.array(True)}
    path = write_graph(tmp_path / "m.onnx", [layers[kind], *pooled("y")], constants)
    said = rf"eval mode, but in m\.onnx {kind} \(node 'y'\) is in training mode; call eval"
    with pytest.raises(KDHooksError, match=said):
        taught(path, images(2), convert)


@pytest.mark.parametrize("convert", [False, True])
def test_a_dropout_in_eval_mode_is_taken(tmp_path: Path, convert: bool) -> None:
    layer = helper.make_node("Dropout", ["data", "ratio", "train"], ["y"])
    constants = {"ratio": np.array(0.5, np.float32), "train": np.array(False)}
    path = write_graph(tmp_path / "m.onnx", [layer, *pooled("y")], constants)
    assert taught(path, images(2), convert).shape == (2, 3)


def value(name: str, shape: Sequence[int | str] = ("b", 3, 112, 112)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


ODD: dict[str, tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto], str]] = {
    "two inputs": (
        [value("data"), value("other", ("b", 1))],
        [value("fc1", ("b", 3))],
        r"takes data \(\?, 3, 112, 112\), other \(\?, 1\); choose another file",
    ),
    "no outputs": ([value("data")], [], "returns nothing; choose another file"),
    "a row": ([value("data")], [value("fc1", (3,))], r"returns fc1 \(3,\); choose another file"),
    "a map": (
        [value("data")],
        [value("fc1", ("b", 3, 7, 7))],
        r"returns fc1 \(\?, 3, 7, 7\); choose another file",
    ),
    "a sequence": (
        [value("data")],
        [helper.make_tensor_sequence_value_info("fc1", TensorProto.FLOAT, ["b", 3])],
        r"returns fc1 \(no tensor\); choose another file",
    ),
    "a batch of eight": (
        [value("data", (8, 3, 112, 112))],
        [value("fc1", (8, 3))],
        "the batch of m.onnx must be open or 1, got 8; export it",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_graphs_of_another_form_are_refused(tmp_path: Path, case: str) -> None:
    takes, gives, match = ODD[case]
    nodes = [*pooled("data"), Node("Identity", ["other"], ["unused"])]
    graph = helper.make_graph(nodes[: 2 + (len(takes) > 1)], "sample", takes, gives)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    assert_refused(tmp_path / "m.onnx", match)


def test_an_opset_of_the_future_is_refused(file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    model.opset_import[0].version = 999
    onnx.save(model, tmp_path / "m.onnx")
    match = r"onnxruntime .* must load m\.onnx, but fails: .*999(.|\n)*; a newer"
    assert_refused(tmp_path / "m.onnx", match)


def test_an_operator_without_a_torch_module_names_the_file(tmp_path: Path) -> None:
    nodes = [*pooled("data")[:1], Node("Erf", ["pooled"], ["x"]), Node("Flatten", ["x"], ["fc1"])]
    path = write_graph(tmp_path / "m.onnx", nodes, {}, gives=[("b", 3)])
    assert OnnxModel(path)(images(1)).shape == (1, 3)
    with pytest.raises(KDHooksError, match=re.escape(f"'{path}': ONNX operator Erf (node 'x')")):
        to_torch(path)


def test_a_missing_package_is_named_with_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert_refused(
        file, r"need the package onnx, which is not installed; run pip install '\.\[onnx\]' in a "
    )
