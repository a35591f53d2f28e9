"""`kdhooks evaluate` reports the embeddings' figures, and explains what it cannot measure."""

import json
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL")

from benchmarks.recordio_files import people, write_pairs
from kdhooks import StudentView, Teacher, viewed
from kdhooks.cli import main
from kdhooks.evaluation.pair_sets import PairSet, read_pair_file
from kdhooks.onnx.export import export_onnx
from kdhooks.pictures import encode
from kdhooks.verification import flip_summed, pair_scores, unit, verify
from kdhooks.views.viewing import Viewing
from kdhooks_integrations.arcface_torch.commands import results
from kdhooks_integrations.arcface_torch.commands.embedding import Embedder
from kdhooks_integrations.arcface_torch.commands.models import Model
from kdhooks_integrations.arcface_torch.commands.pictures import as_input
from tests.standin import backbones
from tests.trainer_folder import (
    faces,
    imports_undone,
    settled,
    write_teacher,
    write_trainer,
)

Captured = pytest.CaptureFixture[str]
PAIRS = 46  # not a multiple of the folds
RECIPE = """methods = ["fcd"]
seed = 5
[teacher]
network = "tiny"
checkpoint = "model.pt"
[student_view]
low_resolution = { sizes = [7, 14] }
"""
ONE = ("tiny=model.pt", "--network", "tiny", "--data", "lfw.bin")


