"""The commands in docs/evaluate.md are valid, its code runs, and it names every key of the JSON."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from benchmarks.recordio_files import write_pairs
from kdhooks.cli import main
from kdhooks.options import declared_options
from kdhooks.recipe import Recipe
from kdhooks.verification import Verification
from kdhooks.views.student_view import ViewTable
from kdhooks_integrations.arcface_torch.commands.evaluate_options import (
    check_evaluate,
    evaluate_parser,
)
from tests.trainer_folder import imports_undone, settled, write_teacher, write_trainer

TEXT = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(
    re.findall(r"^```\w+ ([\w-]+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
)
COMMANDS = {name: text for name, text in BLOCKS.items() if text.startswith("kdhooks ")}


@pytest.mark.parametrize("block", COMMANDS)
def test_a_command_is_understood(block: str) -> None:
    words = shlex.split(COMMANDS[block].replace("\\\n", " "))
    assert words[:2] == ["kdhooks", "evaluate"]
    options = evaluate_parser(None).parse_args(words[2:])
    check_evaluate(options)
    assert options.models
    assert all(Path(one).suffix in ("", ".bin", ".zip") for one in options.data)


def test_the_commands_are_all_named() -> None:
    assert list(COMMANDS) == ["files", "several", "pictures", "protocol", "view"]


def test_the_recipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "w600k_r50.onnx").write_bytes(b"graph")
    (tmp_path / "kd.toml").write_text(BLOCKS["probes"])
    view = Recipe.read(tmp_path / "kd.toml").student_view
    assert isinstance(view, ViewTable)
    assert list(view.parts()) == ["low_resolution"]
    assert view.parts().keys() <= declared_options(ViewTable).keys()


def test_the_python_agrees_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_teacher(write_trainer(tmp_path))
    write_pairs(tmp_path / "lfw.bin", 4, 30)
    names: dict[str, Any] = {"student": settled()}
    exec(compile(BLOCKS["loop"], "docs/evaluate.md, loop", "exec"), names)
    found = names["found"]
    assert isinstance(found, Verification)
    options = ["model.pt", "--network", "tiny", "--data", "lfw.bin", "--far", "0.1"]
    with imports_undone():
        assert main(["evaluate", *options, "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    (result,) = content["sets"][0]["results"]
    assert (result["accuracy"], result["eer"]) == (found.accuracy, found.eer)
    assert result["tar"] == {"0.1": found.tar[0.1]}
    for keys in (content, content["models"][0], content["sets"][0], result):
        assert all(f"`{key}`" in TEXT for key in keys)
