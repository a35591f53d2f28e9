"""The scaling of pixels before a graph's first convolution, compared with torch's results."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.testing import assert_close

from kdhooks.errors import KDHooksError
from kdhooks.onnx.session import OnnxModel
from tests.onnx_samples import images, pooled, taught, write_graph
from tests.onnx_scaled import (
    CONSTANTS,
    SUB_MUL,
    Node,
    Nodes,
    by_127,
    by_128,
    by_256ths,
    by_imagenet,
    pixels,
    wanted,
    written,
)


def constant(**value: Any) -> onnx.NodeProto:
    return Node("Constant", [], ["k"], **value)


def last_axis_times(matrix: str, end: str) -> Nodes:
    return [
        Node("Transpose", ["data"], ["last"], perm=[0, 2, 3, 1]),
        Node("MatMul", ["last", matrix], ["product"]),
        Node("Transpose", ["product"], [end], perm=[0, 3, 1, 2]),
    ]


# Nodes before Sub and Mul, which read x.
BEFORE: dict[str, Nodes] = {
    "identity": [Node("Identity", ["data"], ["x"])],
    "cast": [Node("Cast", ["data"], ["x"], to=TensorProto.FLOAT)],
    "dropout": [Node("Dropout", ["data"], ["x"])],
    "reshape": [Node("Reshape", ["data", "fully"], ["x"])],
    "reshape that keeps the batch": [Node("Reshape", ["data", "same"], ["x"])],
    "two transpositions": [
        Node("Transpose", ["data"], ["t"], perm=[0, 2, 3, 1]),
        Node("Transpose", ["t"], ["x"], perm=[0, 3, 1, 2]),
    ],
    "two flips": [
        Node("Gather", ["data", "flip"], ["t"], axis=1),
        Node("Slice", ["t", "start", "end", "axis", "start"], ["x"]),
    ],
    "a split and a concatenation": [
        Node("Split", ["data", "thirds"], ["r", "g", "b"], axis=1),
        Node("Concat", ["r", "g", "b"], ["x"], axis=-3),
    ],
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("before", BEFORE)
def test_nodes_before_the_scaling_do_not_hide_it(
    tmp_path: Path, before: str, convert: bool
) -> None:
    path = written(tmp_path, [*BEFORE[before], *SUB_MUL])
    assert_close(taught(path, images(3), convert), wanted(by_128(images(3))), atol=1e-4, rtol=1e-4)


def sub_mul(constants: Nodes, half: str = "half", factor: str = "128th") -> Nodes:
    return [*constants, Node("Sub", ["data", half], ["c"]), Node("Mul", ["c", factor], ["y"])]


SCALED: dict[str, tuple[Nodes, Callable[[Tensor], Tensor]]] = {
    "scalar": (sub_mul([], "scalar"), by_128),
    "product": ([*last_axis_times("thinned", "s"), Node("Sub", ["s", "one"], ["y"])], by_127),
    "per channel": (sub_mul([], "each"), by_128),
    "value": (sub_mul([constant(value=helper.make_tensor("", 1, [1], [127.5]))], "k"), by_128),
    "value_float": (sub_mul([constant(value_float=127.5)], "k"), by_128),
    "value_floats": (sub_mul([constant(value_floats=[127.5])], "k"), by_128),
    "value_int": (
        sub_mul([constant(value_int=128), Node("Cast", ["k"], ["f"], to=1)], "f"),
        by_256ths,
    ),
    "cast of a constant": (sub_mul([Node("Cast", ["half16"], ["k"], to=1)], "k"), by_128),
    "identity of a constant": (sub_mul([Node("Identity", ["half"], ["k"])], "k"), by_128),
    "unsqueezed constants": (
        sub_mul(
            [constant(value_ints=[1, 2]), Node("Unsqueeze", ["row", "k"], ["v"])],
            "v",
        ),
        by_128,
    ),
    "a filled constant": (
        sub_mul(
            [
                Node(
                    "ConstantOfShape",
                    ["axis"],
                    ["k"],
                    value=helper.make_tensor("", 1, [1], [127.5]),
                )
            ],
            "k",
        ),
        by_128,
    ),
    "a computed constant": (sub_mul([Node("Div", ["one", "128th"], ["k"])], "k"), by_256ths),
    "added": ([Node("Neg", ["half"], ["k"]), Node("Add", ["k", "data"], ["c"]),
               Node("Div", ["c", "scalar"], ["y"])], by_127),
    "doubled": ([Node("Mul", ["two", "data"], ["c"]), Node("Div", ["c", "255"], ["d"]),
                 Node("Sub", ["d", "one"], ["y"])], by_127),
    "pixels from 0 to 1": (
        [Node("Mul", ["data", "two"], ["c"]), Node("Sub", ["c", "one"], ["y"])], by_127
    ),
    "imagenet": (
        [Node("Sub", ["data", "mean255"], ["c"]), Node("Div", ["c", "std255"], ["y"])], by_imagenet
    ),
    "imagenet from 0 to 1": (
        [Node("Sub", ["data", "mean"], ["c"]), Node("Div", ["c", "std"], ["y"])], by_imagenet
    ),
    "imagenet in three steps": (
        [Node("Div", ["data", "255"], ["a"]), Node("Sub", ["a", "mean"], ["c"]),
         Node("Div", ["c", "std"], ["y"])], by_imagenet
    ),
    "a 1x1 convolution": ([Node("Conv", ["data", "diagonal", "below"], ["y"])], by_127),
    "a depthwise convolution": (
        [
            Node("Sub", ["data", "half"], ["x"]),
            Node("Conv", ["x", "depthwise"], ["y"], group=3),
        ],
        by_127,
    ),
    "nothing": ([Node("Identity", ["data"], ["y"])], by_127),
    "statistics of pixels": (
        [Node("BatchNormalization", ["data", "ones", "zeros", "middle", "spread"], ["y"])],
        lambda x: (pixels(x) - torch.from_numpy(CONSTANTS["middle"]).view(3, 1, 1)) / 70,
    ),
    "statistics from -1 to 1": (
        [Node("BatchNormalization", ["data", "ones", "zeros", "zeros", "third"], ["y"])],
        lambda x: x / 0.3**0.5,
    ),
    "statistics of scaled pixels": (
        [
            Node("Div", ["data", "255"], ["x"]),
            Node("BatchNormalization", ["x", "ones", "zeros", "middle1", "spread1"], ["y"]),
        ],
        lambda x: (
            (pixels(x) / 255 - torch.from_numpy(CONSTANTS["middle1"]).view(3, 1, 1)) / 0.06**0.5
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("case", SCALED)
def test_the_scale_is_derived_from_the_graph(tmp_path: Path, case: str, convert: bool) -> None:
    nodes, arriving = SCALED[case]
    path = written(tmp_path, nodes)
    found = taught(path, images(3), convert)
    assert_close(found, wanted(arriving(images(3))), atol=1e-4, rtol=1e-4)


FLIPS: dict[str, Nodes] = {
    "gather": [Node("Gather", ["data", "flip"], ["x"], axis=1)],
    "slice": [Node("Slice", ["data", "start", "end", "axis", "start"], ["x"])],
    "split and concatenation": [
        Node("Split", ["data", "thirds"], ["r", "g", "b"], axis=1),
        Node("Concat", ["b", "g", "r"], ["x"], axis=1),
    ],
    "1x1 convolution": [Node("Conv", ["data", "reversed"], ["x"])],
    "product": last_axis_times("turned", "x"),
    "gathers and concatenation": [
        *[
            Node("Constant", [], [f"i{i}"], value=helper.make_tensor("", 7, [1], [i]))
            for i in range(3)
        ],
        *[Node("Gather", ["data", f"i{i}"], [f"c{i}"], axis=1) for i in range(3)],
        Node("Concat", ["c2", "c1", "c0"], ["x"], axis=1),
    ],
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("flip", FLIPS)
def test_a_flip_of_the_channels_needs_the_order(tmp_path: Path, flip: str, convert: bool) -> None:
    path = written(tmp_path, [*FLIPS[flip], *SUB_MUL])
    with pytest.raises(
        KDHooksError,
        match=r"m\.onnx': m\.onnx puts the channels of its images in another order, \[2, 1, 0\], .*"
        r'specify teacher\.input\.order, "rgb" or "bgr"',
    ):
        taught(path, images(1), convert)
    batch = images(3)
    for order, arriving in (("rgb", batch.flip(1)), ("bgr", batch)):
        found = taught(path, batch, convert, input={"order": order})
        assert_close(found, wanted(by_128(arriving)), atol=1e-4, rtol=1e-4)


def test_a_flip_is_found_after_the_scaling_and_beside_unknown_nodes(tmp_path: Path) -> None:
    behind = [Node("Sub", ["data", "half"], ["c"]), Node("Mul", ["c", "128th"], ["s"])]
    path = written(tmp_path, [*behind, Node("Gather", ["s", "flip"], ["y"], axis=1)])
    with pytest.raises(KDHooksError, match=r"another order, \[2, 1, 0\]"):
        OnnxModel(path)
    for nodes in (
        [*FLIPS["gather"], Node("Sqrt", ["x"], ["y"])],
        [Node("Sqrt", ["data"], ["r"]), Node("Gather", ["r", "flip"], ["y"], axis=1)],
        [*FLIPS["gather"], Node("Gelu", ["x"], ["y"], domain="com.microsoft")],
    ):
        path = written(tmp_path, nodes)
        with pytest.raises(KDHooksError, match=r"another order, \[2, 1, 0\]"):
            OnnxModel(path, (0, 255))


@pytest.mark.parametrize("convert", [False, True])
def test_a_specified_order_is_used_without_a_flip(tmp_path: Path, convert: bool) -> None:
    path = written(tmp_path, [Node("Identity", ["data"], ["y"])])
    found = taught(path, images(2), convert, input={"order": "bgr"})
    assert_close(found, wanted(images(2).flip(1)), atol=1e-4, rtol=1e-4)


BLUE: dict[str, Nodes] = {
    "means": [Node("Sub", ["data", "bgr"], ["c"]), Node("Div", ["c", "bgrstd"], ["y"])],
    "statistics": [
        Node("BatchNormalization", ["data", "ones", "zeros", "bgrmiddle", "spread"], ["y"])
    ],
}


@pytest.mark.parametrize("case", BLUE)
def test_bgr_means_need_the_order(tmp_path: Path, case: str) -> None:
    path = written(tmp_path, BLUE[case])
    with pytest.raises(
        KDHooksError,
        match=r"expects the third channel .* as if they were BGR; specify teacher\.input",
    ):
        OnnxModel(path)
    batch = images(3)
    found = taught(path, batch, convert=False, input={"order": "bgr"})
    same = taught(path, batch.flip(1), convert=False, input={"order": "rgb"})
    assert_close(found, same, atol=1e-4, rtol=1e-4)


def test_learned_1x1_convolutions_are_no_scaling(tmp_path: Path) -> None:
    learned = np.random.default_rng(2).normal(size=(3, 3, 1, 1)).astype(np.float32)
    nodes = [Node("Conv", ["data", "learned"], ["x"]), Node("Div", ["x", "d"], ["y"])]
    constants = {"learned": learned, "d": np.array(255, np.float32)}
    path = write_graph(tmp_path / "m.onnx", [*nodes, *pooled("y")], constants, gives=[("b", 3)])
    assert (OnnxModel(path).mean, OnnxModel(path).std) == (127.5, 127.5)


def test_patches_are_followed_to_their_projection(tmp_path: Path) -> None:
    """As in transformers: (b 3 h w) -> (b tokens pixels), then a matrix product."""
    shapes = {"grid": [0, 3, 14, 8, 14, 8], "tokens": [0, 196, 192]}
    constants = {name: np.array(shape) for name, shape in shapes.items()}
    constants |= {name: CONSTANTS[name] for name in ("half", "128th", "flip")}
    constants["weight"] = np.random.default_rng(3).normal(size=(192, 4)).astype(np.float32)
    tail = [
        Node("Reshape", ["y", "grid"], ["g"]),
        Node("Transpose", ["g"], ["t"], perm=[0, 2, 4, 3, 5, 1]),
        Node("Reshape", ["t", "tokens"], ["p"]),
        Node("MatMul", ["p", "weight"], ["m"]),
        Node("ReduceMax", ["m", "one"], ["fc1"], keepdims=0),
    ]
    constants["one"] = np.array([1])
    start = [Node("Sub", ["data", "half"], ["c"]), Node("Mul", ["c", "128th"], ["y"])]
    path = write_graph(tmp_path / "m.onnx", [*start, *tail], constants)
    assert (OnnxModel(path).mean, OnnxModel(path).std) == (0, 1)
    flipped = [Node("Gather", ["data", "flip"], ["y"], axis=1), *tail]
    path = write_graph(tmp_path / "m.onnx", flipped, constants)
    with pytest.raises(KDHooksError, match=r"in another order, \[2, 1, 0\]"):
        OnnxModel(path)


def quantised(scale: str, zero: str, end: str = "y") -> Nodes:
    return [
        Node("QuantizeLinear", ["data", scale, zero], ["q"]),
        Node("DequantizeLinear", ["q", scale, zero], [end]),
    ]


@pytest.mark.parametrize(
    ("nodes", "arriving"),
    [
        (quantised("127.5th", "middle8"), by_127),
        (quantised("127.5th", "none8"), by_127),
        ([*quantised("one", "none", "x"), *SUB_MUL], by_128),
    ],
)
def test_images_may_be_quantised_in_their_own_range(
    tmp_path: Path, nodes: Nodes, arriving: Callable[[Tensor], Tensor]
) -> None:
    found = taught(written(tmp_path, nodes), images(3), convert=False)
    assert_close(found, wanted(arriving(images(3))), atol=0.01, rtol=0.01)


UNKNOWN: dict[str, tuple[Nodes, str]] = {
    "a range of its own": (
        [Node("Div", ["data", "255"], ["y"])],
        "0..255 to -1..1, but m.onnx maps it to 0..1; specify mean",
    ),
    "an inverted image": (
        [Node("Sub", ["half", "data"], ["c"]), Node("Mul", ["c", "128th"], ["y"])],
        "maps it to 0.9961..-0.9961; specify",
    ),
    "a scale that differs in space": (
        [Node("Sub", ["data", "image"], ["c"]), Node("Mul", ["c", "128th"], ["y"])],
        "maps it to (-1.25 to -0.70",
    ),
    "a scale of one channel": (
        [
            Node("Split", ["data", "thirds"], ["r", "g", "b"], axis=1),
            Node("Div", ["r", "half"], ["s"]),
            Node("Concat", ["s", "g", "b"], ["y"], axis=1),
        ],
        "maps it to 0..(2 to 255); specify",
    ),
    "its own mean": (
        [Node("ReduceMean", ["data", "axis"], ["m"]), Node("Sub", ["data", "m"], ["y"])],
        "ReduceMean (node 'm') comes before the first convolution; specify",
    ),
    "its own pooled mean": (
        [Node("GlobalAveragePool", ["data"], ["m"]), Node("Sub", ["data", "m"], ["y"])],
        "Sub (node 'y') comes before the first convolution; specify",
    ),
    "a curve": ([Node("Sqrt", ["data"], ["y"])], "Sqrt (node 'y') comes before the first"),
    "bounds": ([Node("Clip", ["data", "one", "two"], ["y"])], "Clip (node 'y') comes before"),
    "a reciprocal": ([Node("Div", ["one", "data"], ["y"])], "Div (node 'y') comes before the"),
    "a square": ([Node("Mul", ["data", "data"], ["y"])], "Mul (node 'y') comes before the"),
    "whole numbers": (
        [Node("Cast", ["data"], ["x"], to=TensorProto.INT32),
         Node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
        "Cast (node 'x') comes before the first convolution",
    ),
    "a cast to an unknown type": (
        [Node("CastLike", ["data", "flip"], ["x"]), Node("CastLike", ["x", "one"], ["y"])],
        "CastLike (node 'x') comes before the first convolution",
    ),
    "a namesake in another domain": (
        [Node("Identity", ["data"], ["y"], domain="own")], "Identity (node 'y') comes before"
    ),
    "another domain": (
        [Node("Gelu", ["data"], ["y"], domain="com.microsoft")], "Gelu (node 'y') comes before"
    ),
    "nothing of the image": (
        [Node("Slice", ["data", "axis", "axis", "axis"], ["y"])],
        "Conv (node 'maps') fails: nothing is left of the image",
    ),
    "a constant that does not fit": (
        [Node("Sub", ["data", "row"], ["y"])], "Sub (node 'y') fails: operands could not be"
    ),
    "odd statistics": (
        [Node("BatchNormalization", ["data", "ones", "zeros", "ones", "middle"], ["y"])],
        "whose statistics are expected to fit one range of images, but mean 1 and deviation "
        "(10.25 to 11.18) do not; specify",
    ),
    "wide statistics": (
        [Node("BatchNormalization", ["data", "ones", "zeros", "zeros", "spread"], ["y"])],
        "but mean 0 and deviation 70 do not; specify",
    ),
    "statistics of no pixels": (
        [Node("BatchNormalization", ["data", "ones", "zeros", "zeros", "ones"], ["y"])],
        "but mean 0 and deviation 1 do not; specify",
    ),
    "a grey image": (
        [Node("Conv", ["data", "grey"], ["g"]), Node("Concat", ["g", "g", "g"], ["y"], axis=1)],
        "Conv (node 'g') comes before the first convolution; specify",
    ),
    "a grey image of the last axis": (
        [Node("Transpose", ["data"], ["t"], perm=[0, 2, 3, 1]),
         Node("MatMul", ["t", "greys"], ["g"]),
         Node("Concat", ["g", "g", "g"], ["y"], axis=1)],
        "MatMul (node 'g') comes before the first convolution; specify",
    ),
    "quantised pixels": (
        quantised("one", "none"), "quantises its images to numbers from 0 to 255, which fits no"
    ),
    "quantised shares of white": (
        quantised("255th", "none"), "quantises its images to numbers from 0 to 1, which fits no"
    ),
    "quantised symmetrically": (
        quantised("two", "none8"), "quantises its images to numbers from -256 to 254, which fits no"
    ),
    "quantised as the operator does by default": (
        [Node("QuantizeLinear", ["data", "one"], ["q"]),
         Node("DequantizeLinear", ["q", "one"], ["y"])],
        "quantises its images to numbers from 0 to 255, which fits no",
    ),
    "statistics of either range": (
        [Node("BatchNormalization", ["data", "ones", "zeros", "middle1", "spread1"], ["y"])],
        "but mean (0.45 to 0.5) and deviation 0.2449 do not; specify",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_scale_that_cannot_be_derived_must_be_specified(tmp_path: Path, case: str) -> None:
    nodes, reason = UNKNOWN[case]
    path = written(tmp_path, nodes)
    with pytest.raises(KDHooksError, match=re.escape(reason)) as raised:
        OnnxModel(path)
    assert "mean and std in teacher.input, or mean_std=(mean, std) in Python" in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("convert", [False, True])
def test_a_scale_that_is_specified_overrules_the_graph(tmp_path: Path, convert: bool) -> None:
    nodes, _ = UNKNOWN["a range of its own"]
    path = written(tmp_path, nodes)
    found = taught(path, images(2), convert, input={"mean": 0, "std": 1})
    assert_close(found, wanted(pixels(images(2)) / 255), atol=1e-4, rtol=1e-4)


def test_shapes_of_the_image_are_constants(tmp_path: Path) -> None:
    nodes = [
        Node("Shape", ["data"], ["s"], end=1),
        Node("Concat", ["s", "rest"], ["to"], axis=0),
        Node("Reshape", ["data", "to"], ["x"]),
    ]
    path = written(tmp_path, [*nodes, *SUB_MUL])
    assert (OnnxModel(path).mean, OnnxModel(path).std) == (0, 1)
    found = taught(path, images(2), convert=False)
    assert_close(found, wanted(by_128(images(2))), atol=1e-4, rtol=1e-4)


def test_branches_of_an_if_are_not_followed(tmp_path: Path) -> None:
    """The branches read the image from the graph around them."""
    made = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", 3, 112, 112])
    branch = helper.make_graph([Node("Mul", ["data", "two"], ["z"])], "branch", [], [made])
    nodes = [
        Node("Cast", ["two"], ["c"], to=TensorProto.BOOL),
        Node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
    ]
    constants = {name: CONSTANTS[name] for name in ("two", "kernel")}
    tail = [Node("Conv", ["y", "kernel"], ["maps"]), *pooled("maps")]
    path = write_graph(tmp_path / "m.onnx", [*nodes, *tail], constants)
    with pytest.raises(KDHooksError, match=r"If \(node 'y'\) comes before the first"):
        OnnxModel(path)
    found = OnnxModel(path, (0, 255))(images(2))
    assert_close(found, wanted(images(2) * 2), atol=1e-4, rtol=1e-4)


def test_two_convolutions_must_see_the_same_scale(tmp_path: Path) -> None:
    tail = [
        Node("Conv", ["data", "kernel"], ["other"]),
        Node("Conv", ["y", "kernel"], ["own"]),
        Node("Add", ["own", "other"], ["maps"]),
        *pooled("maps"),
    ]
    nodes = [Node("Sub", ["data", "half"], ["c"]), Node("Mul", ["c", "128th"], ["y"])]
    constants = {name: CONSTANTS[name] for name in ("kernel", "half", "128th")}
    path = write_graph(tmp_path / "m.onnx", [*nodes, *tail], constants)
    with pytest.raises(KDHooksError, match=r"maps it to \(-0\.9961 to 0\)\.\.\(0\.9961 to 255\)"):
        OnnxModel(path)


@pytest.mark.parametrize("convert", [False, True])
def test_branches_that_do_not_reach_the_embedding_are_ignored(
    tmp_path: Path, convert: bool
) -> None:
    path = written(tmp_path, [*BEFORE["identity"], *SUB_MUL, Node("Sqrt", ["data"], ["unused"])])
    found = taught(path, images(2), convert)
    assert_close(found, wanted(by_128(images(2))), atol=1e-4, rtol=1e-4)
