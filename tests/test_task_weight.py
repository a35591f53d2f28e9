"""The factor of the trainer's own loss, in a loop of one's own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import kdhooks
from kdhooks import Distiller, KDHooksError, Schedule
from kdhooks.schedules import Scheduled
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.ranks import Results, here, on_two_ranks
from tests.small_distiller import SMALL, Method, distil, student

FALLING: dict[str, Any] = {"value": 0.25, "initial": 1.0, "start": 1, "warmup": 2}
FACTORS = [1.0, 1.0, 0.625, 0.25, 0.25]  # of its first steps


class Loop:
    """A training loop: the student, a head of its own, and the terms."""

    def __init__(self, task_weight: Scheduled = 1.0, weight: float = 0.0, **options: Any) -> None:
        self.student = student()
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            self.head = nn.Linear(12, 6, bias=False)
        self.kd = distil(
            Method(weight=weight), net=self.student, task_weight=task_weight, **options
        )
        self.parameters = [*self.student.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def backward(self) -> list[Tensor]:
        """The gradients of one batch."""
        images, labels = tiny_batch()
        task = nn.functional.cross_entropy(self.head(self.student(images)), labels)
        terms = self.kd(images, labels)
        self.optimizer.zero_grad()
        sum(terms.values(), start=self.kd.task_weight * task).backward()
        return [p.grad.clone() for p in self.parameters if p.grad is not None]

    def steps(self, number: int) -> "Loop":
        for _ in range(number):
            self.backward()
            self.optimizer.step()
        return self

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]


def plain_gradients() -> list[Tensor]:
    """Without kdhooks."""
    loop = Loop()
    loop.kd.remove()
    images, labels = tiny_batch()
    nn.functional.cross_entropy(loop.head(loop.student(images)), labels).backward()
    return [p.grad for p in loop.parameters if p.grad is not None]


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.25])
def test_a_power_of_two_scales_the_gradient_exactly(factor: float) -> None:
    found = Loop(factor).backward()
    assert_close(found, [factor * g for g in plain_gradients()], rtol=0, atol=0)


def test_factor_0_leaves_gradients_of_zero_and_no_nan() -> None:
    loop = Loop(0.0)
    gradients = loop.backward()
    assert len(gradients) == len(loop.parameters)
    assert not any(g.any() for g in gradients)
    loop.steps(3)
    assert all(torch.isfinite(w).all() for w in loop.weights)


def test_factor_0_trains_the_student_by_the_terms_alone() -> None:
    loop = Loop(0.0, weight=1.0)
    *backbone, head = loop.backward()
    assert not head.any()
    assert any(g.any() for g in backbone)


@pytest.mark.parametrize("before", [True, False])
def test_a_schedule_has_one_value_in_a_step_before_and_after_kd(before: bool) -> None:
    kd = distil(Method(), net=(net := student()), task_weight=Schedule(**FALLING))
    images, labels = tiny_batch()
    found = []
    for _ in FACTORS:
        net(images)
        factor = kd.task_weight
        terms = kd(images, labels)
        found.append(factor if before else kd.task_weight)
        assert len(terms) == 1
    assert found == FACTORS


@pytest.mark.parametrize(
    "value",
    [FALLING, Schedule(**FALLING), lambda step: FACTORS[step]],
    ids=["table", "schedule", "function"],
)
def test_a_table_a_schedule_and_a_function_are_the_same(value: Any) -> None:
    assert_close(Loop(value).steps(5).weights, Loop(Schedule(**FALLING)).steps(5).weights)
    assert not torch.equal(Loop(value).steps(5).weights[-1], Loop().steps(5).weights[-1])


def test_a_resumed_run_continues_the_schedule() -> None:
    straight = Loop(Schedule(**FALLING), weight=1.0).steps(5)
    first = Loop(Schedule(**FALLING), weight=1.0).steps(2)
    second = Loop(Schedule(**FALLING), weight=1.0)
    for part in ("student", "head", "kd", "optimizer"):
        getattr(second, part).load_state_dict(getattr(first, part).state_dict())
    second.steps(3)
    assert_close(second.weights, straight.weights, rtol=0, atol=0)


def test_a_schedule_in_epochs_needs_their_length() -> None:
    table: dict[str, Any] = {"value": 0.5, "start": 1, "unit": "epoch"}
    loop = Loop(Schedule(**table))
    assert loop.kd.in_epochs == ["task_weight"]
    with pytest.raises(KDHooksError, match="a schedule counts epochs, and the number of steps in"):
        loop.backward()
    loop = Loop(Schedule(**table), steps_per_epoch=2)
    images, labels = tiny_batch()
    found = []
    for _ in range(4):
        loop.student(images)
        loop.kd(images, labels)
        found.append(loop.kd.task_weight)
    assert found == [0, 0, 0.5, 0.5]


def test_a_recipe_has_it() -> None:
    teacher = tiny_teacher().module
    recipe = {
        "teacher": teacher,
        "methods": ["fcd"],
        "input_shape": list(SMALL),
        "task_weight": FALLING,
    }
    kd = kdhooks.build(recipe, student())
    assert kd.task_weight == 1.0
    with pytest.raises(KDHooksError, match=r"recipe: task_weight must be at least 0; found -1"):
        kdhooks.build({**recipe, "task_weight": -1}, student())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (-0.5, "Distiller: task_weight must be at least 0; found -0.5"),
        (float("nan"), "Distiller: task_weight must be finite; found nan"),
        ("0.5", "task_weight must be a number, a table or a function; found '0.5'; write 0.5, wi"),
        (True, "task_weight must be a number, a table or a function; found True"),
        ({"value": -1.0}, r"Distiller: task_weight\.value must be at least 0; found -1"),
        ({"valeu": 1.0}, r"task_weight has no option 'valeu'; did you mean 'value'\?"),
    ],
)
def test_a_wrong_factor_is_refused_at_construction(wrong: Any, match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        Loop(wrong)


@pytest.mark.parametrize(("wrong", "match"), [(-1.0, "at least 0; found -1"), ("x", "found 'x'")])
def test_a_function_is_checked_in_each_step(wrong: Any, match: str) -> None:
    loop = Loop(lambda step: 1.0 if step < 1 else wrong)
    loop.backward()
    with pytest.raises(KDHooksError, match=f"task_weight, step 1: weight must be .*{match}"):
        loop.backward()


def forgetful(task_weight: Scheduled) -> Callable[[], None]:
    """A loop that never asks for the factor, and takes three steps."""
    loop = Loop(task_weight)

    def run() -> None:
        images, labels = tiny_batch()
        for _ in range(3):
            task = nn.functional.cross_entropy(loop.head(loop.student(images)), labels)
            sum(loop.kd(images, labels).values(), start=task).backward()
            loop.optimizer.step()

    return run


@pytest.mark.parametrize(
    ("factor", "shown"),
    [(0.5, "0.5"), (Schedule(**FALLING), "a schedule"), (lambda step: 0.5, "a function")],
)
def test_a_factor_that_the_loop_never_reads_is_refused(factor: Any, shown: str) -> None:
    with pytest.raises(KDHooksError, match=f"task_weight is {shown}, but the loop has never read"):
        forgetful(factor)()


def test_a_factor_of_1_need_not_be_read() -> None:
    forgetful(1.0)()


def test_a_host_head_that_computes_the_term_leaves_no_other_loss() -> None:
    def inheriting(task_weight: Scheduled) -> Distiller:
        return Distiller(
            TinyFaceNet(),
            tiny_teacher(),
            ["proxylesskd"],
            host_head="margin",
            input_shape=SMALL,
            task_weight=task_weight,
        )

    with pytest.raises(KDHooksError, match=r"task_weight must be 1 if the trainer's own head comp"):
        inheriting(0.5)
    with pytest.raises(
        KDHooksError,
        match=r"computes proxylesskd, .*; found a schedule; give proxylesskd a weight instead, or "
        r"set its head = 'own'",
    ):
        inheriting(Schedule(value=1.0))
    assert inheriting(1.0).inherited is not None


@pytest.mark.parametrize("name", ["task", "teacher"])
def test_a_term_has_no_name_of_kdhooks_own(name: str) -> None:
    with pytest.raises(KDHooksError, match=f"one that kdhooks itself logs; found '{name}'; choose"):
        Method(name)


def test_a_copy_keeps_its_factor() -> None:
    kd = copy.deepcopy(Loop(Schedule(**FALLING)).kd)
    assert kd.task_weight == 1.0


def _differing() -> dict[str, Results]:
    rank, _ = here()
    try:
        Loop(0.5 + rank).backward()
    except KDHooksError as error:
        return {"said": {"error": str(error)}}
    return {"said": {"error": ""}}


def test_ranks_with_different_factors_are_refused(tmp_path: Any) -> None:
    for rank in on_two_ranks(_differing, tmp_path):
        said = rank["said"]["error"]
        assert "only rank 0 has: task_weight 0.5; only rank 1 has: task_weight 1.5" in said
