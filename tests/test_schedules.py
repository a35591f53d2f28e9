"""Weights that change over the steps, and their tables in a recipe."""

from typing import Any

import pytest
import torch

from kdhooks import Distiller, KDHooksError
from kdhooks.recipe import Recipe
from kdhooks.schedules import Schedule, number_at, times
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher


@pytest.mark.parametrize(
    ("table", "weights"),
    [
        ({"value": 2.0}, [2, 2, 2, 2, 2, 2]),
        ({"value": 2.0, "start": 2}, [0, 0, 2, 2, 2, 2]),
        ({"value": 2, "stop": 4}, [2, 2, 2, 2, 0, 0]),
        ({"value": 2.0, "warmup": 4}, [0, 0.5, 1, 1.5, 2, 2]),
        ({"value": 2.0, "start": 1, "warmup": 2, "stop": 5}, [0, 0, 1, 2, 2, 0]),
        ({"value": 2.0, "initial": 6.0, "start": 1, "warmup": 2, "stop": 5}, [6, 6, 4, 2, 2, 6]),
    ],
)
def test_weight_by_step(table: dict[str, Any], weights: list[float]) -> None:
    schedule = Schedule.read(table)
    assert [schedule(step) for step in range(6)] == weights


def test_a_recipe_schedules_a_weight() -> None:
    method = {"name": "fcd", "weight": {"value": 4.0, "start": 1, "stop": 2}, "projector": True}
    recipe = Recipe.read({"teacher": torch.flatten, "methods": [method]})
    student, (images, labels) = TinyFaceNet().train(), tiny_batch()
    with Distiller(student, tiny_teacher(), recipe.methods, input_shape=(3, 32, 32)) as kd:
        values, norms = [], []
        for _ in range(3):
            kd.zero_grad()
            student(images)
            term = kd(images, labels)["fcd"]
            values.append(float(term.detach() / kd.metrics["fcd"]))
            term.backward()
            norms.append([p.grad.norm() for p in kd.parameters() if p.grad is not None])
    assert values == pytest.approx([0.0, 4.0, 0.0])
    assert [len(some) for some in norms] == [0, 1, 0]  # weight 0 leaves no gradient
    assert norms[1][0] > 0


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        ({"start": 3}, "fcd: weight needs its option 'value'"),
        ({}, "fcd: weight needs its option 'value'"),
        (
            {"value": 1.0, "warm_up": 3},
            "fcd: weight has no option 'warm_up'; did you mean 'warmup'",
        ),
        ({"value": -1.0}, "fcd: weight.value must be at least 0; found -1"),
        ({"value": "2"}, "fcd: weight.value must be a number; found '2'; write 2"),
        ({"value": 1.0, "start": -1}, "fcd: weight.start must be at least 0; found -1"),
        (
            {"value": 1.0, "stop": 2.5},
            "fcd: weight.stop must be a whole number of steps; found 2.5",
        ),
        ({"value": 1.0, "warmup": True}, "weight.warmup must be a number; found True"),
        (
            {"value": 1.0, "start": 3, "stop": 3},
            "stop must come after start.*found stop 3, start 3",
        ),
        (
            {"value": 1.0, "warmup": 5, "stop": 5},
            "is never reached; found stop 5, start 0, w",
        ),
        (None, "weight must be a number, a table or a function; found None"),
    ],
)
def test_a_wrong_table_is_refused(weight: object, match: str) -> None:
    recipe = {"teacher": torch.flatten, "methods": [{"name": "fcd", "weight": weight}]}
    with pytest.raises(KDHooksError, match=match):
        Distiller(
            TinyFaceNet(), tiny_teacher(), Recipe.read(recipe).methods, input_shape=(3, 32, 32)
        )


def test_an_epoch_has_steps_per_epoch_of_the_distiller() -> None:
    weight = {"value": 4.0, "start": 0.5, "warmup": 1, "stop": 2, "unit": "epoch"}
    schedule = Schedule.read(weight)
    found = [number_at(schedule, step, 4) for step in range(9)]
    assert found == [0, 0, 0, 1, 2, 3, 4, 4, 0]
    kd = Distiller(
        TinyFaceNet(),
        tiny_teacher(),
        [{"name": "fcd", "weight": weight}],
        input_shape=(3, 32, 32),
        steps_per_epoch=4,
    )
    weights = []
    for step in range(9):
        kd.step = step
        weights.append(kd.weight(kd.taps[0]))
    kd.remove()
    assert weights == found


@pytest.mark.parametrize("wrong", [0, -3, 2.0, True, "4"])
def test_a_wrong_number_of_steps_in_an_epoch_is_refused(wrong: Any) -> None:
    with pytest.raises(
        KDHooksError, match=r"Distiller: steps_per_epoch must be (a whole number|at least 1); found"
    ):
        Distiller(TinyFaceNet(), tiny_teacher(), ["fcd"], steps_per_epoch=wrong)


def test_epochs_of_unknown_length_are_refused_in_the_first_step() -> None:
    weight = {"value": 4.0, "warmup": 1, "unit": "epoch"}
    student, (images, labels) = TinyFaceNet().train(), tiny_batch()
    methods = [{"name": "fcd", "weight": weight}]
    with Distiller(student, tiny_teacher(), methods, input_shape=(3, 32, 32)) as kd:
        student(images)
        with pytest.raises(KDHooksError, match=r"counts epochs.*steps_per_epoch=len\(loader\)"):
            kd(images, labels)


def test_a_multiple_of_a_schedule_keeps_its_steps() -> None:
    schedule = Schedule(value=2.0, initial=1.0, warmup=2.0, unit="epoch")
    twice = times(schedule, 2.0)
    assert isinstance(twice, Schedule)
    assert (twice.value, twice.initial, twice.warmup, twice.unit) == (4.0, 2.0, 2.0, "epoch")
    doubled = times(lambda step: step + 1.0, 2.0)
    assert callable(doubled)
    assert doubled(3) == 8.0
    assert times(3.0, 2.0) == 6.0
