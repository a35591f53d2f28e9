"""`kdhooks export --int8` and `--float16`: files, refusals, and the state after a failure."""

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("PIL")

import onnx

from benchmarks.recordio_files import people
from kdhooks import KDHooksError
from kdhooks.cli import main
from kdhooks.onnx import export as onnx_export
from kdhooks.onnx.export import export_onnx
from kdhooks.onnx.lower_precision import write_float16, write_int8
from kdhooks.onnx.session import OnnxModel
from kdhooks.pictures import encode
from kdhooks_integrations.arcface_torch.commands import checked_faces, export, precision
from tests.test_export import detector
from tests.trainer_folder import CLASSES, faces, imports_undone, settled, write_trainer

Captured = pytest.CaptureFixture[str]
EXPORT = ("export", "model.pt", "--network", "tiny", "--out", "out")
INT8 = (*EXPORT, "--int8", "--calibrate", "faces")
FLOAT16 = (*EXPORT, "--float16", "--data", "faces")
# 2 folds, each with a pair of one person and a pair of two. The last three people are in no pair.
PAIRS = "2 1\np0 0 1\np0 2 p1 2\np2 0 1\np1 0 p2 1\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the trainer's folder with a student, and with 4 faces of each of 6 people."""
    monkeypatch.chdir(tmp_path)
    torch.save(settled().state_dict(), "model.pt")
    for pixels, who in people(CLASSES, 4):
        person = Path("faces", f"p{who}")
        person.mkdir(parents=True, exist_ok=True)
        path = person / f"p{who}_{len(list(person.iterdir())):04d}.png"
        path.write_bytes(encode(pixels))
    Path("pairs.txt").write_text(PAIRS)
    with imports_undone():
        yield write_trainer(tmp_path)


def cosine(file: str) -> float:
    images = faces()[0]
    with torch.no_grad():
        expected = settled()(images)
    return nn.functional.cosine_similarity(OnnxModel(file)(images), expected).mean().item()


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_an_int8_file_keeps_the_embeddings(
    method: str, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch of faces is smaller than the others."""
    monkeypatch.setattr(checked_faces, "_BATCH", 4)
    assert main([*INT8, "--calibration-method", method, "--calibration-images", "7"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {
        "model.pt", "model.onnx", "model_int8.onnx",
    }  # fmt: skip
    assert cosine("out/model_int8.onnx") > 0.99
    printed = capsys.readouterr().out
    assert f"calibrated on 7 faces, by {method}\n" in printed
    assert "cosine to float on 17 other faces: 0.99" in printed


def test_weights_are_int8_with_a_scale_for_each_channel_and_batch_norms_are_gone(
    folder: Path,
) -> None:
    assert main([*INT8]) == 0
    graph = onnx.load("out/model_int8.onnx").graph
    sizes = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    scales = {node.input[0]: node.input[1] for node in graph.node if "Dequant" in node.op_type}
    convolutions = [name for name, (kind, dims) in sizes.items() if kind == 3 and len(dims) == 4]
    assert convolutions
    for name in convolutions:
        channels = sizes[name][1][0]
        assert sizes[scales[name]] == (1, (channels,))
    behind = {node.output[0] for node in graph.node if node.op_type == "Conv"}
    norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert not [node for node in norms if node.input[0] in behind]


def test_batch_norms_that_the_exporter_left_are_folded(tmp_path: Path) -> None:
    """Older exporters do not fold them; here the exporter keeps them for training."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 16, 16), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 8)
    )
    images = faces()[0]
    with torch.no_grad():
        network.train()(images)
        expected = network.eval()(images)
    training = torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network, (images[:1],), str(tmp_path / "m.onnx"), dynamo=False, training=training,
            do_constant_folding=False, input_names=["data"], output_names=["e"],
            dynamic_axes={"data": {0: "b"}, "e": {0: "b"}},
        )  # fmt: skip
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "BatchNormalization" in kinds
    write_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", [images])
    kinds = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]
    assert "BatchNormalization" not in kinds
    found = OnnxModel(tmp_path / "q.onnx")(images)
    assert nn.functional.cosine_similarity(found, expected).mean() > 0.99


