"""The site's own pages quote names and errors that exist, and show code that runs."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from torch import nn

import kdhooks
import kdhooks.testing
from kdhooks.discovery import create
from kdhooks.recipe import Recipe
from tests.small_distiller import distil

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def block(name: str, of: str) -> str:
    (found,) = re.findall(rf"^```\w+ {of}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("name", kdhooks.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    kinds = "autoclass|autofunction|autodata|data"
    assert re.search(rf"^\.\. (?:{kinds}):: kdhooks\.{name}$", page("api.md"), re.MULTILINE)


@pytest.mark.parametrize("host", ["arcface_torch", "mmengine", "lightning"])
def test_every_public_name_of_an_adapter_is_in_the_reference(host: str) -> None:
    folder = Path(kdhooks.__file__).parents[1]
    package = folder / "integrations/kdhooks_integrations" / host / "__init__.py"
    if not package.exists():  # in the wheel
        package = folder / "kdhooks_integrations" / host / "__init__.py"
    (line,) = re.findall(r"^__all__ = (\[.*\])$", package.read_text(encoding="utf-8"), re.MULTILINE)
    for name in ast.literal_eval(line):
        assert f":: kdhooks_integrations.{host}.{name}\n" in page("api.md")


def test_the_errors_that_the_faq_quotes_exist() -> None:
    folder = Path(kdhooks.__file__).parent
    strings = " ".join(
        "".join(
            part.value
            for part in ast.walk(node)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        )
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )
    quoted = re.findall(r'^### .*"(.+)"', page("faq.md"), re.MULTILINE)
    assert len(quoted) == 3
    for text in quoted:
        assert text in strings


def test_every_example_is_listed_with_files_that_exist() -> None:
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[([\w.-]+)\]\(\1\) \|", text, re.MULTILINE)
    found = {path.name for path in (ROOT / "examples").iterdir()} - {"README.md", "__pycache__"}
    assert sorted(listed) == sorted(found)
    named = re.findall(r"examples/[\w./-]+", text)
    assert len(named) > 4
    assert all((ROOT / name).exists() for name in named)


def test_the_recipe_of_a_live_teacher_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model.pt").write_text("weights")
    recipe = Recipe.read(tomllib.loads(block("performance.md", "live-teacher")))
    assert recipe.teachers[0].compile == "reduce-overhead"


def test_the_pair_of_modules_is_compared() -> None:
    """The recipe is the one for mmrazor's users, with modules of another network."""
    text = block("coming-from.md", "fitnet").replace("{{_base_.model}}", "None")
    names: dict[str, dict[str, list[dict[str, str]]]] = {}
    exec(text, {}, names)
    (method,) = names["model"]["methods"]
    assert method["student"] == "backbone.layer3"
    method |= {"student": "layer3", "teacher": "layer4"}
    kd = distil(create(method))
    assert (kd.taps[0].student_paths, kd.taps[0].teacher_paths) == (("layer3",), ("layer4",))
    assert isinstance(kd.taps[0].loss, nn.Module)
