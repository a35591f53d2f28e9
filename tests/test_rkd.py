"""RKD: distances and angles agree with their equations, in chunks or not, on one rank or two."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks.testing import check_method
from kdhooks_plugins import rkd
from kdhooks_plugins.rkd import RKD
from tests import golden
from tests.maps import normal
from tests.ranks import Results, mean_gradients, mine, on_two_ranks
from tests.references import rkd as reference
from tests.references.differences import central_differences

drawn = settings(deadline=None, max_examples=40)
sizes = st.tuples(st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**16))  # b, d, seed
TERMS: list[dict[str, float]] = [
    {},
    {"distance_weight": 1.0, "angle_weight": 0.0},
    {"distance_weight": 0.0, "angle_weight": 1.0},
    {"distance_weight": 2.0, "angle_weight": 3.0},
]


def made(**options: object) -> nn.Module:
    return RKD(**options).embedding_tap().loss  # type: ignore[arg-type]  # this file's tables


def any_labels(b: int) -> Tensor:
    return torch.zeros(b, dtype=torch.long)


def rotation(seed: int, d: int) -> Tensor:
    q: Tensor = torch.linalg.qr(normal(seed, d, d))[0]
    return q


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def test_gives_the_golden_values() -> None:
    value, notes = made()(golden.S, golden.T, golden.Y)
    s, t = golden.S.numpy(), golden.T.numpy()
    found = {
        "distance": (notes["distance"], reference.distance_loss(s, t), 0.02184458),
        "angle": (notes["angle"], reference.angle_loss(s, t), 0.02557813),
        "sum": (value, reference.relations(s, t), 1.82502068),
    }
    for by_module, by_loop, expected in found.values():
        assert_close(by_module.item(), expected, rtol=0, atol=6e-9)
        assert_close(by_loop, expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("unit_length", "anchors"), [(False, 1), (False, 3), (True, 32)])
@pytest.mark.parametrize(("b", "d", "e"), [(2, 3, 3), (3, 2, 5), (5, 4, 3)])
def test_agrees_with_the_equation(
    b: int, d: int, e: int, unit_length: bool, anchors: int, terms: dict[str, float]
) -> None:
    student, teacher = normal(1, b, d).requires_grad_(), 3 * normal(2, b, e)
    module = made(unit_length=unit_length, anchors=anchors, **terms)
    value, notes = module(student, teacher, any_labels(b))
    value.backward()

    def loss(x: np.ndarray) -> float:
        return reference.relations(x, teacher.numpy(), unit_length=unit_length, **terms)

    at = student.detach().numpy()
    assert_close(value.item(), loss(at))
    assert_close(gradient(student).numpy(), central_differences(loss, at), rtol=1e-6, atol=1e-7)
    assert not any(note.requires_grad for note in notes.values())


def test_far_distances_cost_in_proportion() -> None:
    """If a relative distance differs by more than 1, the Huber loss is linear."""
    spread = torch.tensor([[0.0], [0.1], [0.2], [9.0]], dtype=torch.float64)
    value, _ = made(angle_weight=0.0)(spread, spread.flip(0) ** 2, any_labels(4))
    ours, theirs = spread.numpy(), spread.flip(0).numpy() ** 2
    assert_close(value.item(), 25 * reference.distance_loss(ours, theirs))
    relative = [np.array(reference.relative_distances(side)) for side in (ours, theirs)]
    assert abs(relative[0] - relative[1]).max() > 1


@drawn
@given(sizes, st.floats(0.01, 100), st.floats(0.01, 100))
def test_ignores_rotation_length_and_shift_of_either_side(
    size: tuple[int, int, int], ours: float, theirs: float
) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made()
    expected, _ = module(student, teacher, any_labels(b))
    found, _ = module(
        ours * student @ rotation(seed, d) + normal(seed + 2, d),
        theirs * teacher @ rotation(seed + 1, d) + normal(seed + 3, d),
        any_labels(b),
    )
    assert_close(found, expected, rtol=1e-6, atol=1e-9)


@drawn
@given(sizes, st.booleans())
def test_zero_at_equality_and_in_any_batch_order(
    size: tuple[int, int, int], unit_length: bool
) -> None:
    b, d, seed = size
    student, teacher = normal(seed, b, d), normal(seed + 1, b, d)
    module = made(unit_length=unit_length, anchors=2)
    assert module(student, student, any_labels(b))[0] == 0
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    expected, _ = module(student, teacher, any_labels(b))
    assert_close(module(student[order], teacher[order], any_labels(b) - 1)[0], expected)


@drawn
@given(sizes, st.booleans())
def test_precisions_agree(size: tuple[int, int, int], unit_length: bool) -> None:
    b, d, seed = size
    student, teacher = normal(seed, b, d), normal(seed + 1, b, d)
    module = made(unit_length=unit_length)
    exact, _ = module(student, teacher, any_labels(b))
    single, _ = module(student.float(), teacher.float(), any_labels(b))
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-3, atol=1e-4)
    ours, theirs = student.bfloat16(), teacher.bfloat16()
    rounded, _ = module(ours.double(), theirs.double(), any_labels(b))
    half, _ = module(ours.float(), theirs.float(), any_labels(b))
    assert_close(half.double(), rounded, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("unit_length", [False, True])
def test_samples_at_one_place_have_a_finite_value_and_gradient(
    unit_length: bool, terms: dict[str, float]
) -> None:
    module = made(unit_length=unit_length, **terms)
    teacher = normal(3, 4, 3)
    batches = {"two": normal(4, 4, 3), "all": normal(5, 1, 3).repeat(4, 1), "lone": normal(6, 1, 3)}
    batches["two"][1] = batches["two"][0]
    for student in batches.values():
        student.requires_grad_()
        value, _ = module(student, teacher[: len(student)], any_labels(len(student)))
        value.backward()
        assert torch.isfinite(value)
        assert gradient(student).abs().max() < 1e3


def test_close_samples_keep_their_distance_in_float32() -> None:
    """‖x‖² + ‖y‖² - 2x·y, torch.cdist's default beyond 25 rows, would leave only rounding."""
    student, teacher = 100 + 1e-2 * normal(8, 30, 3), normal(9, 30, 3)
    module = made(angle_weight=0.0)
    exact, _ = module(student.float().double(), teacher.float().double(), any_labels(30))
    single, _ = module(student.float(), teacher.float(), any_labels(30))
    assert_close(single.double(), exact, rtol=1e-3, atol=0)