def other(width: int, seed: int = 4) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = backbones.get_model("tiny", 0.0, False, width)
        model.conv1 = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)
    with torch.no_grad():
        model.train()(faces()[0])
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_trainer(tmp_path_factory.mktemp("made"))
    write_teacher(folder)
    torch.save(other(16).state_dict(), folder / "second.pt")
    torch.save(other(8).state_dict(), folder / "narrow.pt")
    write_pairs(folder / "lfw.bin", 4, PAIRS)
    (folder / "kd.toml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def _folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(made)
    with imports_undone():
        yield


def evaluated(capsys: Captured, *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *argv, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: Captured, *argv: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    said = printed.err.splitlines()[-1]
    assert said.startswith("kdhooks: evaluate: ")
    return said


def images_of(tested: PairSet) -> Tensor:
    return as_input([tested.files.pixels(name) for name in tested.images])


@torch.no_grad()
def embedded(model: nn.Module, images: Tensor, flip: bool = True) -> np.ndarray:
    upright, mirrored = model(images).numpy(), model(images.flip(-1)).numpy()
    return flip_summed(upright, mirrored) if flip else unit(upright)


def expected(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    tested = read_pair_file(Path("lfw.bin"), "data")
    scores = pair_scores(first, tested.rows, second)
    found = verify(scores, tested.same, tested.folds)
    return {
        "accuracy": found.accuracy,
        "accuracy_std": found.accuracy_std,
        "eer": found.eer,
        "threshold": pytest.approx(found.threshold, abs=1e-5)
        if np.isfinite(found.threshold)
        else None,
    }


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("accuracy", "accuracy_std", "eer", "threshold")}


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [True, False])
def test_the_figures_are_those_of_the_embeddings(flip: bool, capsys: Captured) -> None:
    images = images_of(read_pair_file(Path("lfw.bin"), "data"))
    found = evaluated(capsys, "second.pt", *ONE, *(() if flip else ("--no-flip",)))
    models = {"tiny": settled(), "second.pt": other(16)}
    by = {name: embedded(model, images, flip) for name, model in models.items()}
    (tested,) = found["sets"]
    names = [(result["first"], result["second"]) for result in tested["results"]]
    assert names == [
        ("second.pt", "second.pt"),
        ("tiny", "tiny"),
        ("second.pt", "tiny"),
        ("tiny", "second.pt"),
    ]
    for result, (first, second) in zip(tested["results"], names, strict=True):
        assert figures(result) == expected(by[first], by[second])
    assert (tested["pairs"], tested["folds"], tested["images"]) == (PAIRS, 10, 2 * PAIRS)
    assert found["flip"] == flip


def test_models_of_other_widths_are_not_crossed(capsys: Captured) -> None:
    argv = ("narrow=narrow.pt", *ONE)
    found = evaluated(capsys, *argv)
    (tested,) = found["sets"]
    assert [result["first"] for result in tested["results"]] == ["narrow", "tiny"]
    assert tested["refused"][0]["reason"].startswith("their embeddings have 8 and 16 numbers")
    main(["evaluate", *argv])
    assert "narrow and tiny can't be compared: their embeddings have 8" in capsys.readouterr().out


def test_the_second_image_is_seen_through_the_view(capsys: Captured) -> None:
    options = (*ONE, "--recipe", "kd.toml", "--view")
    found = evaluated(capsys, *options)
    tested = read_pair_file(Path("lfw.bin"), "data")
    images = images_of(tested)
    images[1::2] = viewed(StudentView(low_resolution={"sizes": [7, 14]}), images[1::2], seed=5)
    by = embedded(settled(), images)
    (result,) = found["sets"][0]["results"]
    assert figures(result) == expected(by, by)
    assert result["threshold"] != evaluated(capsys, *ONE)["sets"][0]["results"][0]["threshold"]
    main(["evaluate", *options])
    printed = capsys.readouterr().out
    assert "the student_view is applied to the second image of each pair: LowResolution(" in printed
    assert "seed 5" in printed


def test_a_view_does_not_depend_on_the_batch() -> None:
    tested = read_pair_file(Path("lfw.bin"), "data")
    view = Viewing(StudentView(low_resolution={"sizes": [3, 14]}, mask={"p": 0.5}), seed=5)
    found = []
    for batch in (128, 7):
        embedder = Embedder((3, 112, 112), torch.device("cpu"), batch, flip=False, view=view)
        model = Model("tiny", "model.pt", Teacher(settled()))
        _, (embedded,) = embedder.embed([model], tested, lambda done, total: None)
        assert embedded.flipped == []
        found.append(np.concatenate(embedded.upright))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_pictures_with_pairs_are_those_of_a_verification_file(capsys: Captured) -> None:
    """They have the same pairs and folds; the pictures are in a zip with a folder per person."""
    samples = people(4, 6)
    lines, of = ["2 6"], [[pixels for pixels, who in samples if who == c] for c in range(4)]
    for fold in range(2):
        lines += [f"p{2 * fold} {i} {j}" for i in (1, 2) for j in (3, 4, 5)]
        lines += [f"p{2 * fold} {i} p{2 * fold + 1} {j}" for i in (1, 2) for j in (3, 4, 5)]
    Path("two.txt").write_text("\n".join(lines))
    with zipfile.ZipFile("faces.zip", "w") as archive:
        for person, pictures in enumerate(of):
            for number, pixels in enumerate(pictures, 1):
                archive.writestr(f"top/p{person}/p{person}_{number:04d}.png", encode(pixels))
    options = ("tiny=model.pt", "--network", "tiny")
    one = evaluated(capsys, *options, "--data", "faces.zip", "--pairs", "two.txt")["sets"][0]
    assert (one["pairs"], one["folds"], one["images"]) == (24, 2, 16)
    encoded, same = [], []
    for line in lines[1:]:
        words = line.split()
        first, second = (
            (words[0], words[1]),
            (words[-2] if len(words) == 4 else words[0], words[-1]),
        )
        encoded += [encode(of[int(who[1])][int(number) - 1]) for who, number in (first, second)]
        same.append(len(words) == 3)
    Path("two.bin").write_bytes(pickle.dumps((encoded, same), 2))
    two = evaluated(capsys, *options, "--data", "two.bin", "--folds", "2")["sets"][0]
    assert figures(two["results"][0]) == figures(one["results"][0])


def test_the_trainers_protocol_takes_its_batches_and_thresholds(capsys: Captured) -> None:
    """tests/test_real_commands.py compares it with the trainer itself."""
    exact = evaluated(capsys, *ONE)["sets"][0]["results"][0]
    found = evaluated(capsys, "second.pt", *ONE, "--protocol", "insightface")
    _, own, cross, _ = found["sets"][0]["results"]
    images = images_of(read_pair_file(Path("lfw.bin"), "data"))
    with torch.no_grad():
        lengths = [settled()(some).norm(dim=1).mean() for some in (images, images.flip(-1))]
    assert own["xnorm"] == pytest.approx(float(sum(lengths)) / 2, rel=1e-5)
    assert (own["eer"], cross["xnorm"]) == (exact["eer"], None)
    main(["evaluate", *ONE, "--protocol", "insightface"])
    shown = f"{own['accuracy']:1.5f}+-{own['accuracy_std']:1.5f}"
    assert re.search(rf"Accuracy-Flip .* XNorm .*{re.escape(shown)}", capsys.readouterr().out, re.S)


@pytest.mark.parametrize("networks", [("tiny", "backbones:own"), ("tiny",)])
def test_a_network_is_named_for_each_checkpoint_or_for_all(
    networks: tuple[str, ...], capsys: Captured
) -> None:
    named = [word for network in networks for word in ("--network", network)]
    found = evaluated(capsys, "model.pt", "again=model.pt", *named, "--data", "lfw.bin")
    results = found["sets"][0]["results"]
    assert len(results) == 4
    assert all(figures(result) == figures(results[0]) for result in results)


# --- models --------------------------------------------------------------------------------------


def test_a_teacher_several_teachers_a_file_and_a_pack_agree(
    capsys: Captured, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pack = tmp_path / "models" / "ours"
    pack.mkdir(parents=True)
    wide = other(128)
    export_onnx(wide, pack / "w600k.onnx")
    table = f'[[teacher]]\nonnx = "{pack}/w600k.onnx"\n'
    (tmp_path / "kd.toml").write_text(f'methods = ["fcd"]\n{table}{table}')
    argv = (f"file={pack}/w600k.onnx", "ours", "teacher", "teacher.1", "--root", str(tmp_path))
    found = evaluated(capsys, *argv, "--recipe", str(tmp_path / "kd.toml"), "--data", "lfw.bin")
    (tested,) = found["sets"]
    assert [model["model"] for model in found["models"]] == ["file", "ours", "teacher", "teacher.1"]
    first, *others = tested["results"]
    for result in others:
        # Several teachers used as one normalise an embedding before the mirror image's is added.
        joined = "teacher" in (result["first"], result["second"])
        assert figures(result) == pytest.approx(figures(first), abs=0.1 if joined else 1e-5)
    assert len(others) == 3 + 3 * 2  # two joined teachers have 256 numbers
    assert {one["second"] for one in tested["refused"] if one["first"] == "teacher"} == {
        "file", "ours", "teacher.1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ("model.pt", "--data", "lfw.bin"),
            "found 1 checkpoints (model.pt) and 0 networks (none); specify --network",
        ),
        (
            ("ours", "--network", "tiny", "--data", "lfw.bin"),
            "found 0 checkpoints (none) and 1 networks (tiny)",
        ),
        (("ours", "--weights", "model", "--data", "lfw.bin"), "--weights is for checkpoints such"),
        (("ours", "--embedding-size", "9", "--data", "lfw.bin"), "--embedding-size is for check"),
        (("ours", "--fp16", "--data", "lfw.bin"), "--fp16 is for checkpoints such as model.pt"),
        (("absent.onnx", "--data", "lfw.bin"), "'absent.onnx': the file: there is no file 'abs"),
        (("tiny=second.pt", *ONE), "two models are called 'tiny'; name them, as in NAME=tiny"),
        (("teacher", *ONE), "model 'teacher': is a teacher of a recipe; found no recipe; specify"),
        (
            ("teacher.1", *ONE, "--recipe", "kd.toml"),
            "model 'teacher.1': must be one of the recipe's teachers; did you mean 'teacher.0'?",
        ),
        (("buffalo_l", *ONE, "--root", "."), "an insightface pack must be installed, but models"),
        (("absent.pt", *ONE), "model 'absent.pt': student checkpoint: there is no file"),
        (("=x", *ONE), "a model must be MODEL or NAME=MODEL; found '=x'"),
        ((*ONE, "--view"), "--view applies the student_view of a recipe; found no recipe"),
        ((*ONE, "--no-flip", "--protocol", "insightface"), "as the trainer does; found --no-flip"),
        ((*ONE, "--folds", "50"), "a pair for each of 50 folds; found 46; use fewer"),
        ((*ONE, "--folds", "2", "--pairs", "two.txt"), "--folds is for verification files, but"),
        (("configs", *ONE), "model 'configs': an insightface pack must be installed"),
        ((*ONE, "--data", "configs"), "--data without --pairs must be verification files such as"),
        ((*ONE, "--data", "absent.bin"), "--data: there is no file 'absent.bin'"),
        ((*ONE, "--data", "lfw.bin", "lfw.bin"), "--data has two sets called 'lfw'; rename one"),
        (
            ("tiny=model.pt", "--network", "tiny", "--data", "a", "b", "--pairs", "p"),
            "must be one folder or zip of pictures; found 2",
        ),
        ((*ONE, "--json", "lfw.bin"), "--json 'lfw.bin' is also an input, and would be"),
        (
            (*ONE, "--json", "r.png", "--picture", "r.png"),
            "must be different files; found 'r.png' twice",
        ),
        ((*ONE, "--picture", "roc.svg"), "must be a PNG file, with a name such as roc.png; found"),
        ((*ONE, "--picture", "no/roc.png"), "--picture must be a file in a folder that exists"),
        ((*ONE, "--far", "2"), "argument --far: must lie between 0 and 1; found '2'"),
    ],
)
def test_a_wrong_command_is_refused_with_a_reason(
    argv: tuple[str, ...], said: str, capsys: Captured
) -> None:
    before = Path("lfw.bin").read_bytes()
    assert said in refused(capsys, *argv)
    assert Path("lfw.bin").read_bytes() == before


