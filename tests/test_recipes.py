"""Each recipe in recipes/ passes the `kdhooks doctor` command in its head, with small networks."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("PIL")

from benchmarks.recordio_files import people
from kdhooks.cli import main
from kdhooks.discovery import load
from kdhooks.pictures import encode
from tests.standin import backbones
from tests.trainer_folder import imports_undone, write_config, write_trainer
from tests.transformers import Block

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
CLASSES = 120  # coupleface mines 100 neighbours of each class
WIDTH = 16
WIDE = 128  # the least width by which a recognition model is recognised in insightface's packs


class IResNet(backbones.IResNet):
    """Takes 112 pixels and ends in maps of 7 pixels, like arcface_torch's."""

    def __init__(self, num_features: int) -> None:
        super().__init__((8, 8, 16, 16), num_features, 0.0)
        self.conv1 = nn.Conv2d(3, 8, 3, stride=1, padding=1, bias=False)
        self.fc = nn.Linear(16 * 49, num_features)


class VisionTransformer(nn.Module):
    """Makes 144 tokens of an image of 112 pixels, like arcface_torch's vision transformers."""

    def __init__(self, num_features: int, width: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 9, stride=9)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(144 * width, num_features), nn.BatchNorm1d(num_features)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 112 112) -> (b d)."""
        x = self.patch_embed(images).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        embedding: Tensor = self.feature(self.norm(x).flatten(1))
        return embedding


def get_model(name: str, dropout: float, fp16: bool, num_features: int) -> nn.Module:
    """Stand in for the trainer's factory, with small networks."""
    return VisionTransformer(num_features) if name.startswith("vit") else IResNet(num_features)


def learnt(network: nn.Module) -> nn.Module:
    """Set the BatchNorm statistics to those of the faces; doctor needs no more training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(pictures()[0])
    return network.eval()


def pictures() -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*people(CLASSES, 1), strict=True)
    images = torch.stack([torch.from_numpy(each) for each in pixels]).permute(0, 3, 1, 2).float()
    return (images - 127.5) / 127.5, torch.tensor(labels)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create the trainer's folder, with a picture of each person in `faces`; it is HOME, too."""
    write_trainer(tmp_path)
    (tmp_path / "backbones.py").write_text("from tests.test_recipes import get_model\n")
    for pixels, who in people(CLASSES, 1):
        (tmp_path / "faces" / f"{who:04}").mkdir(parents=True)
        (tmp_path / "faces" / f"{who:04}" / "0.png").write_bytes(encode(pixels))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with imports_undone():
        yield tmp_path


def teachers(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    found = recipe["teacher"]
    return found if isinstance(found, list) else [found]


def write_files(table: dict[str, Any], seed: int) -> None:
    """Write the files that a teacher's table names: weights, rows in two shards, or the pack."""
    if "insightface" in table:
        pytest.importorskip("onnxruntime")
        from tests.test_readme import export

        pack = Path.home() / ".insightface/models" / table["insightface"]
        pack.mkdir(parents=True, exist_ok=True)
        export(learnt(IResNet(WIDE)), pack / "w600k_r50.onnx")
        return
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = learnt(get_model(table["network"], 0.0, False, WIDTH))
    checkpoint = Path(table["checkpoint"])
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), checkpoint)
    if "classifier" in table:
        with torch.no_grad():
            rows = F.normalize(network(pictures()[0]))
        for rank, part in enumerate(rows.split(CLASSES // 2)):
            content = {"state_dict_softmax_fc": {"weight": part.clone()}}
            torch.save(content, table["classifier"].replace("*", str(rank)))


def commands(name: str) -> list[list[str]]:
    """Return the commands in the head of the file."""
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    return [shlex.split(line) for line in re.findall(r"^#   (kdhooks .*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("name", NAMES)
def test_doctor_accepts_it(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    recipe = tomllib.loads(text)
    for seed, table in enumerate(teachers(recipe)):
        write_files(table, seed)
    width = WIDE if "insightface" in recipe["teacher"] else WIDTH
    argv = next(argv for argv in commands(name) if argv[1] == "doctor")[1:]
    config = argv[argv.index("--config") + 1]
    network = re.findall(r"_(mbf|r\d+)$", config)[0]
    write_config(
        folder, Path(config).name, network=network, embedding_size=width, num_classes=CLASSES
    )
    argv[argv.index("--data") + 1] = "faces"
    status = main([*argv, "--batch-size", "12"])
    report = capsys.readouterr().out
    assert status == 0, report
    found = {line[7:19].strip(): line[:5].strip() for line in report.splitlines()}
    checked = {"recipe", "student", "images", "teacher", "taps", "step", "gradients"}
    if any("classifier" in table for table in teachers(recipe)):
        checked |= {"classes", "class order"}
    if "student_view" in recipe:
        checked.add("view")
    assert {found[check] for check in checked} <= {"ok", "WARN"}


@pytest.mark.parametrize("name", NAMES)
def test_the_head_has_commands_and_figures_and_states_what_was_not_run(name: str) -> None:
    head = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0]
    assert "# Not run at this scale. Reported by others" in head
    for argv in commands(name):
        if argv[1] in ("doctor", "run"):
            assert argv[argv.index("--recipe") + 1] == f"{name}.toml"
    configs = {part for argv in commands(name) for part in argv if part.startswith("configs/")}
    assert len(configs) == 1


def test_the_table_lists_every_recipe_with_its_methods() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\.toml\]\(\1\.toml\) \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == NAMES
    for name, cell in rows:
        methods = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))["methods"]
        names = [each if isinstance(each, str) else each["name"] for each in methods]
        assert re.findall(r"`(\w+)`", cell) == names
        assert all(load(each) for each in names)


def test_a_recipe_whose_teacher_does_not_fit_is_not_accepted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The companion of test_doctor_accepts_it: doctor checks the files that the recipe names."""
    name = "r100_mbf_glint360k"
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)["teacher"]
    write_files(table, 0)
    for shard in Path().glob(table["classifier"]):
        content = torch.load(shard)
        rows = content["state_dict_softmax_fc"]
        rows["weight"] = rows["weight"].roll(1, 0)
        torch.save(content, shard)
    (folder / "kd.toml").write_text(text, encoding="utf-8")
    options = ["--network", "mbf", "--embedding-size", str(WIDTH), "--data", "faces"]
    assert main(["doctor", "--recipe", "kd.toml", *options, "--batch-size", "24"]) == 1
    assert "must be in the order of the training labels" in capsys.readouterr().out
