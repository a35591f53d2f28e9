"""examples/lightning distils a student from faces with or without labels."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("lightning")
pytest.importorskip("PIL")

import numpy as np
import torch
from torch import nn

from kdhooks import KDHooksError
from kdhooks.pictures import encode
from kdhooks.recipe import Recipe
from kdhooks_demo.network import SmallFaceNet
from tests.test_host_docs import small

EXAMPLE = Path(__file__).parents[1] / "examples" / "lightning"
PEOPLE, PICTURES = 6, 4
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def teacher() -> nn.Module:
    return small()


def student() -> nn.Module:
    return SmallFaceNet(12, width=4)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the example's script as a module, with its folder on the path as if it were run."""
    monkeypatch.syspath_prepend(EXAMPLE)
    for name in ("train", "faces"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import train

    yield train
    for name in ("train", "faces"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write random faces, pairs of two of the people, and a recipe."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for person in range(PEOPLE):
        (tmp_path / "faces" / f"p{person}").mkdir(parents=True)
        face = generator.integers(0, 256, (7, 7, 3))
        for number in range(1, PICTURES + 1):
            noisy = face + generator.normal(0, 8, (7, 7, 3))
            pixels = noisy.clip(0, 255).astype(np.uint8).repeat(16, 0).repeat(16, 1)
            name = f"p{person}/p{person}_{number:04d}.png"
            (tmp_path / "faces" / name).write_bytes(encode(pixels))
    lines = ["2 2"]
    for fold in (0, 2):
        lines += ["p4 1 2", "p5 1 2", f"p4 {fold + 1} p5 1", f"p4 {fold + 1} p5 2"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    torch.save(teacher().state_dict(), "teacher.pt")
    write_recipe(tmp_path, labels=False)
    return tmp_path


def write_recipe(folder: Path, labels: bool) -> None:
    (folder / "kd.toml").write_text(
        f"labels = {str(labels).lower()}\n"
        'methods = [{ name = "fcd", projector = true }]\n'
        'teacher = { network = "tests.test_lightning_example:teacher", checkpoint = "teacher.pt" }'
    )


def run(train: ModuleType, *words: str, epochs: int = 2) -> Any:
    return train.main(
        [
            *("--recipe", "kd.toml", "--data", "faces", "--batch-size", "4", "--workers", "0"),
            *("--student", "tests.test_lightning_example:student", "--accelerator", "cpu"),
            *("--epochs", str(epochs), "--out", "out", *words),
        ]
    )


def saved() -> dict[str, torch.Tensor]:
    net = student()
    net.load_state_dict(torch.load("out/student.pt", weights_only=True))
    return dict(net.state_dict())


def test_faces_without_labels_train_a_student(train: ModuleType, folder: Path) -> None:
    trainer = run(train, "--pairs", "pairs.txt")
    assert trainer.global_step == 2 * 4  # 16 faces in batches of 4: two of six people are held out
    assert saved().keys() == student().state_dict().keys()
    names = trainer.callback_metrics.keys()
    assert {"kdhooks/fcd", "verification/accuracy", "verification/eer"} <= names
    assert "loss" not in names
    log = Path("out/log/version_0/metrics.csv").read_text()
    assert "verification/accuracy" in log


def test_faces_with_labels_train_a_head_as_well(train: ModuleType, folder: Path) -> None:
    write_recipe(folder, labels=True)
    trainer = run(train, epochs=1)
    assert trainer.global_step == 6
    assert len(trainer.lightning_module.head.weight) == PEOPLE
    assert {"kdhooks/fcd", "loss"} <= trainer.callback_metrics.keys()


def test_an_interrupted_run_resumes(
    train: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def fail(module: Any) -> None:
            if module.current_epoch == 1:
                raise OSError("the power is off")

        patch.setattr(train.FaceRecogniser, "on_train_epoch_start", fail)
        with pytest.raises(OSError, match="power"):
            run(train)
    assert run(train, "--resume").global_step == 2 * 6


def test_the_measures_are_those_of_the_embeddings(train: ModuleType, folder: Path) -> None:
    """The pairs refer to the right faces: two pictures of one person are closer than of two."""
    from faces import open_faces, tested_faces

    faces, pairs = tested_faces(open_faces("faces"), "pairs.txt")
    images = torch.stack([faces[row][0] for row in range(len(faces))])
    gaps = (images[pairs.rows[:, 0]] - images[pairs.rows[:, 1]]).abs().mean(dim=(1, 2, 3))
    assert torch.equal(gaps < 0.2, torch.from_numpy(pairs.same))
    assert images.amin() >= -1


def test_the_commands_of_the_page_are_understood(train: ModuleType) -> None:
    page = (EXAMPLE.parents[1] / "docs" / "lightning.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python examples/lightning/train.py (.+)$", page, re.MULTILINE)
    assert [train.parser().parse_args(line.split()).recipe for line in lines] == ["kd.toml"] * 3


def test_the_recipe_of_the_example_is_valid(folder: Path) -> None:
    Path("teacher.onnx").write_text("a network")
    text = (EXAMPLE / "kd.toml").read_text(encoding="utf-8")
    Path("kd.toml").write_text(text)
    assert not Recipe.read("kd.toml").labels


def test_faces_that_cannot_be_used_are_refused(train: ModuleType, folder: Path) -> None:
    (folder / "faces" / "alone.png").write_bytes(encode(np.zeros((112, 112, 3), np.uint8)))
    write_recipe(folder, labels=True)
    with pytest.raises(KDHooksError, match=r"found 1 of 25 pictures in no folder; .* labels = fal"):
        run(train)
    (folder / "pairs.txt").write_text("2 1\np1 1 2\np1 1 p2 1\np1 1 3\np1 1 p9 1\n")
    with pytest.raises(KDHooksError, match="1 of 8 are not, the first is 'p9/p9_0001'"):
        run(train, "--pairs", "pairs.txt")
