"""The forms in which ONNX files take their images."""

from pathlib import Path

import pytest
from onnx import TensorProto
from torch.testing import assert_close

from kdhooks.errors import KDHooksError
from kdhooks.onnx.session import OnnxModel
from tests.onnx_samples import images, taught
from tests.onnx_scaled import SUB_MUL, Node, by_128, pixels, wanted, written


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_images_of_uint8_are_pixels(tmp_path: Path, scaled: bool, convert: bool) -> None:
    cast = Node("Cast", ["data"], ["x" if scaled else "y"], to=TensorProto.FLOAT)
    nodes = [cast, *SUB_MUL] if scaled else [cast]
    path = written(tmp_path, nodes, takes_type=TensorProto.UINT8)
    batch = images(3)
    whole = (pixels(batch).round() - 127.5) / 127.5
    arriving = by_128(whole) if scaled else pixels(whole)
    assert_close(taught(path, batch, convert), wanted(arriving), atol=1e-3, rtol=1e-4)


def test_images_of_uint8_behind_an_unknown_node_are_asked_about(tmp_path: Path) -> None:
    nodes = [
        Node("Cast", ["data"], ["x"], to=TensorProto.INT32),
        Node("Cast", ["x"], ["y"], to=TensorProto.FLOAT),
    ]
    path = written(tmp_path, nodes, takes_type=TensorProto.UINT8)
    with pytest.raises(KDHooksError, match=r"for Cast \(node 'x'\) comes before"):
        OnnxModel(path)


def test_images_of_uint8_take_no_other_scale(tmp_path: Path) -> None:
    nodes = [Node("Cast", ["data"], ["y"], to=TensorProto.FLOAT)]
    path = written(tmp_path, nodes, takes_type=TensorProto.UINT8)
    with pytest.raises(
        KDHooksError, match=r"are uint8, that is pixels 0\.\.255; found mean and std"
    ):
        taught(path, images(1), convert=False, input={"mean": 127.5, "std": 127.5})
    found = taught(path, images(2), convert=False, input={"mean": 0, "std": 1})
    assert_close(found, wanted(pixels(images(2)).round()), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean": 127.5}, r"mean must be 0 or left out, since .* uint8 images; found 127\.5"),
        ({"std": 2}, r"std must be 1 or left out, since .* uint8 images; found 2"),
        ({"mean": [-60, 0, 60], "std": 1}, r"mean must be 0 or left out, since .* uint8"),
    ],
)
def test_images_of_uint8_take_no_part_of_another_scale(
    tmp_path: Path, given: dict[str, object], said: str
) -> None:
    nodes = [Node("Cast", ["data"], ["y"], to=TensorProto.FLOAT)]
    path = written(tmp_path, nodes, takes_type=TensorProto.UINT8)
    with pytest.raises(KDHooksError, match=said):
        taught(path, images(1), convert=False, input=given)


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_images_with_channels_last_are_taken(tmp_path: Path, scaled: bool, convert: bool) -> None:
    turn = Node("Transpose", ["data"], ["x" if scaled else "y"], perm=[0, 3, 1, 2])
    nodes = [turn, *SUB_MUL] if scaled else [turn]
    path = written(tmp_path, nodes, takes=(-1, 112, 112, 3))
    arriving = by_128(images(3)) if scaled else images(3)
    assert_close(taught(path, images(3), convert), wanted(arriving), atol=1e-4, rtol=1e-4)


def test_scaling_before_the_transposition_is_read_too(tmp_path: Path) -> None:
    nodes = [Node("Sub", ["data", "row"], ["c"]), Node("Mul", ["c", "128th"], ["s"])]
    turn = Node("Transpose", ["s"], ["y"], perm=[0, 3, 1, 2])
    path = written(tmp_path, [*nodes, turn], takes=("b", 112, 112, 3))
    found = taught(path, images(3), convert=False)
    assert_close(found, wanted(by_128(images(3))), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_images_of_other_float_formats_are_taken(tmp_path: Path, kind: int, convert: bool) -> None:
    cast = Node("Cast", ["data"], ["x"], to=TensorProto.FLOAT)
    path = written(tmp_path, [cast, *SUB_MUL], takes_type=kind)
    assert_close(taught(path, images(3), convert), wanted(by_128(images(3))), atol=2e-3, rtol=1e-3)
