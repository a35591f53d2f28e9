"""MMEngine, by both entry points: runs without labels, and a factor of the student's own losses."""

import copy
import itertools
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from kdhooks import KDHooksError
from kdhooks.testing import tiny_batch, tiny_teacher

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.registry import DATASETS, MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor

from kdhooks_integrations.mmengine.student import _times
from tests.mmengine_runs import (
    FCD,
    QUIET,
    STUDENT,
    Recogniser,
    both,
    each_door,
    each_runner,
    made,
    same,
    students,
    train,
)

pytestmark = QUIET

NOTHING = {**FCD, "weight": 0.0}
FALLING = {"value": 0.25, "initial": 1.0, "start": 1, "warmup": 2}
FACTORS = [1.0, 1.0, 0.625, 0.25, 0.25, 0.25]


def with_rows(folder: Path) -> dict[str, Any]:
    """Return a teacher with class rows, and a method that needs them and labels."""
    rows, file = tiny_teacher().classifier, folder / "rows.pt"
    assert rows is not None
    torch.save(rows.slice(0, rows.total), file)
    teacher = {"module": {"type": "Taught"}, "classifier": str(file)}
    return {"teacher": teacher, "methods": ["margindistillation"]}


# --- without labels ------------------------------------------------------------------------------


@MODELS.register_module()
class Unlabelled(Recogniser):
    """Has no loss of its own, because its data samples have no labels."""

    def forward(  # type: ignore[override]
        self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = "tensor"
    ) -> Any:
        if mode == "loss":
            assert data_samples is None or not any("gt_label" in one for one in data_samples)
            self.backbone(inputs)
            return {}
        return super().forward(inputs, mode=mode)


def UnlabelledFaces() -> list[dict[str, Any]]:
    images, _ = tiny_batch(copies=4)
    return [{"inputs": image, "data_samples": BaseDataElement()} for image in images]


DATASETS.register_module("UnlabelledFaces", module=UnlabelledFaces)  # pyright: ignore[reportArgumentType]
LOADER = {
    "dataset": {"type": "UnlabelledFaces"},
    "batch_size": 8,
    "sampler": {"type": "DefaultSampler", "shuffle": True},
    "collate_fn": {"type": "pseudo_collate"},
}


def unlabelled(door: str, folder: Path, **changes: Any) -> Any:
    student = {"type": "Unlabelled", "data_preprocessor": {"type": "ImgDataPreprocessor"}}
    options = both(door, student=student, **changes)
    return made(folder, train_dataloader=LOADER, **options)


@each_door
@pytest.mark.parametrize("labels", [{"labels": False}, {}])
def test_data_without_labels_trains_only_on_the_terms(
    tmp_path: Path, door: str, labels: dict[str, bool]
) -> None:
    runner = unlabelled(door, tmp_path, methods=["fcd", "rkd"], **labels)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    runner.train()
    (spy,) = (hook for hook in runner.hooks if type(hook).__name__ == "Spy")
    assert len(spy.logs) == 6
    for log in spy.logs:
        assert log["loss"] == pytest.approx(log["loss_kd_fcd"] + log["loss_kd_rkd"])
    assert not same(students(before), students(runner.model.state_dict()))


@each_door
def test_a_method_that_needs_labels_is_refused_with_the_key_at_construction(
    tmp_path: Path, door: str
) -> None:
    needing = with_rows(tmp_path)
    with pytest.raises(KDHooksError, match="need the class of each image: margindistillation"):
        unlabelled(door, tmp_path, labels=False, **needing).train()
    with pytest.raises(
        KDHooksError,
        match=r"labels must be one class number for each of 8 images, .*, or, if there are none, "
        r"set labels = False and use methods that need no labels",
    ):
        unlabelled(door, tmp_path, **needing).train()


def test_labels_are_not_passed_on_with_labels_false(tmp_path: Path) -> None:
    """They are not looked up either: `False` names no place in the data."""
    run = train(tmp_path, **both("model", labels=False))
    distiller: Any = run.model.get_submodule("kdhooks.distiller")
    assert distiller.labelled == []
    assert run.logs == train(tmp_path, **both("model")).logs


# --- the weight of the student's own losses ------------------------------------------------------


def test_the_task_losses_are_those_that_mmengine_adds_up() -> None:
    x = torch.tensor(3.0)
    given = {"loss_cls": x, "aux_loss": [x, 2 * x], "acc": x, "lossless": 3}
    assert _times(given, 1) is given
    found = _times(given, 0.5)
    assert found == {"loss_cls": x / 2, "aux_loss": [x / 2, x], "acc": x, "lossless": 3}
    assert given["loss_cls"] is x


