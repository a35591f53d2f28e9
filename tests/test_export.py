"""`kdhooks export` writes only the student, into files that other software can load."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("PIL")

import onnx

from kdhooks import KDHooksError
from kdhooks.cli import main
from kdhooks.onnx.export import export_onnx
from kdhooks.onnx.session import OnnxModel, insightface_model
from kdhooks_integrations.arcface_torch.commands.export import check_for_insightface, load_student
from tests.trainer_folder import WIDTH, faces, imports_undone, settled, write_trainer

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the trainer's folder with the files of a finished run."""
    monkeypatch.chdir(tmp_path)
    state = settled().state_dict()
    torch.save(state, tmp_path / "model.pt")
    compiled = {f"_orig_mod.{key}": value for key, value in state.items()}
    head = {"weight": torch.ones(2, WIDTH), "kdhooks.losses.fcd.projector.weight": torch.ones(2)}
    checkpoint = {"epoch": 1, "state_dict_backbone": compiled, "state_dict_softmax_fc": head}
    torch.save(checkpoint, tmp_path / "checkpoint_gpu_0.pt")
    with imports_undone():
        yield write_trainer(tmp_path)


@pytest.mark.parametrize("checkpoint", ["model.pt", "checkpoint_gpu_0.pt"])
def test_only_the_student_is_written(checkpoint: str, folder: Path, capsys: Captured) -> None:
    assert main(["export", checkpoint, "--network", "tiny", "--out", "out/it"]) == 0
    written = torch.load("out/it/model.pt", weights_only=True)
    expected = settled().state_dict()
    assert list(written) == list(expected)
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    embedding = OnnxModel("out/it/model.onnx")(faces()[0])
    torch.testing.assert_close(embedding, settled()(faces()[0]).detach(), rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    for name in ("model.pt", "model.onnx"):
        digest = hashlib.sha256(Path("out/it", name).read_bytes()).hexdigest()
        assert f"out/it/{name}  sha256 {digest}\n" in printed
    assert f"{len(expected)} keys, exactly those of tiny" in printed
    weights = {tensor.name for tensor in onnx.load("out/it/model.onnx").graph.initializer}
    assert not [name for name in weights if "kdhooks" in name or "projector" in name]


def test_remnants_of_the_distillation_are_refused(folder: Path, capsys: Captured) -> None:
    torch.save({**settled().state_dict(), "projector.weight": torch.ones(2)}, "left.pt")
    assert main(["export", "left.pt", "--network", "tiny"]) == 2
    said = capsys.readouterr().err
    assert "1 are not the network's (projector.weight); specify the network" in said
    assert not Path("export").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["absent.pt", "--network", "tiny"], "student checkpoint: there is no file 'absent.pt'"),
        (
            ["model.pt", "--network", "wide"],
            "student checkpoint: 'model.pt' does not fit the netw",
        ),
        (
            ["model.pt", "--network", "tiny", "--embedding-size", "8"],
            "does not fit the network",
        ),
        (["model.pt", "--network", "tiny", "--out", "."], "is the checkpoint itself; name another"),
        (
            ["model.pt", "--network", "tiny", "--out", "model.pt"],
            "--out must be a folder, where",
        ),
        (["model.pt", "--network", "tiny", "--out", "x.onnx"], "--out must be a folder, where"),
        (["model.pt", "--network", "tiny", "--out", "taken"], "model.onnx' is a folder; remove it"),
        (["model.pt", "--network", "tiny", "--out", "model.pt/x"], "can't be written (Not a dir"),
        (["fresh.pt", "--network", "tiny"], "student was never trained: the running statistics"),
        (["nan.pt", "--network", "tiny"], "'nan.pt' holds weights that are not finite, in 'fc.wei"),
        (["zero.pt", "--network", "tiny"], "must give different images different embeddings"),
        (["huge.pt", "--network", "tiny"], "embeddings must be finite; found nan or inf"),
        ([".", "--network", "tiny"], "'.' is a folder; name the file in it; it holds: backbones"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused(
    argv: list[str], said: str, folder: Path, capsys: Captured
) -> None:
    Path("taken/model.onnx").mkdir(parents=True)
    for name, number in (("nan", torch.nan), ("zero", 0.0), ("huge", 3e38)):
        state = settled().state_dict()
        state["fc.weight"].fill_(number)
        torch.save(state, f"{name}.pt")
    torch.save(fresh().state_dict(), "fresh.pt")
    before = Path("model.pt").read_bytes()
    assert main(["export", *argv]) == 2
    assert said in capsys.readouterr().err
    assert Path("model.pt").read_bytes() == before
    assert not Path("export").exists()
    assert [path.name for path in Path("taken").iterdir()] == ["model.onnx"]


def fresh() -> nn.Module:
    """Return a network whose running statistics are untrained."""
    model = settled()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def test_an_error_of_the_exporter_leaves_earlier_files_unchanged(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(network: nn.Module, images: Any, path: str, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise torch.onnx.errors.UnsupportedOperatorError("aten::x", 17, None)

    Path("out").mkdir()
    Path("out/model.onnx").write_bytes(b"of an earlier run")
    monkeypatch.setattr(torch.onnx, "export", fail)
    for out in ("out", "new"):
        assert main(["export", "model.pt", "--network", "tiny", "--out", out]) == 2
        assert "torch can't export the network to ONNX; UnsupportedOp" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["model.onnx"]
    assert Path("out/model.onnx").read_bytes() == b"of an earlier run"
    assert not Path("new").exists()


def test_one_of_several_sets_of_weights_can_be_named(folder: Path, capsys: Captured) -> None:
    state = settled().state_dict()
    torch.save({"model": state, "ema": {k: v + 1 for k, v in state.items()}}, "both.pt")
    assert main(["export", "both.pt", "--network", "tiny"]) == 2
    assert "network, at 'model', 'ema'; specify one of them" in capsys.readouterr().err
    assert main(["export", "both.pt", "--network", "tiny", "--weights", "model"]) == 0
    written = torch.load("export/model.pt", weights_only=True)
    assert all(torch.equal(written[key], state[key]) for key in state)


class Unstable(nn.Module):
    """A network that counts its calls, which a graph cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer = nn.Conv2d(3, 8, 112)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        embedding: Tensor = self.layer(x).flatten(1)
        return embedding + self.calls


def test_an_onnx_file_that_differs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"must agree with the network; found embeddings that"):
        export_onnx(Unstable(), tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_a_network_in_training_comes_back_so(tmp_path: Path) -> None:
    network = settled().train()
    assert export_onnx(network, tmp_path / "x.onnx") < 1e-5
    assert network.training


# --- insightface ---------------------------------------------------------------------------------


def graph(path: Path, takes: list[Any], gives: list[Any], nodes: list[str]) -> Path:
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    steps = [
        make.make_node("Identity", [f"v{index}"], [f"v{index + 1}"], name=name)
        for index, name in enumerate(nodes)
    ]
    inputs = [make.make_tensor_value_info("v0", kind, takes)]
    outputs = [make.make_tensor_value_info(f"v{len(nodes)}", kind, gives)]
    onnx.save(make.make_model(make.make_graph(steps, "g", inputs, outputs)), path)
    return path


@pytest.mark.parametrize(
    ("takes", "gives", "nodes", "said"),
    [
        (["b", 3, 96, 96], ["b", 8], ["a"], "one square image, whose"),
        (["b", 3, 112, 96], ["b", 8], ["a"], "one square image, whose"),
        (["b", 3, 192, 192], ["b", 8], ["a"], "one square image, whose"),
        (["b", 3, 112, 112], ["b", 8, 1, 1], ["a"], "to one embedding; found"),
        (["b", 3, 112, 112], ["b", 8], ["Sub_0", "Mul_1"], "first nodes: Sub_0, Mul_1; remove"),
    ],
)
def test_graphs_that_insightface_would_misread_are_refused(
    takes: list[Any], gives: list[Any], nodes: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(KDHooksError) as error:
        check_for_insightface(graph(tmp_path / "m.onnx", takes, gives, nodes))
    assert said in str(error.value)


def test_graphs_that_insightface_reads_are_accepted(tmp_path: Path) -> None:
    for nodes in (["Sub_0"], ["/Sub", "/Mul"], ["a"] * 8 + ["Sub_0", "Mul_1"]):
        check_for_insightface(graph(tmp_path / "m.onnx", ["b", 3, 112, 112], ["b", 8], nodes))


def detector(path: Path) -> None:
    """Write a detector in SCRFD's form for 128x128 images, which always finds the same face."""
    make, to_tensor = onnx.helper, onnx.numpy_helper.from_array
    nodes, outputs, tensors = [], [], []
    for kind, width in (("score", 1), ("box", 4), ("points", 10)):
        for stride in (8, 16, 32):
            values = np.zeros(((128 // stride) ** 2 * 2, width), np.float32)
            if stride == 8:
                row = 2 * (8 * 16 + 8)  # the cell at 64, 64
                values[row] = {1: 0.9, 4: 5.0}.get(width, 0.0)
                if width == 10:
                    values[row] = [-2, -2, 2, -2, 0, 0, -1.5, 2, 1.5, 2]
            name = f"{kind}{stride}"
            tensors.append(to_tensor(values, f"{name}_value"))
            zero = f"{name}_zero"
            nodes.append(make.make_node("Mul", [f"{name}_value", "nothing"], [zero]))
            nodes.append(make.make_node("Add", [zero, f"{name}_value"], [name]))
            outputs.append(make.make_tensor_value_info(name, 1, list(values.shape)))
    nodes.insert(0, make.make_node("ReduceMin", ["image"], ["least"], keepdims=0))
    nodes.insert(1, make.make_node("Mul", ["least", "zero"], ["nothing"]))
    tensors.append(to_tensor(np.zeros((), np.float32), "zero"))
    image = make.make_tensor_value_info("image", 1, [1, 3, "h", "w"])
    model = make.make_graph(nodes, "detector", [image], outputs, tensors)
    onnx.save(make.make_model(model, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.filterwarnings("ignore:.estimate. is deprecated:FutureWarning")  # insightface's
def test_face_analysis_takes_the_student(folder: Path) -> None:
    """It reads a pack of student and detector, and its embedding equals torch's."""
    insightface = pytest.importorskip("insightface.app").FaceAnalysis
    zoo, align = (
        pytest.importorskip(f"insightface.{n}") for n in ("model_zoo", "utils.face_align")
    )
    pack = folder / "models" / "ours"
    assert main(["export", "model.pt", "--network", "tiny", "--out", str(pack)]) == 0
    alone = zoo.get_model(str(pack / "model.onnx"), providers=["CPUExecutionProvider"])
    assert (alone.taskname, alone.input_mean, alone.input_std) == ("recognition", 127.5, 127.5)
    detector(pack / "det.onnx")
    app = insightface(name="ours", root=str(folder), providers=["CPUExecutionProvider"])
    assert set(app.models) == {"detection", "recognition"}
    app.prepare(ctx_id=-1, det_size=(128, 128))
    picture = np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)  # BGR
    (face,) = app.get(picture)
    aligned = align.norm_crop(picture, landmark=face.kps)[:, :, ::-1].copy()
    image = (torch.from_numpy(aligned).permute(2, 0, 1)[None].float() - 127.5) / 127.5
    student = load_student(str(pack / "model.pt"), "tiny")
    expected = student(image.contiguous()).detach()[0].numpy()
    np.testing.assert_allclose(face.embedding, expected, rtol=1e-3, atol=1e-4)


def test_our_own_reader_finds_it_in_the_pack(folder: Path) -> None:
    """A pack's recognition model is recognised by its graph, with at least 128 outputs."""
    pack = folder / "models" / "ours"
    network = settled()
    network.add_module("features", nn.Linear(WIDTH, 128))
    export_onnx(network, folder / "model.onnx")
    pack.mkdir(parents=True)
    (folder / "model.onnx").rename(pack / "model.onnx")
    assert insightface_model("ours", folder) == pack / "model.onnx"