def test_a_float16_file_takes_float32_images_by_default(folder: Path, capsys: Captured) -> None:
    for more, kind in (([], 1), (["--float16-images"], 10)):
        assert main([*FLOAT16, *more]) == 0
        assert cosine("out/model_float16.onnx") > 0.9999
        graph = onnx.load("out/model_float16.onnx").graph
        takes, gives = (v[0].type.tensor_type.elem_type for v in (graph.input, graph.output))
        assert (takes, gives) == (kind, kind)
        assert {tensor.data_type for tensor in graph.initializer if tensor.dims} == {10}
    assert "cosine to float on 24 faces: 1.0000 on average" in capsys.readouterr().out


def test_both_forms_are_judged_on_pairs_of_people_who_did_not_calibrate(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated: list[torch.Tensor] = []
    plain = write_int8

    def noted(source: Path, target: Path, images: Any, method: str) -> None:
        calibrated.extend(images)
        plain(source, target, calibrated, method)

    monkeypatch.setattr(precision, "write_int8", noted)
    assert main([*INT8, "--float16", "--pairs", "pairs.txt"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" % (float: ") == 2
    assert printed.count("accuracy on 4 pairs: ") == 2
    assert printed.count("cosine to float on 7 other faces") == 2  # p1_0001 is in no pair
    images, labels = faces()
    assert torch.equal(torch.cat(calibrated), torch.cat([images[labels == n] for n in (3, 4, 5)]))


def test_a_form_of_an_earlier_export_is_named(folder: Path, capsys: Captured) -> None:
    said = "out/model_int8.onnx  is from an earlier export, and was not written again\n"
    assert main([*INT8]) == 0
    assert said not in capsys.readouterr().out
    before = Path("out/model_int8.onnx").read_bytes()
    assert main([*FLOAT16]) == 0
    assert said in capsys.readouterr().out
    assert Path("out/model_int8.onnx").read_bytes() == before


def test_other_faces_can_check_a_file(folder: Path, capsys: Captured) -> None:
    Path("others").mkdir()
    Path("faces/p5").rename("others/p5")
    assert main([*INT8, "--data", "others"]) == 0
    printed = capsys.readouterr().out
    assert "calibrated on 20 faces" in printed
    assert "on 4 other faces" in printed


def test_the_same_folder_twice_is_one_folder(folder: Path, capsys: Captured) -> None:
    assert main([*INT8, "--data", "../" + folder.name + "/faces"]) == 0
    assert "calibrated on 12 faces" in capsys.readouterr().out


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--int8"], "--int8 needs faces for the calibration; found no --cal"),
        (["--calibrate", "faces"], "--calibrate is for --int8; found it without --int8; add"),
        (["--float16"], "--float16 needs faces on which the file is checked; found no --data"),
        (
            ["--float16-images"],
            "--float16-images is for --float16; found it without --float16; add",
        ),
        (["--calibration-images", "9"], "--calibration-images is for --int8; found it without"),
        (["--calibration-method", "minmax"], "--calibration-method is for --int8; found it"),
        (["--int8", "--calibrate", ""], "argument --calibrate: must be a path; found ''"),
        (["--data", "faces"], "--data is for --int8 and --float16; found neither"),
        (["--pairs", "pairs.txt"], "--pairs is for --int8 and --float16; found neither"),
        (["--least-cosine", "0.9"], "--least-cosine is for --int8 and --float16; found neither"),
        (["--int8", "--calibrate", "absent"], "--calibrate must be a folder or a zip file with"),
        (["--int8", "--calibrate", "one"], "--calibrate must hold at least two pictures"),
        (["--float16", "--data", "small"], "is 16x16 (width x height), but 112x112 is needed"),
        (["--int8", "--calibrate", "bad"], "--calibrate: every picture must be readable; found 1"),
        (["--float16", "--data", "faces", "--pairs", "no.txt"], "pairs: there is no file 'no.txt'"),
        (
            ["--float16", "--data", "others", "--pairs", "pairs.txt"],
            "pairs: every image must be among the faces; 8 of 8 are not",
        ),
        (
            ["--int8", "--calibrate", "known", "--pairs", "pairs.txt"],
            "must show people who are in no pair; found all people of 'known' in",
        ),
        (["--int8", "--calibrate", "faces", "--calibration-images", "0"], "at least 1; found 0"),
        (["--int8", "--calibrate", "faces", "--least-cosine", "2"], "between 0 and 1; found '2'"),
        (["--int8", "--calibrate", "faces", "--calibration-method", "x"], "invalid choice: 'x'"),
    ],
)
def test_wrong_options_are_refused(
    argv: list[str], said: str, folder: Path, capsys: Captured
) -> None:
    small, other = np.zeros((16, 16, 3), np.uint8), next(iter(people(1, 1)))[0]
    for name, pixels in (("one/a", other), ("small/a", small), ("small/b", small)):
        Path(name).parent.mkdir(exist_ok=True)
        Path(f"{name}.png").write_bytes(encode(pixels))
    for name in ("others/x/1", "others/x/2", "bad/a", "bad/b"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{name}.png").write_bytes(encode(other))
    cut = Path("bad/a.png").read_bytes()
    Path("bad/a.png").write_bytes(cut[: len(cut) // 2])
    Path("known").mkdir()
    for who in range(3):
        Path(f"known/p{who}").symlink_to(folder / "faces" / f"p{who}")
    assert main([*EXPORT, *argv]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_file_that_loses_the_embeddings_is_refused_and_nothing_is_written(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration on grey pictures clips the activations of all faces."""
    grey = Path("grey")
    grey.mkdir()
    for name in "ab":
        (grey / f"{name}.png").write_bytes(encode(np.full((112, 112, 3), 127, np.uint8)))
    argv = [*EXPORT, "--int8", "--calibrate", "grey", "--data", "faces"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "the embeddings of the int8 file must have a mean cosine of at least 0.99" in said
    assert "on 24 faces; calibrate on more faces, on faces like those" in said
    assert not Path("out").exists()
    monkeypatch.setattr(precision, "LEAST_COSINE", {"int8": -1.0, "float16": 0.999})
    assert main(argv) == 0
    assert Path("out/model_int8.onnx").exists()


def test_the_least_cosine_is_the_users(folder: Path, capsys: Captured) -> None:
    assert main([*FLOAT16, "--least-cosine", "0.99999999999"]) == 2
    assert (
        "the float16 file must have a mean cosine of at least 0.99999999999"
        in capsys.readouterr().err
    )
    assert not Path("out").exists()


def test_an_error_of_the_converter_is_explained(tmp_path: Path) -> None:
    export_onnx(settled(), tmp_path / "m.onnx")

    def broken() -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 3, 5, 5)

    with pytest.raises(KDHooksError, match=r"onnxruntime [\d.]+ can't convert 'm.onnx' to int8; "):
        write_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", broken())
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


# --- the state after a failure -------------------------------------------------------------------

QUANTISE = ("onnxruntime.quantization", "quantize_static")
STAGES: dict[str, tuple[Any, str]] = {
    "weights": (torch, "save"),
    "onnx": (torch.onnx, "export"),
    "comparison": (onnx_export, "OnnxModel"),
    "insightface": (export, "check_for_insightface"),
    "folding": ("onnxruntime.quantization.shape_inference", "quant_pre_process"),
    "int8": QUANTISE,
    "float16": ("onnxruntime.transformers.float16", "convert_float_to_float16"),
    "faces": (checked_faces, "as_input"),
    "check": (precision, "OnnxModel"),
    "accuracy": (precision, "verify"),
    "place": (os, "replace"),
}


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize(
    ("out", "error", "status", "words"),
    [
        ("out", OSError(28, "No space left on device"), 2, "No space left on device"),
        ("new", KeyboardInterrupt(), 130, "kdhooks: interrupted"),
    ],
)
def test_a_failure_in_any_stage_leaves_earlier_files_unchanged(
    stage: str,
    out: str,
    error: BaseException,
    status: int,
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    """The failure comes at the end of the stage, after it has written its files."""
    owner, name = STAGES[stage]
    owner = importlib.import_module(owner) if isinstance(owner, str) else owner
    plain: Callable[..., Any] = getattr(owner, name)

    def fails(*values: Any, **options: Any) -> Any:
        plain(*values, **options)
        raise error

    Path("out").mkdir()
    names = ("model.pt", "model.onnx", "model_int8.onnx", "model_float16.onnx", "model.onnx.data")
    for file in names:
        Path("out", file).write_text("of an earlier run")
    monkeypatch.setattr(owner, name, fails)
    argv = [*INT8, "--float16", "--pairs", "pairs.txt", "--out", out]
    assert main(argv) == status
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(names)
    assert {path.read_text() for path in Path("out").iterdir()} == {"of an earlier run"}
    assert not Path("new").exists()


def test_weights_in_a_separate_file_are_replaced_with_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporters write networks of 2 GB and more in this form."""
    plain: Callable[..., Any] = torch.onnx.export

    def large(network: nn.Module, images: Any, path: str, **options: Any) -> None:
        plain(network, images, path, **options)
        model = onnx.load(path)
        data = f"{Path(path).name}.data"
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)

    monkeypatch.setattr(torch.onnx, "export", large)
    export_onnx(settled(), tmp_path / "m.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    images = faces()[0]
    torch.testing.assert_close(
        OnnxModel(tmp_path / "m.onnx")(images), settled()(images).detach(), rtol=1e-4, atol=1e-5
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(onnx_export, "_ALIKE", -1.0)
    with pytest.raises(KDHooksError, match="must agree with the network"):
        export_onnx(settled(), tmp_path / "m.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_float16(tmp_path / "m.onnx", tmp_path / "half.onnx")
    write_int8(tmp_path / "m.onnx", tmp_path / "int8.onnx", [images])
    for name in ("half.onnx", "int8.onnx"):
        OnnxModel(tmp_path / name)(images)


# --- insightface ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.estimate. is deprecated:FutureWarning")  # insightface's
@pytest.mark.parametrize("form", ["int8", "float16"])
def test_a_pack_of_insightface_takes_the_file(form: str, folder: Path) -> None:
    """The pack also has a detector. The embedding is close to torch's."""
    analysis = pytest.importorskip("insightface.app").FaceAnalysis
    align = pytest.importorskip("insightface.utils.face_align")
    assert main([*INT8, "--float16"]) == 0
    pack = folder / "models" / "ours"
    pack.mkdir(parents=True)
    Path("out", f"model_{form}.onnx").rename(pack / f"model_{form}.onnx")
    detector(pack / "det.onnx")
    app = analysis(name="ours", root=str(folder), providers=["CPUExecutionProvider"])
    assert set(app.models) == {"detection", "recognition"}
    app.prepare(ctx_id=-1, det_size=(128, 128))
    pixels, _ = next(iter(people(1, 1)))
    picture = np.ascontiguousarray(np.pad(pixels, ((8, 8), (8, 8), (0, 0)))[:, :, ::-1])  # BGR
    (face,) = app.get(picture)
    aligned = align.norm_crop(picture, landmark=face.kps)[:, :, ::-1].copy()
    image = (torch.from_numpy(aligned).permute(2, 0, 1)[None].float() - 127.5) / 127.5
    expected = settled()(image.contiguous()).detach()[0]
    found = torch.from_numpy(face.embedding).float()
    least = {"int8": 0.95, "float16": 0.9999}[form]
    assert nn.functional.cosine_similarity(found, expected, dim=0) > least
