"""Networks are built from package.module:factory, and errors explain why one cannot be built."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdhooks import KDHooksError, build
from kdhooks.factories import factory_named, made_by
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.testing import TinyFaceNet
from tests.small_distiller import teacher_network

SOURCE = """
from torch import nn
from kdhooks.testing import TinyFaceNet

network = TinyFaceNet()
number = 3

def teacher():
    return TinyFaceNet(width=6)

def needy(width):
    return TinyFaceNet(width=width)

def broken():
    raise ValueError("no such width")

def text():
    return "network"

class Inner:
    @staticmethod
    def make():
        return TinyFaceNet(width=6)
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "some_nets.py").write_text(SOURCE)
    (tmp_path / "raising_nets.py").write_text("import torch\ntorch.nothing\n")
    (tmp_path / "needing_nets.py").write_text("import timmm\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("some_nets", "raising_nets", "needing_nets"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["some_nets:teacher", "some_nets:Inner.make"])
def test_a_plain_recipe_makes_its_teacher(name: str, tmp_path: Path) -> None:
    module = teacher_network()
    torch.save({"net": module.state_dict()}, tmp_path / "model.pt")
    spec = {"network": name, "checkpoint": tmp_path / "model.pt"}
    recipe = {"teacher": spec, "methods": ["fcd"], "input_shape": [3, 32, 32]}
    build(recipe, TinyFaceNet().train())
    found = build_teacher(Recipe.read(recipe)).module
    assert found is not None
    assert torch.equal(found.state_dict()["fc.weight"], module.state_dict()["fc.weight"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (":teacher", "must be written as package.module:factory"),
        ("some_nets:", "must be written as package.module:factory"),
        ("some_nets:a:b", "must be written as package.module:factory"),
        ("some/nets.py:teacher", "must be written as package.module:factory"),
        ("absent_nets:teacher", "can't be imported: No module named 'absent_nets'; start in the"),
        ("needing_nets:teacher", "can't be imported: No module named 'timmm'"),
        ("raising_nets:teacher", "can't be imported: 'raising_nets' raises AttributeError"),
        (
            "some_nets:techer",
            r"can't be imported: there is no 'techer' in .*some_nets\.py; did you mean 'teacher'",
        ),
        ("some_nets:network", "must be a function or a class that .*object of class TinyFaceNet"),
        ("some_nets:number", "must be a function or a class that .*object of class int"),
        (
            "some_nets:needy",
            "must be callable without further arguments: .*'width'; name a function",
        ),
        ("some_nets:broken", "must return a network; it raises ValueError: no such width"),
        ("some_nets:text", "must return an nn.Module; found str"),
    ],
)
def test_a_network_that_cannot_be_built_is_named(name: str, said: str) -> None:
    with pytest.raises(KDHooksError, match=f"teacher.network '{name}' {said}"):
        made_by(factory_named(name, "teacher.network"), name, "teacher.network")


def test_a_misspelt_factory_is_found_before_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("of no use")
    spec = {"network": "some_nets:techer", "checkpoint": tmp_path / "model.pt"}
    with pytest.raises(KDHooksError, match="there is no 'techer'"):
        build({"teacher": spec, "methods": ["fcd"]}, TinyFaceNet())


def test_a_name_of_a_hosts_network_needs_its_host(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("of no use")
    spec = {"network": "r50", "checkpoint": tmp_path / "model.pt"}
    with pytest.raises(
        KDHooksError, match=r"'r50' needs a factory of the host.*package\.module:factory"
    ):
        build({"teacher": spec, "methods": ["fcd"]}, TinyFaceNet())
