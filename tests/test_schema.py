"""`kdhooks schema`: the JSON Schema accepts and refuses the same recipes as kdhooks."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from kdhooks import KDHooksError, methods
from kdhooks.cli import main
from kdhooks.recipe import Recipe
from kdhooks.schema import recipe_schema
from tests.distributions import write_distribution

Captured = pytest.CaptureFixture[str]
TEACHER = '[teacher]\nonnx = "teacher.onnx"\n'

GOOD = [
    'methods = ["fcd"]',
    'methods = ["fcd", { name = "kd", temperature = 3 }]\nseed = 3\nnonfinite = "skip"',
    'methods = [{ name = "kd", temperature = { value = 2, initial = 8.0, warmup = 100 } }]',
    'methods = [{ name = "fcd", weight = { value = 2, warmup = 1.5, unit = "epoch" } }]',
    'methods = [{ name = "cakd", urfm = { centres = 4 }, positions = { anchor = [3.0, 4] } }]',
    'methods = ["at"]\ninput_shape = [3, 64, 64]\n[taps]\nstudent.stages = ["a", "b"]',
    'methods = [{ name = "coupleface", max_neighbour_sim = 0.7, neighbours = "mined" }]',
    'methods = ["fcd"]\nstudent_view = { mask = {}, low_resolution = { sizes = [14], p = 1 } }',
    'methods = ["fcd"]\nstudent_view.blur = { sigma = [1, 2.5] }\nstudent_view.grey.p = 0.5',
]
BAD = [
    "methods = []",
    "methods = 3",
    'methods = ["fdc"]',
    "methods = [3]",
    "methods = [{ weight = 1 }]",
    'methods = [{ name = "fcd", wieght = 1 }]',
    'methods = [{ name = "fcd", projector = "false" }]',
    'methods = [{ name = "kd", temperature = 0 }]',
    'methods = [{ name = "kd", temperature = { value = 0 } }]',
    'methods = [{ name = "kd", temperature = { initial = 3 } }]',
    'methods = [{ name = "coupleface", k = 2.5 }]',
    'methods = [{ name = "adadistill", m = 28.6 }]',
    'methods = [{ name = "cakd", urfm = { heads = 0 } }]',
    'methods = [{ name = "cakd", positions = { anchor = [3.0] } }]',
    'methods = ["fcd"]\nseed = -1',
    'methods = ["fcd"]\ninput_shape = [3, 0, 112]',
    'methods = ["fcd"]\nmetods = []',
    'methods = ["fcd"]\nstudent_view = {}',
    'methods = ["fcd"]\nstudent_view = "mask"',
    'methods = ["fcd"]\nstudent_view.masks = {}',
    'methods = ["fcd"]\nstudent_view.mask.p = 1.5',
    'methods = ["fcd"]\nstudent_view.blur.sigma = [1, 2, 3]',
    'methods = ["fcd"]\nstudent_view.low_resolution.up = "area"',
    'methods = ["fcd"]\nstudent_view.low_resolution.sizes = []',
    'methods = ["at"]\n[taps]\nstudent.stages = "layer3"',
]


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(json.dumps(recipe_schema()))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def written(folder: Path, recipe: str) -> Path:
    (folder / "teacher.onnx").write_bytes(b"onnx")
    text = recipe if "[taps]" not in recipe else recipe.replace("[taps]", TEACHER + "[taps]")
    (folder / "kd.toml").write_text(text if "[teacher]" in text else f"{text}\n{TEACHER}")
    return folder / "kd.toml"


@pytest.mark.parametrize("recipe", GOOD)
def test_an_accepted_recipe_fits_the_schema(recipe: str, tmp_path: Path, validator: Any) -> None:
    file = written(tmp_path, recipe)
    Recipe.read(file)
    validator.validate(tomllib.loads(file.read_text()))


@pytest.mark.parametrize("recipe", BAD)
def test_a_refused_recipe_does_not_fit_the_schema(
    recipe: str, tmp_path: Path, validator: Any
) -> None:
    file = written(tmp_path, recipe)
    with pytest.raises(KDHooksError):
        Recipe.read(file)
    assert not validator.is_valid(tomllib.loads(file.read_text()))


@pytest.mark.parametrize(
    ("teacher", "fits"),
    [
        ({"onnx": "t.onnx"}, True),
        ([{"onnx": "t.onnx"}, {"network": "r50", "checkpoint": "m.pt"}], True),
        ([{"onnx": "t.onnx"}, {"network": "r50"}], False),
        ([], False),
        ({"onnx": "t.onnx", "cache": {"path": "c", "max_gb": 0.5}}, True),
        ({"onnx": "t.onnx", "input": {"size": [112, 112], "mean": 0, "std": [1, 1, 2.5]}}, True),
        ({"network": "r50", "checkpoint": "m.pt"}, True),
        ({"insightface": "buffalo_l", "onnx": "t.onnx"}, False),
        ({"network": {"type": "ResNet"}, "checkpoint": "m.pt"}, True),
        ({"network": "r50", "checkpoint": "m.pt", "convert": False, "weights": ""}, True),
        ({"network": "r50", "checkpoint": "m.pt", "convert": True}, False),
        ({"network": "r50", "checkpoint": "m.pt", "output": "e"}, False),
        ({"onnx": "t.onnx", "weights": "ema"}, False),
        ({"onnx": "t.onnx", "checkpoint": "m.pt"}, False),
        ({"onnx": "t.onnx", "root": "packs"}, False),
        ({"onnx": "t.onnx", "classifier": " "}, False),
        ({"network": "r50"}, False),
        ({}, False),
        ({"onnx": "t.onnx", "cache": ""}, False),
        ({"onnx": "t.onnx", "cache": {"path": "c", "max_gb": 0}}, False),
        ({"onnx": "t.onnx", "dtype": "float8"}, False),
        ({"onnx": "t.onnx", "input": {"std": [1, 1, 0]}}, False),
    ],
)
def test_the_teachers_table(teacher: Any, fits: bool, validator: Any) -> None:
    assert validator.is_valid({"teacher": teacher, "methods": ["fcd"]}) is fits


@pytest.mark.parametrize("several", [False, True])
def test_the_teachers_embedding_is_named_in_one_place(
    several: bool, tmp_path: Path, validator: Any
) -> None:
    file = tmp_path / "t.onnx"
    file.write_bytes(b"onnx")
    named = {"onnx": str(file), "embedding": "fc"}
    for tables, fits in ([named], False), ([{"onnx": str(file)}], True), ([named, named], False):
        if several or len(tables) == 1:
            teacher = tables if several else tables[0]
            recipe: dict[str, Any] = {"teacher": teacher, "methods": ["fcd"]}
            Recipe.read(recipe)
            validator.validate(recipe)
            recipe["taps"] = {"teacher": {"embedding": "fc"}}
            assert validator.is_valid(recipe) is fits
            if fits:
                Recipe.read(recipe)
            else:
                with pytest.raises(KDHooksError, match=r"taps\.teacher\.embedding names"):
                    Recipe.read(recipe)


def test_every_method_fits_with_only_its_name(validator: Any) -> None:
    for info in methods():
        recipe = {"teacher": {"onnx": "t.onnx"}, "methods": [{"name": info.name}]}
        validator.validate(recipe)


def test_third_party_methods_are_in_the_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    code = """'''F.'''
class M:
    def __init__(self, *, size: int, names: list[str] | None = None, none: tuple[()] = ()): ...
"""
    write_distribution(tmp_path, "fake_third", {"third": "fake_third:M"}, code)
    write_distribution(tmp_path, "fake_broken", {"broken": "fake_broken:M"}, "import no")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["schema"]) == 0
    validator = Draft202012Validator(json.loads(capsys.readouterr().out))
    for method, fits in [
        ({"name": "third", "size": 3}, True),
        ({"name": "third", "size": 3, "names": ["a"]}, True),
        ({"name": "third"}, False),
        ({"name": "third", "size": 2.5}, False),
        ({"name": "third", "size": 3, "names": "a"}, False),
        ({"name": "broken", "anything": 1}, True),
    ]:
        recipe = {"teacher": {"onnx": "t.onnx"}, "methods": [method]}
        assert validator.is_valid(recipe) is fits, method
