"""The blocks of docs/teachers-and-views.md on the student's view run as printed.

The word after a block's language is its name; each name that starts with student-view has its test
here.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kdhooks import Distiller, viewed
from kdhooks.options import declared_options
from kdhooks.recipe import Recipe
from kdhooks.views.student_view import ViewTable
from tests.test_readme import Network, batch, trained

PAGE = Path(__file__).parents[1] / "docs" / "teachers-and-views.md"
BLOCKS = dict(
    re.findall(
        r"^```\w+ (student-view[\w-]*)\n(.*?)^```$",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)


def run(block: str, **names: object) -> dict[str, Any]:
    """Run a block with these names, and return the names that it defines."""
    namespace: dict[str, Any] = {"torch": torch, **names}
    exec(compile(BLOCKS[block], f"{PAGE.name}, {block}", "exec"), namespace)
    return namespace


def test_block_student_view(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.pt").write_bytes(b"weights")
    (tmp_path / "kd.toml").write_text(BLOCKS["student-view"])
    table = Recipe.read(tmp_path / "kd.toml").student_view
    assert isinstance(table, ViewTable)
    assert list(table.parts()) == ["mask", "low_resolution"]


def test_block_student_view_loop() -> None:
    student, weights = Network().train(), torch.randn(120, 12) / 100
    names = run(
        "student-view-loop",
        student=student,
        teacher=trained(),
        loader=[batch()] * 2,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        criterion=lambda embedding, labels: F.cross_entropy(embedding @ weights.T, labels),
    )
    assert names["kd"].step == 2
    assert names["kd"].student_view is names["view"]


def test_block_student_view_own() -> None:
    method = run("student-view-own")["Sunglasses"](p=0.5)
    student, (images, labels) = Network().train(), batch()
    with Distiller(student, trained(), ["fcd", method]) as kd:
        seen = []
        student.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        student(images)
        assert list(kd(images, labels)) == ["fcd"]
        assert kd.student_view is not None
        assert torch.equal(seen[0], viewed(kd.student_view, images))
    covered = (seen[0][:, :, 50, 50] == -1).all(dim=1)
    assert 30 < int(covered.sum()) < 90


def test_block_student_view_test() -> None:
    student, (images, _) = Network(), batch()
    names = run("student-view-test", student=student, images=images)
    assert not torch.equal(names["probes"], names["gallery"])
    assert torch.equal(names["gallery"], student.eval()(images))


def test_every_block_has_its_test() -> None:
    names = {f"test_block_{name.replace('-', '_')}" for name in BLOCKS}
    assert names == {name for name in globals() if name.startswith("test_block_")}


def test_the_page_lists_the_views_in_their_order() -> None:
    section = PAGE.read_text(encoding="utf-8").split("### When the student sees it")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert rows == list(declared_options(ViewTable))
