"""In arcface_torch: the factor of the trainer's own loss, no labels, the teacher's accuracy."""

from typing import Any

import pytest

from kdhooks.errors import listed
from kdhooks.guards import WITHOUT_LABELS
from tests.arcface_runs import FCD, NOT_COMPRESSED, attach, described, install, outcome, trained
from tests.standin import Trainer

NOTHING = {**FCD, "weight": 0.0}
FALLING = {"value": 0.25, "initial": 1.0, "start": 1, "warmup": 2}
ROWS = {"name": "margindistillation"}  # a method that needs class rows and labels
GRADIENTS = (
    "first, last = opt.noted = [], []\n"
    "next(raw.parameters()).register_hook(lambda g: first.append(g.flatten().tolist()))\n"
    "module_partial_fc.weight.register_hook(lambda g: last.append(float(g.abs().max())))\n"
)
ASKED = {"first": "opt.noted[0]", "last": "opt.noted[1]"}


def gradients(trainer: Trainer, line: str) -> tuple[list[list[float]], list[float]]:
    """Of a layer of the backbone, and the largest of the head, in each step."""
    (report, *_) = trainer.run(line, before_loop=GRADIENTS, ask=ASKED, **NOT_COMPRESSED)
    assert "error" not in report, report
    return report["extra"]["first"], report["extra"]["last"]


def test_a_factor_of_a_half_halves_each_gradient_exactly(
    one: Trainer, teacher: dict[str, str]
) -> None:
    whole, head = gradients(one, install(teacher, NOTHING))
    half, half_head = gradients(one, install(teacher, NOTHING, task_weight=0.5))
    assert half[0] == [value / 2 for value in whole[0]]
    assert half_head[0] == head[0] / 2 > 0


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_factor_0_leaves_the_head_without_a_gradient(
    request: pytest.FixtureRequest, teacher: dict[str, str], ranks: str
) -> None:
    trainer: Trainer = request.getfixturevalue(ranks)
    backbone, head = gradients(trainer, install(teacher, FCD, task_weight=0))
    assert head == [0.0] * len(head)
    assert any(backbone[0])
    alone, _ = gradients(trainer, install(teacher, NOTHING, task_weight=0))
    assert not any(alone[0])


def test_a_factor_of_1_is_the_plain_run(one: Trainer, teacher: dict[str, str]) -> None:
    assert outcome(one.run(install(teacher, NOTHING, task_weight=1.0))[0]) == outcome(one.run()[0])
    half = install(teacher, NOTHING, task_weight=0.5)
    assert outcome(one.run(half)[0]) != outcome(one.run()[0])


def test_attach_takes_it_too(one: Trainer, teacher: dict[str, str]) -> None:
    (report,) = one.run(after_schedule=attach(teacher, NOTHING, task_weight=0.5), steps=1)
    assert report["losses"][0] == one.run(steps=1)[0]["losses"][0] / 2