def test_holds_the_angles_of_only_so_many_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    angles_at = rkd._angles_at

    def recording(x: Tensor, anchors: slice) -> Tensor:
        found = angles_at(x, anchors)
        shapes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(rkd, "_angles_at", recording)
    student = normal(1, 7, 3).requires_grad_()
    value, _ = made(anchors=3)(student, normal(2, 7, 3), any_labels(7))
    kept = len(shapes)
    value.backward()
    assert set(shapes) == {(3, 7, 7), (1, 7, 7)}
    assert len(shapes) == 2 * kept  # computed again in backward, so not kept from forward


def test_only_the_student_receives_gradients_and_there_is_no_state() -> None:
    module = made()
    student, teacher = golden.S.clone().requires_grad_(), golden.T.clone().requires_grad_()
    module(student, teacher, golden.Y)[0].backward()
    assert gradient(student).any()
    assert teacher.grad is None
    assert not module.state_dict()


@pytest.mark.parametrize(
    "options",
    [*TERMS[1:], {"unit_length": True}, {"global_batch": False}, {"anchors": 5}],
)
def test_conforms_with_other_options(options: dict[str, object]) -> None:
    check_method(lambda weight=1.0: RKD(weight=weight, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance_weight": -1.0}, "rkd: distance_weight must be at least 0; found -1"),
        ({"angle_weight": -2.0}, "rkd: angle_weight must be at least 0; found -2"),
        ({"distance_weight": 0.0, "angle_weight": 0.0}, "must be above 0; found 0 twice"),
        ({"anchors": 0}, "rkd: anchors must be at least 1; found 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        made(**options)


# --- two ranks against one process -----------------------------------------------------------

_CASES: list[dict[str, object]] = [{}, {"unit_length": True}, {"anchors": 2}]


def _scenario(options: dict[str, object], global_batch: bool) -> Results:
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    module = made(global_batch=global_batch, **options)
    embedding = student(mine(normal(23, 6, 5)))
    loss, notes = module(embedding, mine(normal(24, 6, 7)), mine(any_labels(6)))
    loss.backward()
    return {"loss": loss.detach(), "notes": notes, "gradients": mean_gradients(student)}


def _scenarios() -> dict[str, Results]:
    return {
        f"{number} {'global' if everywhere else 'local'}": _scenario(_CASES[number], everywhere)
        for number, everywhere in itertools.product(range(len(_CASES)), (True, False))
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", range(len(_CASES)))
def test_a_global_batch_is_that_of_one_process(case: int, ranks: list[dict[str, Results]]) -> None:
    alone = _scenario(_CASES[case], global_batch=True)
    for found in ranks:
        assert_close(found[f"{case} global"], alone, rtol=1e-9, atol=1e-12)
    assert any(part.abs().max() > 1e-3 for part in alone["gradients"].values())


@pytest.mark.parametrize("case", range(len(_CASES)))
def test_a_local_batch_is_each_ranks_own(case: int, ranks: list[dict[str, Results]]) -> None:
    weight, bias, x = normal(20, 4, 5), normal(21, 4), normal(23, 6, 5)
    halves = zip((x @ weight.T + bias).chunk(2), normal(24, 6, 7).chunk(2), strict=True)
    expected = [made(**_CASES[case])(s, t, any_labels(3))[0] for s, t in halves]
    assert_close([found[f"{case} local"]["loss"] for found in ranks], expected)
