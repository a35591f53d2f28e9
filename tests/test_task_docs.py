"""docs/teachers-and-views.md on labels, the trainer's own loss and the teacher's accuracy."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdhooks.recipe import Recipe
from kdhooks.schedules import number_at
from kdhooks.testing import tiny_batch
from tests.small_distiller import student, teacher_network

TEXT = (Path(__file__).parents[1] / "docs" / "teachers-and-views.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(
    re.findall(r"^```\w+ ([\w-]+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
)


def recipe(block: str) -> Recipe:
    return Recipe.read(tomllib.loads(BLOCKS[block]))


def test_the_recipes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work_dirs" / "ms1mv3_r100"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_text("weights")
    monkeypatch.chdir(tmp_path)
    assert not recipe("no-labels").labels
    assert recipe("teacher-accuracy").log_teacher_accuracy == 10
    factor = recipe("task-weight").task_weight
    assert [number_at(factor, step, 10) for step in (0, 9, 20, 30, 99)] == [
        1.0, 1.0, pytest.approx(0.55), 0.1, 0.1,
    ]  # fmt: skip


def scope() -> dict[str, Any]:
    """Return the names of a loop; its images have a Distiller's default size."""
    images, labels = tiny_batch()
    images = F.interpolate(images, 112)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(32), student())
    module = teacher_network()
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(32), module)
    head = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    return {
        "torch": torch,
        "student": net,
        "teacher": teacher,
        "unlabelled": [images] * 3,
        "loader": [(images, labels)] * 3,
        "criterion": lambda embedding, labels: F.cross_entropy(embedding @ head.T, labels),
    }


@pytest.mark.parametrize("block", ["no-labels-loop", "task-weight-loop"])
def test_the_loops_run(block: str) -> None:
    names = scope()
    before = names["student"][1].fc.weight.detach().clone()
    exec(BLOCKS[block], names)
    assert names["kd"].step == 3
    assert not torch.equal(names["student"][1].fc.weight, before)


def test_a_loop_that_omits_the_factor_is_refused() -> None:
    """This shows that the loop of the page uses the factor."""
    forgetful = BLOCKS["task-weight-loop"].replace("kd.task_weight * ", "")
    with pytest.raises(Exception, match="task_weight is a schedule, but the loop has never read"):
        exec(forgetful, scope())


def test_every_block_is_one_of_these() -> None:
    loops = {name for name, text in BLOCKS.items() if "import" in text}
    tables = {"no-labels", "task-weight", "teacher-accuracy"}
    assert {"no-labels-loop", "task-weight-loop"} <= loops
    assert tables <= BLOCKS.keys() - loops
