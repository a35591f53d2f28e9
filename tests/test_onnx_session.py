"""OnnxModel compared with the exported network, its contract of files, and insightface's packs."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.testing import assert_close

from kdhooks.errors import KDHooksError
from kdhooks.onnx.session import OnnxModel, insightface_model
from tests.onnx_samples import (
    SFACE_SHA256,
    IResNet,
    MobileFaceNet,
    export,
    images,
    opened_like_insightface,
    pooled,
    randomised,
    sface,
    write_graph,
)

Node = helper.make_node


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return randomised(IResNet())


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(network, tmp_path_factory.mktemp("onnx") / "iresnet.onnx")


def test_agrees_with_the_exported_network(network: nn.Module, file: Path) -> None:
    model = OnnxModel(file)
    with torch.no_grad():
        assert_close(model(images(5)), network(images(5)), rtol=1e-4, atol=1e-5)
    assert (model.embedding_dim, model.size) == (16, (112, 112))
    assert not model.one_by_one
    assert model.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_batch_fixed_to_one_is_run_image_by_image(network: nn.Module, tmp_path: Path) -> None:
    model = OnnxModel(export(network, tmp_path / "fixed.onnx", open_batch=False))
    assert model.one_by_one
    with torch.no_grad():
        assert_close(model(images(3)), network(images(3)), rtol=1e-4, atol=1e-5)


def test_a_batch_open_only_in_name_is_run_image_by_image(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = randomised(MobileFaceNet())
    traced = export(network, tmp_path / "mbf.onnx", open_batch=False)
    model = OnnxModel(opened_like_insightface(traced))
    assert model.one_by_one
    with torch.no_grad():
        assert_close(model(images(3)), network(images(3)), rtol=1e-4, atol=1e-5)
    assert capfd.readouterr().err == ""


def test_an_output_declared_for_one_image_takes_batches_without_warnings(
    network: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    traced = export(network, tmp_path / "r18.onnx", open_batch=False)
    model = OnnxModel(opened_like_insightface(traced))
    assert not model.one_by_one
    assert model(images(3)).shape == (3, 16)
    assert capfd.readouterr().err == ""


def test_result_is_float32_without_gradient_whatever_the_input(file: Path) -> None:
    model = OnnxModel(file)
    batch = images(2)
    strided = batch.to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    embedding = model(strided)
    assert embedding.dtype == torch.float32
    assert not embedding.requires_grad
    assert_close(embedding, model(batch.to(torch.bfloat16).float()))


@pytest.mark.parametrize("open_batch", [True, False])
def test_an_empty_batch_has_no_embeddings(
    network: nn.Module, tmp_path: Path, open_batch: bool
) -> None:
    model = OnnxModel(export(network, tmp_path / "r18.onnx", open_batch=open_batch))
    assert model(images(0)).shape == (0, 16)


@pytest.mark.gpu
def test_result_is_on_the_device_of_the_images(file: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = OnnxModel(file)
    embedding = model(images(2).cuda())
    assert embedding.device.type == "cuda"
    assert_close(embedding.cpu(), model(images(2)), rtol=1e-3, atol=1e-3)


def test_external_weights_are_read_and_hashed(file: Path, tmp_path: Path) -> None:
    path, weights = tmp_path / "split.onnx", tmp_path / "split.bin"
    onnx.save(
        onnx.load(file), path, save_as_external_data=True, location=weights.name, size_threshold=0
    )
    assert_close(OnnxModel(path)(images(2)), OnnxModel(file)(images(2)))
    both = path.read_bytes() + weights.read_bytes()
    assert OnnxModel(path).sha256 == hashlib.sha256(both).hexdigest()
    weights.unlink()
    with pytest.raises(KDHooksError, match=r"split\.onnx keeps weights in split\.bin, which must"):
        OnnxModel(path)


def test_statistics_of_mxnet_in_the_graph_mean_pixels(tmp_path: Path) -> None:
    inputs = ["data", "one", "zero", "mean", "var"]
    node = Node("BatchNormalization", inputs, ["scaled"], name="bn_data")
    constants = {name: np.ones(3, np.float32) for name in inputs[1:]}
    path = write_graph(tmp_path / "m.onnx", [node, *pooled("scaled")], constants, gives=[("b", 3)])
    assert (OnnxModel(path).mean, OnnxModel(path).std) == (0, 1)


def test_weights_listed_as_inputs_are_not_required(file: Path, tmp_path: Path) -> None:
    listed = onnx.load(file)
    for weight in listed.graph.initializer:
        value = helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        listed.graph.input.append(value)
    unread = helper.make_tensor_value_info("left_over", TensorProto.FLOAT, [7])
    listed.graph.input.append(unread)
    onnx.save(listed, tmp_path / "listed.onnx")
    assert_close(OnnxModel(tmp_path / "listed.onnx")(images(2)), OnnxModel(file)(images(2)))


def test_images_of_another_size_are_refused(file: Path) -> None:
    with pytest.raises(
        KDHooksError, match=r"iresnet\.onnx takes images \(b, 3, 112, 112\), got \(2, 3, 56, 56\);"
    ):
        OnnxModel(file)(images(2, size=56))
    with pytest.raises(KDHooksError, match=r"got \(3, 112, 112\); resize"):
        OnnxModel(file)(images(1)[0])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        KDHooksError, match=r"must exist, but .*none\.onnx does not; check the path"
    ):
        OnnxModel(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_files_that_are_not_onnx_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.onnx"
    path.write_bytes(content)
    with pytest.raises(
        KDHooksError, match=rf"must be an ONNX model, but its {len(content)} bytes are not; fetch"
    ):
        OnnxModel(path)


Shapes = list[list[int | str | None] | None]


@pytest.mark.parametrize(
    ("takes", "gives", "message"),
    [
        (["b", 112, 112, 4], [["b", 4]], "takes data (?, 112, 112, 4); choose another file"),
        (["b", 7], [["b", 4]], "takes data (?, 7); choose another file"),
        (["b", 3, "h", "w"], [["b", 4]], "its images, got data (?, 3, ?, ?); export it with a"),
        (
            ["b", 3, 112, 112],
            [None],
            "m.onnx returns (1, 3, 112, 112) for (1, 3, 112, 112); choose",
        ),
    ],
)
def test_models_that_do_not_embed_images_are_refused(
    tmp_path: Path, takes: list[int | str | None], gives: Shapes, message: str
) -> None:
    path = write_graph(tmp_path / "m.onnx", [Node("Identity", ["data"], ["fc1"])], {}, takes, gives)
    with pytest.raises(KDHooksError, match=re.escape(message)):
        OnnxModel(path)


@pytest.mark.parametrize(("factor", "found"), [(0, "zero"), (np.nan, "not finite")])
def test_embeddings_without_a_direction_are_refused(
    tmp_path: Path, factor: float, found: str
) -> None:
    nodes = [*pooled("data"), Node("Mul", ["row", "factor"], ["fc1"])]
    nodes[1].output[0] = "row"
    path = write_graph(tmp_path / "m.onnx", nodes, {"factor": np.array(factor, np.float32)})
    with pytest.raises(KDHooksError, match=f"but those of m.onnx are {found}; check its weights"):
        OnnxModel(path, (127.5, 127.5))


def test_an_embedding_with_another_batch_axis_is_refused(tmp_path: Path) -> None:
    nodes = [*pooled("data"), Node("Transpose", ["fc1"], ["turned"])]
    nodes[-2].output[0] = nodes[-1].input[0] = "row"
    nodes[-1].output[0] = "fc1"
    path = write_graph(tmp_path / "m.onnx", nodes, {}, gives=[None])
    with pytest.raises(
        KDHooksError, match=r"m\.onnx returns \(3, 1\) for \(1, 3, 112, 112\); choose"
    ):
        OnnxModel(path)


def test_models_of_integers_are_refused(tmp_path: Path) -> None:
    nodes = [Node("Cast", ["data"], ["wide"], to=TensorProto.FLOAT), *pooled("wide")]
    path = write_graph(
        tmp_path / "m.onnx", nodes, {}, gives=[("b", 3)], takes_type=TensorProto.INT8
    )
    with pytest.raises(KDHooksError, match=r"must take float or uint8 .*, got tensor\(int8\)"):
        OnnxModel(path)


def test_a_missing_onnxruntime_names_its_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = r"the package onnxruntime, which is not installed; run pip install '\.\[onnx\]' in a "
    with pytest.raises(KDHooksError, match=words):
        OnnxModel(file)


def test_modules_import_without_the_extra() -> None:
    code = (
        "import sys; sys.modules |= {'onnx': None, 'onnxruntime': None}; "
        "import kdhooks.onnx.session, kdhooks.onnx.to_torch"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def root(tmp_path: Path, file: Path) -> Path:
    """Create an insightface folder with two packs; only a recognition model has 128+ columns."""
    pack = tmp_path / "models" / "buffalo_x"
    pack.mkdir(parents=True)
    node = [Node("Identity", ["data"], ["fc1"])]
    write_graph(pack / "w600k_r18.onnx", node, {}, gives=[(1, 512)])
    write_graph(pack / "2d106det.onnx", node, {}, takes=(None, 3, 192, 192), gives=[(1, 212)])
    write_graph(pack / "genderage.onnx", node, {}, takes=(None, 3, 96, 96), gives=[(1, 3)])
    write_graph(pack / "quality.onnx", node, {}, gives=[(1, 1)])
    nodes = [*node, Node("Identity", ["data"], ["fc2"])]
    write_graph(
        pack / "det_10g.onnx", nodes, {}, takes=(1, 3, None, None), gives=[(800, 1), (800, 4)]
    )
    (tmp_path / "models" / "antelope").mkdir()
    return tmp_path


def test_the_recognition_model_of_a_pack_is_found_by_its_graph(root: Path) -> None:
    found = insightface_model("buffalo_x", root)
    assert found == root / "models" / "buffalo_x" / "w600k_r18.onnx"


def test_a_pack_unpacked_one_folder_too_deep_is_found(root: Path) -> None:
    nested = root / "models" / "antelope" / "antelope"
    shutil.copytree(root / "models" / "buffalo_x", nested)
    assert insightface_model("antelope", root) == nested / "w600k_r18.onnx"


def test_files_that_macos_adds_to_a_pack_are_ignored(root: Path) -> None:
    pack = root / "models" / "buffalo_x"
    (pack / "._w600k_r18.onnx").write_bytes(b"\0\5\x16\7")
    assert insightface_model("buffalo_x", root) == pack / "w600k_r18.onnx"


def test_an_empty_name_of_a_pack_is_refused(root: Path) -> None:
    with pytest.raises(KDHooksError, match="pack must be named, as 'buffalo_l'; found ''"):
        insightface_model("", root)


def test_the_home_folder_is_the_default(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.rename(root.parent / ".insightface")
    monkeypatch.setenv("HOME", str(root.parent))
    assert insightface_model("buffalo_x").name == "w600k_r18.onnx"


def test_a_missing_pack_is_named_with_the_installed_ones(root: Path) -> None:
    with pytest.raises(
        KDHooksError,
        match=r"buffalo_l does not exist; did you mean 'buffalo_x'\? installed: antelope, "
        r"buffalo_x; insightface\.app\.FaceAnalysis\(name='buffalo_l'\) downloads it on first use",
    ):
        insightface_model("buffalo_l", root)
    with pytest.raises(KDHooksError, match=r"does not exist; installed: none; insightface"):
        insightface_model("buffalo_l", root / "elsewhere")


def test_a_pack_without_recognition_is_refused(root: Path) -> None:
    (root / "models" / "buffalo_x" / "w600k_r18.onnx").unlink()
    with pytest.raises(
        KDHooksError,
        match=r"buffalo_x holds none: 2d106det\.onnx, det_10g\.onnx, "
        r"genderage\.onnx, quality\.onnx; give the path of the file you",
    ):
        insightface_model("buffalo_x", root)
    with pytest.raises(KDHooksError, match=r"antelope holds none: no ONNX file; give the path"):
        insightface_model("antelope", root)


def test_a_pack_with_two_recognition_models_is_refused(root: Path) -> None:
    first = root / "models" / "buffalo_x" / "w600k_r18.onnx"
    shutil.copy(first, first.with_name("glint_r100.onnx"))
    with pytest.raises(KDHooksError, match=r"holds 2: glint_r100\.onnx, w600k_r18\.onnx"):
        insightface_model("buffalo_x", root)


def test_sface_takes_pixels_one_image_at_a_time() -> None:
    model = OnnxModel(sface())
    assert (model.mean, model.std, model.size) == (0, 1, (112, 112))
    assert (model.embedding_dim, model.one_by_one, model.sha256) == (128, True, SFACE_SHA256)
    pixels = images(2) * 127.5 + 127.5
    assert_close(model(pixels)[1:], model(pixels[1:]))