def test_a_recipe_without_a_view_or_with_stored_embeddings_is_refused(
    capsys: Captured, tmp_path: Path
) -> None:
    text = RECIPE[: RECIPE.index("[student_view]")].replace('"model.pt"', '"{}/model.pt"')
    (tmp_path / "plain.toml").write_text(text.format(Path.cwd()))
    said = refused(capsys, *ONE, "--view", "--recipe", str(tmp_path / "plain.toml"))
    assert "found a recipe without one; add [student_view]" in said
    (tmp_path / "cache").mkdir()
    (tmp_path / "stored.toml").write_text('methods=["fcd"]\nteacher={embeddings="cache"}')
    said = refused(
        capsys, "teacher", "--data", "lfw.bin", "--recipe", str(tmp_path / "stored.toml")
    )
    assert "must be a network to embed the images of a test; found '" in said


def test_images_of_another_size_are_refused(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "kd.toml").write_text(
        f"input_shape = [3, 96, 96]\n{RECIPE.replace('model.pt', f'{Path.cwd()}/model.pt')}"
    )
    said = refused(capsys, *ONE, "--recipe", str(tmp_path / "kd.toml"))
    assert "'0' is 112x112 (width x height), but 96x96 is needed" in said


def test_a_set_that_cannot_be_evaluated_is_named_before_the_long_pass(
    capsys: Captured, tmp_path: Path
) -> None:
    pictures, _ = pickle.loads(Path("lfw.bin").read_bytes())
    (tmp_path / "one.bin").write_bytes(pickle.dumps((pictures, [True] * PAIRS)))
    (tmp_path / "two.bin").write_bytes(pickle.dumps((pictures[:4], [True, False])))
    folds = ["--folds", "2"]
    for name, said in (("one", "of different people are both needed"), ("two", "of both kinds")):
        assert main(["evaluate", *ONE, "--data", f"{tmp_path}/{name}.bin", *folds]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"kdhooks: evaluate: --data: '{tmp_path}/{name}.bin' can't be ev")
        assert said in printed