def test_the_log_shows_the_trainers_loss_beside_the_sum(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(install(teacher, FCD, task_weight=0.5), steps=2)
    logged = {tag: value for _, tag, value in report["logged"]}
    task, fcd = logged["kdhooks/task/weighted"], logged["kdhooks/fcd/weighted"]
    assert logged["kdhooks/task"] == pytest.approx(2 * task)
    assert task + fcd == pytest.approx(sum(report["losses"]) / 2)
    (report,) = one.run(install(teacher, FCD, task_weight=1.0), steps=2)
    assert not any("task" in tag for _, tag, _ in report["logged"])


def test_several_heads_have_one_factor(one: Trainer, teacher: dict[str, str]) -> None:
    del (without := dict(teacher))["classifier"]
    (plain,) = one.run(heads=2, steps=2)
    (report,) = one.run(install(without, NOTHING, task_weight=0.5), heads=2, steps=2)
    assert report["losses"][0] == plain["losses"][0] / 2
    logged = {tag: value for _, tag, value in report["logged"]}
    assert logged["kdhooks/task/weighted"] == pytest.approx(sum(report["losses"]) / 2)


def test_a_schedule_is_followed_and_resumed(one: Trainer, teacher: dict[str, str]) -> None:
    line = install(teacher, FCD, task_weight=FALLING)
    fixed: dict[str, Any] = {"num_epoch": 2, "steps": 2, "sample_rate": 1.0}
    (straight,) = one.run(line, **fixed)
    (stopped,) = one.run(line, **fixed, before_loop="cfg.num_epoch = 1")
    (resumed,) = one.run(line, **fixed, resume=stopped["output"])
    assert stopped["losses"] + resumed["losses"] == straight["losses"]
    assert resumed["backbone"] == straight["backbone"]
    assert resumed["head"] == straight["head"]
    shares = {step: value for step, tag, value in straight["logged"] if tag == "kdhooks/task"}
    weighted = {s: v for s, tag, v in straight["logged"] if tag == "kdhooks/task/weighted"}
    assert weighted[4] < 0.6 * shares[4]


def test_an_epoch_is_that_of_the_trainers_config(one: Trainer, teacher: dict[str, str]) -> None:
    table = {"value": 0.0, "initial": 1.0, "start": 1, "unit": "epoch"}
    line = install(teacher, NOTHING, task_weight=table)
    (report,) = one.run(line, steps=4, num_image=24, batch_size=12)
    assert [loss > 0 for loss in report["losses"]] == [True, True, False, False]


def test_a_head_that_computes_a_term_has_no_factor_besides(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(install(teacher, "proxylesskd", task_weight=0.5))
    assert report["error"] == "KDHooksError"
    assert report["message"].startswith(
        "task_weight must be 1 if the trainer's own head computes proxylesskd, since "
        "the trainer then has no other loss; found 0.5; give proxylesskd a weight instead"
    )
    own = {"name": "proxylesskd", "head": "own"}
    assert "error" not in one.run(install(teacher, own, task_weight=0.5))[0]


# --- without labels ------------------------------------------------------------------------------


def test_classes_of_other_data_are_not_compared(one: Trainer) -> None:
    """The trainer's labels are dummies; the teacher knows five other people."""
    fewer = described(trained(one, num_classes=5))
    (report,) = one.run(install(fewer, FCD, labels=False))
    assert "error" not in report
    (refused,) = one.run(install(fewer, FCD))
    assert "teacher classifier has 5 classes, the trainer 6" in refused["message"]


def test_methods_that_need_labels_are_refused(one: Trainer, teacher: dict[str, str]) -> None:
    (report,) = one.run(install(teacher, ROWS, FCD, labels=False))
    assert (
        "labels = false, but these terms need the class of each image: margindistillation"
        in report["message"]
    )
    assert f"or use methods that need no labels: {listed(WITHOUT_LABELS)}" in report["message"]


def test_labels_false_is_the_same_run_for_methods_without_labels(
    one: Trainer, teacher: dict[str, str]
) -> None:
    found = [outcome(one.run(install(teacher, FCD, labels=given))[0]) for given in (True, False)]
    assert found[0] == found[1]


# --- the teacher's accuracy ----------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_the_teachers_accuracy_is_in_the_log(
    request: pytest.FixtureRequest, teacher: dict[str, str], ranks: str
) -> None:
    trainer: Trainer = request.getfixturevalue(ranks)
    (report, *_) = trainer.run(install(teacher, ROWS, log_teacher_accuracy=1), steps=4)
    found = [value for _, tag, value in report["logged"] if tag == "kdhooks/teacher/accuracy"]
    assert len(found) == 2
    assert min(found) > 0.8
    (report, *_) = trainer.run(install(teacher, ROWS, log_teacher_accuracy=0), steps=4)
    assert not any("teacher" in tag for _, tag, _ in report["logged"])