def test_the_gradients_of_all_task_losses_are_compared_with_the_terms(tmp_path: Path) -> None:
    runner = made(tmp_path, **both("model"))
    model = runner.model.train()
    (batch,) = itertools.islice(runner.build_dataloader(runner.cfg.train_dataloader), 1)
    losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
    found = model.kdhooks.compare_gradients(losses)
    assert list(found.terms) == ["fcd"]
    twice = model.kdhooks.compare_gradients({**losses, "aux_loss": [losses["loss_cls"]]})
    assert twice.task.gradient == pytest.approx(2 * found.task.gradient)
    evaluated = model.eval()(**model.data_preprocessor(batch, training=True), mode="loss")
    given: Any
    for given in (evaluated, {}, model.parse_losses(losses)):
        with pytest.raises(KDHooksError, match="needs a dict of losses with loss_kd_fcd; found"):
            model.kdhooks.compare_gradients(given)


@each_door
def test_the_log_shows_the_task_times_its_factor(tmp_path: Path, door: str) -> None:
    whole = train(tmp_path / "whole", **both(door))
    half = train(tmp_path / "half", **both(door, task_weight=0.5))
    assert half["loss_cls"][0] == whole["loss_cls"][0] / 2
    assert half["loss_kd_fcd"][0] == whole["loss_kd_fcd"][0]
    for log in half.logs:
        assert log["loss"] == pytest.approx(log["loss_cls"] + log["loss_kd_fcd"])


@each_door
def test_a_factor_of_1_is_the_run_without_the_key(tmp_path: Path, door: str) -> None:
    plain = train(tmp_path / "plain", model=STUDENT)
    run = train(tmp_path / "one", **both(door, methods=[NOTHING], task_weight=1.0))
    assert same(students(run.state), plain.state)
    other = train(tmp_path / "half", **both(door, methods=[NOTHING], task_weight=0.5))
    assert not same(students(other.state), plain.state)


@each_door
def test_factor_0_leaves_the_head_as_it_is(tmp_path: Path, door: str) -> None:
    head, backbone = "head.weight", "backbone.fc.weight"
    start = made(tmp_path / "start", **both(door, task_weight=0.0)).model.state_dict()
    run = train(tmp_path / "run", **both(door, task_weight=0.0))
    plain = train(tmp_path / "plain", **both(door))
    assert torch.equal(run.state[head], start[head])
    assert not torch.equal(plain.state[head], start[head])
    assert run["loss_cls"] == [0.0] * 6
    assert not torch.equal(run.state[backbone], plain.state[backbone])


@each_door
@each_runner
def test_a_schedule_is_followed_and_resumed(
    tmp_path: Path, safe_globals: None, door: str, kind: str
) -> None:
    options = both(door, task_weight=FALLING, methods=[NOTHING])
    options["hooks"] = [*options.get("hooks", []), {"type": "kdhooks.ResumeHook"}]
    straight = train(tmp_path / "straight", kind, **options)
    with pytest.raises(InterruptedError):
        made(tmp_path / "killed", kind, **copy.deepcopy(options), kill=4).train()
    resumed = train(tmp_path / "killed", kind, **copy.deepcopy(options), resume=True)
    assert resumed.logs == straight.logs[3:]
    assert same(resumed.state, straight.state)


def test_a_schedules_factors_are_those_of_its_steps(tmp_path: Path) -> None:
    run = train(tmp_path, **both("model", task_weight=FALLING, methods=[NOTHING]))
    distiller: Any = run.model.get_submodule("kdhooks.distiller")
    distiller.step = 0
    assert [distiller._task_weight.at(step, None) for step in range(6)] == FACTORS
    whole = train(tmp_path / "whole", **both("model", methods=[NOTHING]))
    assert run["loss_cls"][:2] == whole["loss_cls"][:2]
    assert run["loss_cls"][2] == pytest.approx(whole["loss_cls"][2] * 0.625, rel=1e-6)


def test_the_task_weight_counts_the_runners_epochs(tmp_path: Path) -> None:
    table = {"value": 0.0, "initial": 1.0, "start": 1, "unit": "epoch"}
    run = train(tmp_path, **both("model", task_weight=table))
    assert [loss > 0 for loss in run["loss_cls"]] == [True] * 3 + [False] * 3


def test_the_teachers_accuracy_is_in_the_log(tmp_path: Path) -> None:
    run = train(tmp_path, **both("model", **with_rows(tmp_path), log_teacher_accuracy=2))
    assert ["kd/teacher/accuracy" in log for log in run.logs] == [True, False] * 3
    assert run.logs[0]["kd/teacher/accuracy"] > 0.9
