"""The commands in docs/arcface_torch.md exist, and its recipes can be read."""

import argparse
import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdhooks.cli import main
from kdhooks.recipe import Recipe
from kdhooks_integrations.arcface_torch.commands import compat, run

TEXT = (Path(__file__).parents[1] / "docs" / "arcface_torch.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(
    re.findall(r"^```\w+ ([\w-]+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
)
COMMANDS = [line for line in TEXT.splitlines() if "kdhooks " in line and re.match("kd|torch", line)]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the parsed options of each command, which is then not run."""
    seen: list[dict[str, Any]] = []

    plain: Callable[..., Any] = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        options = plain(self, args, namespace)
        if self.prog != "kdhooks":
            seen.append(vars(options))
            raise SystemExit(0)
        return options

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str, called: list[dict[str, Any]]) -> None:
    words = shlex.split(command)
    words = words[words.index("kdhooks") + 1 :]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert len(called) == 1


def test_all_four_commands_are_shown() -> None:
    shown = {words.split("kdhooks ")[1].split()[0] for words in COMMANDS}
    assert shown == {"run", "doctor", "taps", "export"}
    assert len(COMMANDS) == 6


def test_the_script_gets_its_arguments() -> None:
    words = shlex.split(BLOCKS["torchrun"])
    options, own = run._options(words[words.index("run") + 1 :])
    assert (options.script, options.recipe, options.compat) == ("train_v2.py", "kd.toml", True)
    assert own == ["configs/ms1mv3_r50"]


def test_the_teacher_is_trained_without_a_recipe_at_the_path_in_the_recipe() -> None:
    words = shlex.split(BLOCKS["teacher"])
    options, (config,) = run._options(words[words.index("run") + 1 :])
    assert (options.recipe, options.compat) == (None, True)
    assert f"work_dirs/{Path(config).name}/model.pt" in BLOCKS["recipe"]


@pytest.mark.parametrize("block", ["recipe", "named-taps"])
def test_a_recipe_is_read(block: str, tmp_path: Path) -> None:
    teacher = tmp_path / "work_dirs" / "ms1mv3_r100"
    teacher.mkdir(parents=True)
    (teacher / "model.pt").write_text("weights")
    (tmp_path / "kd.toml").write_text(BLOCKS[block])
    recipe = Recipe.read(tmp_path / "kd.toml")
    assert recipe.teachers[0].network == "r100"
    stages = ("layer2", "layer3") if block == "named-taps" else None
    assert recipe.taps.student.stages == recipe.taps.teacher.stages == stages


def test_the_python_block_can_be_parsed() -> None:
    assert ast.parse(BLOCKS["face-analysis"]).body


def test_every_repair_has_its_row() -> None:
    table = TEXT[TEXT.index("| repair |") : TEXT.index("A fork must")]
    assert len(table.strip().splitlines()) - 2 == len(compat.REPAIRS)
