"""`kdhooks taps` lists every point that a recipe can name, with the shape of its output."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdhooks.cli import main
from kdhooks_integrations.arcface_torch.commands.taps import listing
from tests.trainer_folder import imports_undone, write_trainer

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with imports_undone():
        yield write_trainer(tmp_path)


def lines(capsys: Captured, *argv: str) -> list[list[str]]:
    assert main(["taps", *argv]) == 0
    return [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]


def test_the_stages_and_the_embedding_are_marked(capsys: Captured) -> None:
    head, *rows = lines(capsys, "tiny")
    assert head == ["path", "shape"]
    points = dict(rows)
    assert points["conv1"] == "(8, 28, 28)"
    assert points["layer3"] == "(16, 4, 4)   stage3"
    assert points["(output)"].startswith("(512,)")
    assert points["(output)"].endswith("embedding")
    assert "layer3.conv1" not in points


def test_depth_shows_inner_modules(capsys: Captured) -> None:
    points = dict(lines(capsys, "tiny", "--depth", "2", "--embedding-size", "24")[1:])
    assert points["layer3.conv1"] == "(16, 4, 4)"
    assert points["layer3.bn2"].endswith("overwritten in place by a later module")
    assert points["fc"].startswith("(24,)")


def test_a_users_own_factory(capsys: Captured, trainer: Path) -> None:
    points = dict(lines(capsys, "backbones:blocks", "--trainer", str(trainer))[1:])
    assert points["0"] == "(4, 7, 7)  overwritten in place by a later module"
    assert points["(output)"] == "(196,)     embedding"


class Odd(nn.Module):
    """Has a checkpointed block, one that runs twice, one only in evaluation, and one that crops."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.only, self.some = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)))
        x = checkpoint(self.inner, x, use_reentrant=True) if self.training else self.inner(x)
        if not self.training:
            x = self.only(x)
        kept: Tensor = self.some(x[:, :3] if self.training else x)
        return kept[:, :2]


def test_differences_in_training_are_noted() -> None:
    notes = {point.path: point.described() for point in listing(Odd(), 2, (4,))}
    assert notes == {
        "first": "",
        "twice": "runs 2 times; name one call, such as path@2",
        "inner.0": "no gradient: inside a checkpointed block, or frozen",
        "inner.1": "",
        "inner": "",
        "only": "does not run in training",
        "some": "(3,) in training",
        "": "embedding",
    }


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["r19"], "network 'r19' is unknown to the trainer's get_model, which accepts names"),
        (["absent:f"], "network 'absent:f' can't be imported: No module named 'absent'"),
        (["backbones:f"], "network 'backbones:f' can't be imported: there is no 'f' in "),
        (["backbones:no_network"], "must return an nn.Module; found int"),
        (
            ["backbones:get_model"],
            "must be callable without further arguments: get_model() missing",
        ),
        (["backbones:blocks", "--embedding-size", "8"], "takes no num_features, so --embeddi"),
        (["tiny", "--input-shape", "1", "8", "8"], "run on images of the shape (1, 8, 8); it ra"),
        (["tiny", "--trainer", "absent"], "--trainer must be a folder; found 'absent'"),
        (["tiny", "--input-shape", "3", "8", "8"], "must run on images of the shape (3, 8, 8)"),
        (["tiny", "--input-shape", "1", "112", "112"], "--input-shape to that of the training"),
        (["tiny", "--input-shape", "3", "0", "112"], "whole number, at least 1; found 0"),
        (["tiny", "--depth", "0"], "--depth: must be a whole number, at least 1; found 0"),
        (["tiny", "--embedding-size", "-4"], "--embedding-size: must be a whole number"),
        (["tiny", "--embedding-size", "1e3"], "at least 1; found 1e3"),
        (["tiny", "more"], "unrecognized arguments: more"),
        ([], "the following arguments are required: NETWORK; 'kdhooks taps --help' lists"),
        ([":f"], "network ':f' must be written as package.module:factory"),
        (["backbones:"], "network 'backbones:' must be written as"),
        (
            ["backbones:CLASSES"],
            "network 'backbones:CLASSES' must be a function or a class",
        ),
        (
            ["backbones:broken"],
            "network 'backbones:broken' must return a network; it raises ValueError",
        ),
        (["needs_timm"], "ModuleNotFoundError: No module named 'timm'; install the package timm"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(
    argv: list[str], said: str, capsys: Captured
) -> None:
    assert main(["taps", *argv]) == 2
    assert said in capsys.readouterr().err


def test_outside_of_the_trainers_folder_the_option_is_named(
    trainer: Path, capsys: Captured
) -> None:
    (trainer / "backbones.py").unlink()
    assert main(["taps", "tiny"]) == 2
    assert "run in the trainer's folder, or specify --trainer FOLDER" in capsys.readouterr().err


def test_the_names_that_a_recipe_may_write_are_listed() -> None:
    class IResNet(nn.Sequential):
        pass

    blocks = (nn.Linear(4, 4) for _ in range(4))
    network = IResNet(OrderedDict((f"layer{n}", block) for n, block in enumerate(blocks, 1)))
    names = {point.path: point.names for point in listing(network, 1, (4,))}
    assert names == {
        "layer1": ["stage1"], "layer2": ["stage2"], "layer3": ["stage3"], "layer4": ["stage4"],
        "": ["embedding"],
    }  # fmt: skip
    network.append(nn.Identity())
    network.add_module("stage1", nn.Identity())  # takes precedence over the name
    names = {point.path: point.names for point in listing(network, 1, (4,))}
    assert names["layer1"] == []
    assert names["layer2"] == ["stage2"]


def test_listing_leaves_no_hook() -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    listing(network, 1, (4,))
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.is_grad_enabled()
