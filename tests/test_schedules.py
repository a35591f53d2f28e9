"""A weight by steps, in a recipe."""

from typing import Any

import pytest
import torch

from kdhooks import Distiller, KDHooksError
from kdhooks.recipe import Recipe
from kdhooks.schedules import Schedule
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher


@pytest.mark.parametrize(
    ("table", "weights"),
    [
        ({"value": 2.0}, [2, 2, 2, 2, 2, 2]),
        ({"value": 2.0, "start": 2}, [0, 0, 2, 2, 2, 2]),
        ({"value": 2, "stop": 4}, [2, 2, 2, 2, 0, 0]),
        ({"value": 2.0, "warmup": 4}, [0, 0.5, 1, 1.5, 2, 2]),
        ({"value": 2.0, "start": 1, "warmup": 2, "stop": 5}, [0, 0, 1, 2, 2, 0]),
    ],
)
def test_weight_by_step(table: dict[str, Any], weights: list[float]) -> None:
    schedule = Schedule.read("fcd", table)
    assert [schedule(step) for step in range(6)] == weights


def test_a_recipe_says_when() -> None:
    method = {"name": "fcd", "weight": {"value": 4.0, "start": 1, "stop": 2}, "projector": True}
    recipe = Recipe.read({"teacher": torch.flatten, "methods": [method]})
    student, (images, labels) = TinyFaceNet().train(), tiny_batch()
    with Distiller(student, tiny_teacher(), recipe.methods, input_shape=(3, 32, 32)) as kd:
        values, norms = [], []
        for _ in range(3):
            student(images)
            term = kd(images, labels)["fcd"]
            values.append(float(term.detach() / kd.metrics["fcd"]))
            kd.zero_grad()
            term.backward()
            norms.append([p.grad.norm() for p in kd.parameters() if p.grad is not None])
    assert values == pytest.approx([0.0, 4.0, 0.0])
    assert [len(some) for some in norms] == [1, 1, 1]  # the graph is the same in every step
    assert [bool(some[0] > 0) for some in norms] == [False, True, False]


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        ({"start": 3}, "fcd: weight needs 'value'; found start"),
        ({}, "fcd: weight needs 'value'; found none"),
        ({"value": 1.0, "warm_up": 3}, "no key 'warm_up'; did you mean 'warmup'. its keys are: v"),
        ({"value": -1.0}, "fcd: weight.value: weight must be finite and at least 0; found -1"),
        ({"value": "2"}, "fcd: weight.value: weight must be a number.*found '2'"),
        ({"value": 1.0, "start": -1}, "fcd: weight.start must be a number of steps.*found -1"),
        ({"value": 1.0, "stop": 2.5}, "fcd: weight.stop must be a number of steps.*found 2.5"),
        ({"value": 1.0, "warmup": True}, "weight.warmup must be a number of steps.*found True"),
        (
            {"value": 1.0, "start": 3, "stop": 3},
            "stop must come after start.*found stop 3, start 3",
        ),
        (
            {"value": 1.0, "warmup": 5, "stop": 5},
            "never gets to its value; found stop 5, start 0, w",
        ),
        (None, "a function of the step, or in a recipe a table; found None"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(weight: object, match: str) -> None:
    recipe = {"teacher": torch.flatten, "methods": [{"name": "fcd", "weight": weight}]}
    with pytest.raises(KDHooksError, match=match):
        Distiller(
            TinyFaceNet(), tiny_teacher(), Recipe.read(recipe).methods, input_shape=(3, 32, 32)
        )
