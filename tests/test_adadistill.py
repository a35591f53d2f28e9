"""AdaDistill's centres and loss agree with their equations, on one rank and on two."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from kdhooks import ClassShard, Distiller, KDHooksError, Model, Teacher
from kdhooks.declarations import Step
from kdhooks.testing import TinyFaceNet, check_method, tiny_teacher
from kdhooks_plugins.adadistill import AdaDistill, AdaptiveCentres
from tests import golden
from tests.compared import whole
from tests.maps import normal
from tests.ranks import Results, group, here, mean_gradients, mine, on_two_ranks
from tests.references import adadistill as reference
from tests.references.differences import central_differences

drawn = settings(deadline=None, max_examples=40)
ALPHAS = [0.997599, 0.992380, 0.941135, 0.981498]  # of S2, T, Y2 and the unit rows W2
# The centre of class 0, before normalisation.
CENTRE = [0.488769, 0.542157, 0.509949, 0.397233, 0.221801, 0.011353]


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
    """Batches have several samples of a class, and samples without a label."""
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
        m, m2 = (0.45, 0.0) if margin_type == "arcface" else (0.0, 0.35)
        by_loop = partial(reference.loss, labels=y, centres=centres, m=m, m2=m2, scale=16.0)
        assert_close(value.item(), by_loop(at))
        assert student.grad is not None
        found = central_differences(by_loop, at)
        assert_close(student.grad.numpy(), found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("geometry", "expected", "q"),
    [(0.0, 29.5797356053, 0.1704012988), (0.5, 29.8202291390, 0.2510698437)],
)
def test_gives_the_golden_values_of_the_re_run(geometry: float, expected: float, q: float) -> None:
    """github.com/rayyichen310/adadistill_with_adaface_loss at 4e024731b90d, utils/losses.py:
    AdaptiveAAdaFace(6, 4, s=64, m=0.4, h=0.333, use_geom_margin=geometry > 0, geom_margin_w=1,
    geom_margin_k=geometry), kernel the unit columns of W2, batch_mean 20, batch_std 10, called
    with `student`, T, Y2 and the lengths of `student`; then the cross-entropy of its logits.
    """
    loss = declared(margin_type="adaface", geometry=geometry)
    lengths = loss.margins.lengths
    assert lengths is not None
    lengths.deviation.fill_(10.0)
    student = (golden.S2 + 0.6 * golden.T.flip(1)) * torch.tensor([[5.0], [10], [20], [25]])
    value, notes = loss(student, golden.T, golden.Y2, whole(golden.W2))
    assert_close(value.item(), expected, rtol=0, atol=2e-8)  # all these angles stay within 0 and π
    assert_close(notes["q"].item(), q, rtol=0, atol=6e-11)
    assert_close(lengths.mean.item(), 20.14921324, rtol=0, atol=6e-9)
    assert_close(lengths.deviation.item(), 10.27291724, rtol=0, atol=6e-9)


@pytest.mark.parametrize("lowest", [0, -1])
@pytest.mark.parametrize(("quality", "geometry"), [(0.0, 3.0), (4.0, 0.0), (2.0, 0.7)])
@pytest.mark.parametrize("margin_type", ["arcface", "cosface", "adaface"])
@pytest.mark.parametrize(("b", "c", "e"), [(1, 2, 3), (6, 3, 4), (5, 7, 2)])
def test_margins_of_each_sample_agree_with_the_equations(
    b: int, c: int, e: int, margin_type: str, quality: float, geometry: float, lowest: int
) -> None:
    """Compare three steps; only adaface uses quality."""
    ada = margin_type == "adaface"
    options = {"quality": quality} if ada else {}
    loss = declared(e, e, margin_type=margin_type, m=0.7, geometry=geometry, scale=16.0, **options)
    rows = normal(7, c, e)
    centres, mean, deviation = F.normalize(rows).numpy(), 20.0, 100.0
    for step in range(3):
        student = (20 * normal(10 + step, b, e)).requires_grad_()
        teacher = student.detach() / 20 + 0.8 * normal(20 + step, b, e)
        labels = torch.randint(lowest, c, (b,), generator=torch.Generator().manual_seed(step))
        value, notes = loss(student, teacher, labels, whole(rows))
        value.backward()
        at, t, y = student.detach().numpy(), teacher.numpy(), labels.numpy()
        if ada:
            long = student.detach().norm(dim=1).tolist()
            mean, deviation = reference.estimates(long, mean, deviation)
        by_length = quality if ada else 0.0
        q = reference.scalers(at, t, y, centres, by_length, geometry, mean, deviation)
        centres = reference.followed(at, t, y, centres)
        by_loop = partial(
            reference.loss_of_margins,
            labels=y, centres=centres, margin_type=margin_type, m=0.7, q=q, scale=16.0,
        )  # fmt: skip
        assert_close(value.item(), by_loop(at), rtol=1e-6, atol=1e-6)
        if "q" in notes:
            assert_close(notes["q"].item(), sum(q) / b)
        assert student.grad is not None
        found = central_differences(by_loop, at)
        assert_close(student.grad.numpy(), found, rtol=1e-5, atol=1e-6)


def test_longer_embeddings_have_a_larger_margin_against_the_others() -> None:
    """At a cosine of 0, AdaFace's margin m2 grows from 0 for q = -1 to 2 m for q = 1."""
    margins = declared(3, 3, margin_type="adaface", quality=1.0).margins.eval()
    assert margins.lengths is not None
    margins.lengths.deviation.fill_(10.0)
    student = torch.tensor([[1.0, 0, 0], [20, 0, 0], [60, 0, 0]]).double()
    m, m2, q = margins(student, student, None, student.norm(dim=1))
    assert_close(q.tolist(), [-1.0, 0.0, 1.0])
    assert_close(m.tolist(), [0.4, 0.0, -0.4])
    assert_close(m2.tolist(), [0.0, 0.4, 0.8])