def test_an_error_after_the_progress_starts_a_line(capsys: Captured, tmp_path: Path) -> None:
    """The fault is a picture of which only the header is intact."""
    pictures, same = pickle.loads(Path("lfw.bin").read_bytes())
    pictures[3] = pictures[3][:200]
    (tmp_path / "cut.bin").write_bytes(pickle.dumps((pictures, same)))
    assert main(["evaluate", *ONE[:3], "--data", str(tmp_path / "cut.bin")]) == 2
    *_, last = re.split("[\r\n]", capsys.readouterr().err.strip())
    assert last.startswith("kdhooks: evaluate: --data: every picture must be readable; found 1")


# --- output --------------------------------------------------------------------------------------


def test_every_verification_file_of_a_folder_is_taken(capsys: Captured, tmp_path: Path) -> None:
    for name in ("cfp_fp.bin", "agedb_30.bin"):
        shutil.copy("lfw.bin", tmp_path / name)
    found = evaluated(capsys, *ONE[:3], "--data", str(tmp_path), "lfw.bin")
    assert [tested["set"] for tested in found["sets"]] == ["agedb_30", "cfp_fp", "lfw"]


def test_options_that_are_given_twice_are_joined(capsys: Captured, tmp_path: Path) -> None:
    shutil.copy("lfw.bin", tmp_path / "other.bin")
    rates = ("--far", "0.3", "0.30", "--far", "0.1234567", "0.1234568")
    argv = (*ONE, "--data", str(tmp_path / "other.bin"), *rates)
    found = evaluated(capsys, *argv)
    assert [tested["set"] for tested in found["sets"]] == ["lfw", "other"]
    assert list(found["sets"][0]["results"][0]["tar"]) == ["0.3", "0.1234567", "0.1234568"]
    main(["evaluate", *argv])
    assert "| TAR at FAR 0.3 | TAR at FAR 0.1234567 | TAR at" in capsys.readouterr().out


