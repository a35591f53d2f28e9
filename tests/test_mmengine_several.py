"""Several teachers in MMEngine, by both entry points."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mmengine.runner")

from mmengine.registry import MODELS

from kdhooks import KDHooksError
from kdhooks.teacher.sessions import TeacherSessions
from tests.mmengine_runs import (
    QUIET,
    Recogniser,
    both,
    distilled,
    each_door,
    same,
    students,
    train,
    trained_teacher,
)

pytestmark = QUIET
RESUME = {"type": "kdhooks.ResumeHook"}
PROJECTED = {"name": "fcd", "projector": True}


@pytest.fixture
def teachers(tmp_path: Path) -> list[dict[str, Any]]:
    """Return a module by its config, and a network with its weights and class rows in one file."""
    torch.save(trained_teacher().state_dict(), tmp_path / "teacher.pth")
    second = {
        "network": {"type": "Recogniser", "width": 6},
        "checkpoint": str(tmp_path / "teacher.pth"),
        "input": {"order": "bgr"},
    }
    return [{"module": {"type": "Taught"}}, second]


def test_both_ways_train_the_same(teachers: list[dict[str, Any]], tmp_path: Path) -> None:
    stages = {
        "student": {"stages": ["backbone.layer3", "backbone.layer3"]},
        "teacher": {"stages": ["0.layer3", "1.backbone.layer3"]},
    }
    options = {"teacher": teachers, "methods": [PROJECTED, "sp", "at"], "taps": stages}
    runs = [train(tmp_path / door, **both(door, **options)) for door in ("model", "hook")]
    assert runs[0].logs == runs[1].logs
    assert same(runs[0].state, runs[1].state)
    one = train(tmp_path / "one", **both("model", teacher=teachers[0], methods=["sp"]))
    assert runs[0]["loss_kd_sp"] != one["loss_kd_sp"]


@each_door
def test_weight_zero_is_the_plain_run(
    door: str, teachers: list[dict[str, Any]], tmp_path: Path
) -> None:
    nothing = both(door, teacher=teachers, methods=[{"name": "sp", "weight": 0.0}])
    idle, plain = train(tmp_path / "idle", **nothing), train(tmp_path / "plain")
    assert same(students(idle.state), plain.state)


@each_door
def test_kill_and_resume_equals_the_straight_run(
    door: str, teachers: list[dict[str, Any]], tmp_path: Path, safe_globals: None
) -> None:
    options = both(door, teacher=teachers, methods=[PROJECTED, "sp"])
    options["hooks"] = [*options.get("hooks", []), RESUME]
    straight = train(tmp_path / "straight", **options)
    with pytest.raises(InterruptedError):
        train(tmp_path / "killed", **options, kill=4)
    resumed = train(tmp_path / "killed", **options, resume=True)
    assert same(resumed.state, straight.state)


def test_each_teacher_gets_the_images_that_its_model_expects(
    teachers: list[dict[str, Any]],
) -> None:
    model: Any = MODELS.build(distilled(teacher=teachers, methods=["sp"]))
    session = model.kdhooks.distiller._session
    assert isinstance(session, TeacherSessions)
    first, second = session.teacher.members
    assert (first.transform.order, second.transform.order) == ("rgb", "bgr")  # type: ignore[attr-defined]
    assert (first.embedding, second.embedding) == ("", "backbone")
    assert isinstance(second.module, Recogniser)


def test_a_fault_names_the_teacher(teachers: list[dict[str, Any]]) -> None:
    teachers[1]["classifier"] = "head.weigth"
    with pytest.raises(KDHooksError, match=r"teacher 1: .*did you mean 'head\.weight'"):
        MODELS.build(distilled(teacher=teachers))
    with pytest.raises(
        KDHooksError, match="teacher must be a table that contains the model's config"
    ):
        MODELS.build(distilled(teacher=[teachers[0], {"type": "Taught"}]))


@each_door
def test_a_cache_replaces_the_teacher(door: str, tmp_path: Path) -> None:
    cached = {"module": {"type": "Taught"}, "cache": str(tmp_path / "cache")}
    filling = train(tmp_path / "filling", **both(door, teacher=cached))
    alone = {"embeddings": str(tmp_path / "cache")}
    repeating = train(tmp_path / "repeating", **both(door, teacher=alone))
    assert repeating.logs == filling.logs
    assert same(repeating.state, filling.state)
    for path in (tmp_path / "cache").glob("*.keys"):
        path.unlink()
    with pytest.raises(KDHooksError, match="8 of 8 images of this batch are missing"):
        train(tmp_path / "empty", **both(door, teacher=alone))
