"""AdaDistill: centres and loss against their equations, on one rank and on two."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import ClassShard, Distiller, KDHooksError, Model, Teacher
from kdhooks.declarations import Step
from kdhooks.testing import TinyFaceNet, check_method, tiny_teacher
from kdhooks_plugins.adadistill import AdaDistill, AdaptiveCentres
from tests import golden
from tests.ranks import Results, group, here, mean_gradients, mine, on_two_ranks
from tests.references import adadistill as reference
from tests.references.differences import central_differences

drawn = settings(deadline=None, max_examples=40)
ALPHAS = [0.997599, 0.992380, 0.941135, 0.981498]  # of S2, T, Y2 and the unit rows W2
CENTRE = [0.488769, 0.542157, 0.509949, 0.397233, 0.221801, 0.011353]  # 0, before it is unit length


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def whole(rows: Tensor) -> ClassShard:
    return ClassShard(rows, 0, len(rows))


def declared(width: int = 6, rows: int = 6, **options: Any) -> AdaptiveCentres:
    tap = AdaDistill(**options).classifier_share(Model(None, width), Model(None, rows))
    assert isinstance(tap.loss, AdaptiveCentres)
    return tap.loss.double()


def test_gives_the_golden_values() -> None:
    loss = declared()
    value, notes = loss(golden.S2, golden.T, golden.Y2, whole(golden.W2))
    assert_close(value.item(), 0.05923116, rtol=0, atol=6e-9)
    assert_close(notes["alpha"].item(), sum(ALPHAS) / 4, rtol=0, atol=1e-6)
    expected = F.normalize(torch.tensor(CENTRE, dtype=torch.float64), dim=0)
    assert_close(loss.centres[0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("lowest", [0, -1])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("margin_type", ["arcface", "cosface"])
@pytest.mark.parametrize(("b", "c", "e"), [(1, 2, 3), (6, 3, 4), (5, 7, 2)])
def test_three_steps_agree_with_the_equations(
    b: int, c: int, e: int, margin_type: str, weighted: bool, lowest: int
) -> None:
    """With several samples of a class, and samples without a label."""
    loss = declared(e, e, margin_type=margin_type, weighted=weighted, scale=16.0)
    rows = 3 * normal(7, c, e)
    centres = F.normalize(rows).numpy()
    for step in range(3):
        student = normal(10 + step, b, e).requires_grad_()
        teacher = student.detach() + 0.4 * normal(20 + step, b, e)
        labels = torch.randint(lowest, c, (b,), generator=torch.Generator().manual_seed(step))
        value, _ = loss(student, teacher, labels, whole(rows))
        value.backward()
        at, y = student.detach().numpy(), labels.numpy()
        centres = reference.followed(at, teacher.numpy(), y, centres, weighted)
        assert_close(loss.centres.numpy(), centres)
        by_loop = partial(
            reference.loss, labels=y, centres=centres, m=loss.m.now, m2=loss.m2.now, scale=16.0
        )
        assert_close(value.item(), by_loop(at))
        assert student.grad is not None
        found = central_differences(by_loop, at)
        assert_close(student.grad.numpy(), found, rtol=1e-5, atol=1e-7)


@drawn
@given(st.integers(1, 6), st.integers(2, 5), st.integers(2, 5), st.integers(0, 2**16))
def test_the_order_of_the_batch_moves_no_centre(b: int, c: int, e: int, seed: int) -> None:
    student, teacher = normal(seed, b, e), normal(seed + 1, b, e)
    labels = torch.randint(c, (b,), generator=torch.Generator().manual_seed(seed))
    rows, ours, theirs = whole(normal(seed + 2, c, e)), declared(e, e), declared(e, e)
    value, _ = ours(student, teacher, labels, rows)
    flipped, _ = theirs(student.flip(0), teacher.flip(0), labels.flip(0), rows)
    assert_close(value, flipped)
    assert_close(ours.centres, theirs.centres)
    assert_close(ours.centres.norm(dim=1), torch.ones(c, dtype=torch.float64))


def test_a_student_that_knows_nothing_makes_the_centre_the_teachers_embedding() -> None:
    student, teacher = (
        torch.eye(3, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64).roll(1, 0),
    )
    loss = declared(3, 3)
    loss(student, teacher, torch.tensor([0, 1, 2]), whole(normal(0, 3, 3)))
    assert_close(loss.centres, teacher, rtol=0, atol=1e-5)


def test_an_evaluation_pass_moves_nothing() -> None:
    loss = declared()
    loss(golden.S2, golden.T, golden.Y2, whole(golden.W2))
    before = loss.centres.clone()
    loss.eval()
    loss(golden.S, golden.T, golden.Y, whole(golden.W2))
    assert torch.equal(loss.centres, before)


def test_centres_go_on_from_the_state_dict() -> None:
    straight, resumed = declared(), declared()
    straight(golden.S2, golden.T, golden.Y2, whole(golden.W2))
    resumed.load_state_dict(straight.state_dict())
    for loss in (straight, resumed):
        loss(golden.S, golden.T, golden.Y, whole(golden.W2))
    assert torch.equal(straight.centres, resumed.centres)
    assert not torch.equal(straight.centres, F.normalize(golden.W2))


@pytest.mark.parametrize("options", [{"weighted": False}, {"margin_type": "cosface", "m": 0.2}])
def test_conforms_with_every_option(options: dict[str, Any]) -> None:
    check_method(AdaDistill, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"margin_type": "sphere"},
            "margin_type must be one of 'arcface', 'cosface'; found 'sphere'",
        ),
        ({"m": -0.1}, "m must be at least 0 and at most 3.14159 rad; found -0.1"),
        ({"scale": -1.0}, "scale must be above 0; found -1.0"),
        ({"width": 4}, "as wide as the teacher's; found 4 and 6; give the student"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=f"adadistill: .*{message}"):
        declared(**options)


# --- two ranks against one process -----------------------------------------------------------

_CLASSES, _SPLIT = 7, (4, 3)


def _shard(whole: bool) -> ClassShard:
    rank, size = here()
    if whole:
        return ClassShard(normal(25, _CLASSES, 4), 0, _CLASSES)
    split = _SPLIT if size == 2 else (_CLASSES,)
    part = normal(25, _CLASSES, 4).split(split)[rank]
    return ClassShard(part, sum(split[:rank]), _CLASSES, group())


def _scenario(whole: bool = False) -> Results:
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    tap = AdaDistill(scale=8.0).classifier_share(Model(None, 4), Model(None, 4))
    tap.loss.double()
    found: Results = {}
    for step in range(2):
        student.zero_grad()
        seen = Step(
            student=student(mine(normal(30 + step, 8, 5))),
            student_features={},
            teacher=mine(normal(40 + step, 8, 4)),
            teacher_features={},
            labels=mine(torch.tensor([0, 6, 3, 4, 6, -1, 5, 3])),
            parameters={},
            classifier=_shard(whole),
            head=None,
        )
        loss, notes = tap.loss(*tap.arguments(seen))
        loss.backward()
        found = {"loss": loss.detach(), "notes": notes, "gradients": mean_gradients(student)}
    return {"same": found, "centres": tap.loss.get_buffer("centres")}


def _scenarios() -> dict[str, Results]:
    return {"split": _scenario(), "whole": _scenario(whole=True)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("ranks"))


def test_classes_split_over_ranks_are_those_of_one_process(
    ranks: list[dict[str, Results]],
) -> None:
    alone = _scenario()
    for found in ranks:
        assert_close(found["split"]["same"], alone["same"], rtol=1e-9, atol=1e-12)
    centres = torch.cat([found["split"]["centres"] for found in ranks])
    assert_close(centres, alone["centres"], rtol=1e-9, atol=1e-12)


def test_ranks_that_hold_all_classes_move_the_same_centres(
    ranks: list[dict[str, Results]],
) -> None:
    """As in a DistributedDataParallel without a classifier that is split."""
    expected = _scenario()["centres"]
    for found in ranks:
        assert_close(found["whole"]["centres"], expected, rtol=1e-9, atol=1e-12)


def test_centres_are_the_teachers_rows_before_the_first_step() -> None:
    """An average of the model's weights (EMA), for one, needs them to be there."""
    rows = normal(1, 6, 12).float()
    teacher = Teacher(tiny_teacher().module or nn.Identity(), classifier=rows)
    kd = Distiller(TinyFaceNet(), teacher, ["adadistill"], input_shape=(3, 32, 32))
    assert_close(kd.losses["adadistill"].get_buffer("centres"), F.normalize(rows))