def test_a_rate_that_is_too_small_to_measure_is_not_shown(capsys: Captured) -> None:
    options = (*ONE, "--far", "0.1", "1e-4")
    (result,) = evaluated(capsys, *options)["sets"][0]["results"]
    assert result["tar"]["0.1"] is not None
    assert result["tar"]["0.0001"] is None
    main(["evaluate", *options])
    printed = capsys.readouterr().out
    assert "TAR at FAR 0.0001" in printed
    assert "\n-: too few pairs of different people to measure that FAR\n" in printed


def test_a_fold_of_one_kind_is_reported(capsys: Captured, tmp_path: Path) -> None:
    pictures, same = pickle.loads(Path("lfw.bin").read_bytes())
    order = sorted(range(PAIRS), key=lambda place: same[place])
    sides = [pictures[2 * place + side] for place in order for side in (0, 1)]
    (tmp_path / "sorted.bin").write_bytes(pickle.dumps((sides, [same[place] for place in order])))
    main(["evaluate", *ONE[:3], "--data", str(tmp_path / "sorted.bin")])
    assert "sorted: a fold has pairs of one kind only" in capsys.readouterr().out
    main(["evaluate", *ONE])
    assert "one kind only" not in capsys.readouterr().out


def test_the_picture_and_the_json_file_are_written(capsys: Captured, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, file = tmp_path / "roc.png", tmp_path / "r.json"
    assert main(["evaluate", *ONE, "--picture", str(picture), "--json", str(file)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(file.read_text())["sets"][0]["set"] == "lfw"
    assert capsys.readouterr().out.startswith("| set ")


def test_without_matplotlib_the_picture_is_left_out(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", *ONE, "--picture", str(tmp_path / "roc.png")]) == 0
    assert "--picture is omitted, since it needs matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
