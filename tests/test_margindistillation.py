"""MarginDistillation: margins and loss against their equations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from kdhooks import ClassShard, KDHooksError, Model
from kdhooks.declarations import Step
from kdhooks.testing import check_method
from kdhooks_plugins.margindistillation import MarginDistillation, TeacherMargins
from tests import golden
from tests.compared import whole
from tests.maps import normal
from tests.ranks import Results, group, here, mean_gradients, mine, on_two_ranks
from tests.references import margindistillation as reference
from tests.references.differences import central_differences


def declared(width: int = 6, **options: Any) -> TeacherMargins:
    tap = MarginDistillation(**options).classifier_share(Model(None, width), Model(None, 6))
    assert isinstance(tap.loss, TeacherMargins)
    return tap.loss


def test_gives_the_golden_margins() -> None:
    found = declared().margins(golden.T, golden.Y2, whole(golden.W2))
    assert_close(found.tolist(), [0.5, 0.499791, 0.486769, 0.496316], rtol=0, atol=6e-7)


def test_margins_stay_in_bounds_if_the_teacher_recognises_no_sample() -> None:
    """Every similarity is negative here, for which the plain equation yields up to 2.03."""
    assert declared().margins(golden.T, golden.Y, whole(golden.W)).tolist() == [0.2] * 4


@pytest.mark.parametrize("lowest", [0, -1])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.5), (0.0, 0.3), (0.4, 0.4)])
@pytest.mark.parametrize(("b", "c", "e"), [(1, 2, 3), (6, 3, 4), (5, 7, 2)])
def test_agrees_with_the_equation(
    b: int, c: int, e: int, low: float, high: float, lowest: int
) -> None:
    student, teacher, rows = normal(1, b, e).requires_grad_(), normal(2, b, e), normal(3, c, e)
    labels = torch.randint(lowest, c, (b,), generator=torch.Generator().manual_seed(b))
    value, notes = declared(low=low, high=high, scale=8.0)(student, teacher, labels, whole(rows))
    value.backward()
    t, y, w = teacher.numpy(), labels.numpy(), rows.numpy()

    def by_loop(x: np.ndarray) -> float:
        return reference.loss(x, t, y, w, low, high, 8.0)

    at = student.detach().numpy()
    assert_close(value.item(), by_loop(at))
    margins = reference.margins(t, y, w, low, high)
    assert_close(notes["margin"].item(), sum(margins) / b)
    assert student.grad is not None
    found = central_differences(by_loop, at)
    assert_close(student.grad.numpy(), found, rtol=1e-5, atol=1e-7)


# --- two ranks against one process -----------------------------------------------------------


def _scenarios() -> dict[str, Results]:
    """Run with whole and with split rows; the teacher is most certain on the second rank."""
    return {"whole": _scenario(split=False), "split": _scenario(split=True)}


def _scenario(split: bool) -> Results:
    tap = MarginDistillation(scale=8.0).classifier_share(Model(None, 6), Model(None, 6))
    b, (rank, size), rows = 8, here(), normal(1, 9, 6)
    labels, sure = torch.arange(b), torch.linspace(0.1, 1, b)[:, None]
    teacher = rows[:b] * sure + normal(2, b, 6)
    head = nn.Linear(6, 6).double()
    with torch.no_grad():
        head.weight.copy_(normal(3, 6, 6))
        head.bias.zero_()
    shard = whole(rows)
    if split and size > 1:
        shard = ClassShard(rows.split((5, 4))[rank], 5 * rank, 9, group())
    step = Step(
        student=head(mine(normal(4, b, 6))),
        student_features={},
        teacher=mine(teacher),
        teacher_features={},
        labels=mine(labels),
        parameters={},
        classifier=shard,
        head=None,
    )
    loss, notes = tap.loss(*tap.arguments(step))
    loss.backward()
    means = torch.stack([loss.detach(), notes["margin"]])
    if size > 1:
        dist.all_reduce(means)
    return {"means": means / size, "gradients": mean_gradients(head)}


def test_two_ranks_have_the_margins_of_one_process(tmp_path: Path) -> None:
    alone = _scenarios()
    for found in on_two_ranks(_scenarios, tmp_path):
        for name, expected in alone.items():
            assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_conforms_with_options() -> None:
    check_method(MarginDistillation, low=0.1, high=0.3, scale=32.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.6}, "low must be at most `high`; found 0.6 and 0.5"),
        ({"high": {"value": 0.5, "warmup": 9}}, "low must be at most `high`; found 0.2 and 0.0"),
        ({"low": {"value": 0.6}}, "low must be at most `high`; found 0.6 and 0.5"),
        ({"low": -0.1}, "low must be at least 0 and at most 2 rad; found -0.1"),
        ({"scale": 0.0}, "scale must be above 0; found 0"),
        ({"width": 4}, "as wide as the teacher's rows; found 4 and 6"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=f"margindistillation: .*{message}"):
        declared(**options)


def test_two_schedules_must_not_cross_in_any_step() -> None:
    warmup = {"warmup": 4, "unit": "step"}
    both = declared(low={"value": 0.2, **warmup}, high={"value": 0.5, **warmup})
    crossing = declared(low={"value": 0.4, **warmup}, high=lambda step: 0.25)
    for step in range(3):
        for margin in (both.low, both.high, crossing.low):
            margin.move(step, None)
        both.margins(golden.T, golden.Y, whole(golden.W))
        crossing.margins(golden.T, golden.Y, whole(golden.W))
    crossing.low.move(3, None)
    with pytest.raises(KDHooksError, match=r"low must be at most `high`; found 0\.3.* in a step"):
        crossing.margins(golden.T, golden.Y, whole(golden.W))