@pytest.mark.parametrize(("along", "grown"), [(1.0, False), (0.2, True)])
def test_a_student_that_lags_behind_its_teacher_has_a_larger_margin(
    along: float, grown: bool
) -> None:
    teacher, rows = torch.eye(2).double()[:1], torch.tensor([[0.8, 0.6]]).double()
    student = torch.tensor([[along, (1 - along**2) ** 0.5]]).double()
    found = [
        declared(2, 2, geometry=k)(student, teacher, torch.tensor([0]), whole(rows))[0].item()
        for k in (0.0, 1.0)
    ]
    assert found[0] == found[1] == 0, "one class costs nothing"
    rows = torch.cat([rows, -rows.flip(1)])
    plain, more = (
        declared(2, 2, geometry=k)(student, teacher, torch.tensor([0]), whole(rows))[0].item()
        for k in (0.0, 1.0)
    )
    assert more > plain if grown else more == plain


def test_without_the_options_no_sample_differs_and_there_is_no_new_state() -> None:
    loss = declared()
    _, notes = loss(golden.S2, golden.T, golden.Y2, whole(golden.W2))
    assert set(notes) == {"cosine", "alpha"}
    assert set(loss.state_dict()) == {"centres", "_extra_state"}
    assert {"margins.lengths.mean", "margins.lengths.deviation"} < set(
        declared(margin_type="adaface").state_dict()
    )


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


def test_a_student_orthogonal_to_the_teacher_moves_the_centre_to_the_teacher() -> None:
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
    resumed.prepare(whole(golden.W2))
    resumed.load_state_dict(straight.state_dict())
    for loss in (straight, resumed):
        loss(golden.S, golden.T, golden.Y, whole(golden.W2))
    assert torch.equal(straight.centres, resumed.centres)
    assert not torch.equal(straight.centres, F.normalize(golden.W2))


@pytest.mark.parametrize(
    "options",
    [
        {"weighted": False},
        {"margin_type": "cosface", "m": 0.2},
        {"margin_type": "adaface", "geometry": 3.0},
        {"geometry": {"value": 3.0, "warmup": 2}},
    ],
)
def test_conforms_with_every_option(options: dict[str, Any]) -> None:
    check_method(AdaDistill, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"margin_type": "sphere"},
            "margin_type must be one of 'arcface', 'cosface', 'adaface'; found 'sphere'",
        ),
        ({"m": -0.1}, "m must be at least 0 and at most 2 rad; found -0.1"),
        ({"scale": -1.0}, "scale must be above 0; found -1.0"),
        ({"geometry": -1.0}, "geometry must be at least 0; found -1.0"),
        ({"margin_type": "adaface", "quality": -1.0}, "quality must be at least 0; found -1.0"),
        ({"quality": 0.3}, "quality belongs to margin_type 'adaface'; found 'arcface'"),
        ({"m": 0, "geometry": 3.0}, "geometry changes the margin m, which is 0; leave it out"),
        ({"m": 0, "margin_type": "adaface", "quality": 0.3}, "quality changes the margin m"),
        ({"width": 4}, "as wide as the teacher's; found 4 and 6; build the student"),
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


def _scenario(whole: bool = False, **options: Any) -> Results:
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    tap = AdaDistill(scale=8.0, **options).classifier_share(Model(None, 4), Model(None, 4))
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
    return {
        "same": {**found, "state": tap.loss.get_submodule("margins").state_dict()},
        "centres": tap.loss.get_buffer("centres"),
    }


_ADA: dict[str, Any] = {"margin_type": "adaface", "quality": 30.0, "geometry": 0.5}


def _scenarios() -> dict[str, Results]:
    return {
        "split": _scenario(),
        "whole": _scenario(whole=True),
        "split_ada": _scenario(**_ADA),
        "whole_ada": _scenario(whole=True, **_ADA),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "options"), [("split", {}), ("split_ada", _ADA)])
def test_classes_split_over_ranks_are_those_of_one_process(
    name: str, options: dict[str, Any], ranks: list[dict[str, Results]]
) -> None:
    alone = _scenario(**options)
    for found in ranks:
        assert_close(found[name]["same"], alone["same"], rtol=1e-9, atol=1e-12)
    centres = torch.cat([found[name]["centres"] for found in ranks])
    assert_close(centres, alone["centres"], rtol=1e-9, atol=1e-12)


def test_estimates_of_lengths_are_those_of_all_ranks(ranks: list[dict[str, Results]]) -> None:
    """This also holds if every rank has all classes and computes the loss of its own batch."""
    expected = _scenario(**_ADA)["same"]["state"]
    assert set(expected) == {"lengths.mean", "lengths.deviation"}
    for found in ranks:
        assert_close(found["whole_ada"]["same"]["state"], expected, rtol=1e-9, atol=1e-12)


def test_ranks_that_hold_all_classes_move_the_same_centres(
    ranks: list[dict[str, Results]],
) -> None:
    """This is the case of DistributedDataParallel without a split classifier."""
    expected = _scenario()["centres"]
    for found in ranks:
        assert_close(found["whole"]["centres"], expected, rtol=1e-9, atol=1e-12)


def test_centres_are_the_teachers_rows_before_the_first_step() -> None:
    """An average of the model's weights (EMA) reads them before the first step."""
    rows = normal(1, 6, 12).float()
    teacher = Teacher(tiny_teacher().module or nn.Identity(), classifier=rows)
    kd = Distiller(TinyFaceNet(), teacher, ["adadistill"], input_shape=(3, 32, 32))
    assert_close(kd.losses["adadistill"].get_buffer("centres"), F.normalize(rows))
