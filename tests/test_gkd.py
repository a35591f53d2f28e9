"""Grouped KD agrees with its equation, groups are the right classes, and two ranks agree with one
process.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks.classes.chunked_sums import NUMBERS
from kdhooks.testing import check_method
from kdhooks_plugins import gkd
from kdhooks_plugins._margin import scores
from kdhooks_plugins.gkd import GKD, GroupedScores
from kdhooks_plugins.kd import KD
from tests import golden
from tests.compared import scenario, whole
from tests.maps import normal
from tests.ranks import Results, on_two_ranks
from tests.references import gkd as reference
from tests.references.differences import central_differences


def made(**options: Any) -> GroupedScores:
    """Return the loss, by default in the paper's form."""
    loss = GKD(**{"standardize": False, **options}).classifier_share().loss
    assert isinstance(loss, GroupedScores)
    return loss


def labels_of(seed: int, b: int, c: int) -> Tensor:
    return torch.randint(-1, c, (b,), generator=torch.Generator().manual_seed(seed))


def test_gives_the_golden_values() -> None:
    rows = whole(golden.W)
    loss = made(margin=0.4, tau=1, largest=3)
    value, notes = loss(golden.S, golden.T, golden.Y, rows, rows)
    assert_close(16 * notes["binary"].item(), 82.85496458, rtol=0, atol=6e-9)
    assert_close(16 * notes["primary"].item(), 38.54084381, rtol=0, atol=6e-9)
    assert_close(value.item(), 82.85496458 + 8 * 38.54084381, rtol=0, atol=6e-8)
    assert notes["group"] == 3


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("options", [{"tau": 0.5}, {"tau": 0.93, "largest": 4}, {"tau": 1.0}])
@pytest.mark.parametrize(("scale", "margin"), [(4.0, 0.35), (64.0, 0.0)])
@pytest.mark.parametrize(("b", "c", "d", "e"), [(1, 2, 3, 3), (5, 9, 3, 6), (4, 7, 6, 2)])
def test_agrees_with_the_equation(
    b: int,
    c: int,
    d: int,
    e: int,
    scale: float,
    margin: float,
    options: dict[str, Any],
    standardize: bool,
) -> None:
    student, ours = normal(1, b, d).requires_grad_(), (2 * normal(2, c, d)).requires_grad_()
    teacher, theirs, labels = normal(3, b, e), 3 * normal(4, c, e), labels_of(5, b, c)
    options = {"temperature": 2.0, "scale": scale, "margin": margin, **options}
    options["standardize"] = standardize
    value, notes = made(**options)(student, teacher, labels, whole(theirs), whole(ours))
    value.backward()

    def loss(x: np.ndarray, w: np.ndarray) -> float:
        y = labels.numpy()
        primary, binary, _ = reference.parts(x, teacher.numpy(), y, w, theirs.numpy(), **options)
        return 4 * (8 * primary + binary)

    at, rows = student.detach().numpy(), ours.detach().numpy()
    _, _, size = reference.parts(
        at, teacher.numpy(), labels.numpy(), rows, theirs.numpy(), **options
    )
    assert_close(value.item(), loss(at, rows), rtol=1e-7, atol=1e-8)
    assert_close(notes["group"].item(), size)
    assert student.grad is not None
    assert ours.grad is not None
    by_student = central_differences(lambda x: loss(x, rows), at)
    by_rows = central_differences(lambda w: loss(at, w), rows)
    assert_close(student.grad.numpy(), by_student, rtol=1e-4, atol=1e-5)
    assert_close(ours.grad.numpy(), by_rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"tau": 0.5}, {"tau": 0.93}, {"tau": 1, "largest": 100}])
@pytest.mark.parametrize(("scale", "away"), [(16.0, 0.0), (64.0, 30.0)])
@pytest.mark.parametrize(("dtype", "alike"), [(torch.float64, 0), (torch.float32, 1)])
def test_groups_of_many_classes_are_those_of_sorted_scores(
    dtype: torch.dtype, alike: int, scale: float, away: float, options: dict[str, Any]
) -> None:
    """Most scores are around 0. Those of one sample are all near the lowest possible score, where
    float32 distinguishes few of them.
    """
    student, labels = normal(1, 6, 8).to(dtype), labels_of(2, 6, 3000)
    rows = whole((normal(3, 3000, 8) - away * student[0]).to(dtype))
    loss = made(scale=scale, margin=0.2, **options)
    least, size = loss.group(student, labels, rows)
    z = scores(student, labels, rows, scale, 0.2)
    taken = rows.add(z, labels, torch.full((6,), 100).to(z)) >= least[:, None]
    expected = torch.zeros_like(taken)
    for row, one, label in zip(expected, z, labels, strict=True):
        chosen = reference.group(one.tolist(), int(label), loss.tau, loss.largest)
        row[list(chosen)] = True
    assert (taken != expected).sum(dim=1).max() <= alike
    # In float32, another order of summation may move a score over the bound.
    assert (size - taken.sum(dim=1)).abs().max() <= alike
    assert size[0] > 10


@pytest.mark.parametrize(
    "edge", [31.69374656677246, -6.703126430511475, 23.812931060791016, -25.3797550201416]
)
def test_a_score_that_rounding_moves_into_a_bin_is_not_lost(
    edge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, rounding moves these scores into a bin whose edge is just above them: the first
    two if the bins have no slack, the others if the bins have slack only at their end.
    """
    z = torch.tensor([[edge + 3, edge, edge - 3]])
    monkeypatch.setattr(gkd, "scores", lambda *given: z)
    least, size = made(tau=1, largest=2, margin=0).group(
        torch.zeros(1, 2), torch.tensor([-1]), whole(torch.zeros(3, 2))
    )
    assert edge - 3 < least <= edge
    assert size == 2


@pytest.mark.parametrize("own", [0, 4])
def test_equal_scores_join_a_group_together(own: int) -> None:
    """Otherwise the choice among them would depend on how the ranks store the classes."""
    rows = torch.tensor([[1.0, 0], [0.8, 0.6], [0.8, -0.6], [0.8, 0.6], [-1, 0]]).double()
    student = torch.tensor([[1.0, 0]]).double()
    loss = made(tau=1, largest=2, margin=0)
    assert loss.group(student, torch.tensor([own]), whole(rows))[1] == (4 if own == 0 else 2)


def test_the_own_class_comes_first_however_unlikely_it_is() -> None:
    """Its probability counts towards tau; the most likely other classes follow."""
    rows = torch.tensor([[1.0, 0], [0.9, 0.19**0.5], [-1, 0]]).double()
    student = torch.tensor([[1.0, 0]]).double()
    loss = made(tau=0.5, largest=2, margin=0, scale=4)
    sizes = [loss.group(student, torch.tensor([y]), whole(rows))[1].item() for y in (0, 2, -1)]
    assert sizes == [1, 2, 1]


def test_a_group_of_all_classes_is_logit_distillation() -> None:
    student, teacher, labels = normal(1, 5, 3), normal(2, 5, 4), labels_of(3, 5, 9)
    ours, theirs = whole(normal(4, 9, 3)), whole(normal(5, 9, 4))
    value, notes = made(primary=1, tau=1, margin=0)(student, teacher, labels, theirs, ours)
    expected, _ = (
        KD(standardize=False).classifier_share().loss(student, teacher, labels, theirs, ours)
    )
    assert_close(value, expected)
    assert notes["binary"] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_embedding_that_is_not_finite_makes_a_loss_that_is_not(value: float) -> None:
    student, teacher, rows = normal(1, 4, 3), normal(2, 4, 3), whole(normal(3, 9, 3))
    student[1, 0] = value
    loss, _ = made()(student, teacher, labels_of(4, 4, 9), rows, rows)
    assert loss.isnan()


def test_the_order_among_the_rest_does_not_matter() -> None:
    """The two teachers swap the scores of two classes outside of every group."""
    rows = torch.eye(6, dtype=torch.float64)
    student = torch.tensor([[0.9, 0.8, 0.1, 0.1, 0.1, 0.1]]).double()
    one = torch.tensor([[0.9, 0.5, 0.3, 0.2, 0.1, 0.1]]).double()
    other = torch.tensor([[0.9, 0.5, 0.2, 0.3, 0.1, 0.1]]).double()
    label = torch.tensor([0])
    loss = made(tau=1, largest=2, scale=8.0, margin=0)
    found = [loss(student, t, label, whole(rows), whole(rows))[0] for t in (one, other)]
    assert_close(found[0], found[1])
    inside = torch.tensor([[0.5, 0.9, 0.3, 0.2, 0.1, 0.1]]).double()
    assert loss(student, inside, label, whole(rows), whole(rows))[0] > found[0] + 0.1


def test_without_a_margin_a_group_soon_has_only_the_own_class() -> None:
    """The cosine to the own class is 0.4; other classes are random. See docs/methods/gkd.md."""
    rows = nn.functional.normalize(normal(1, 5000, 512))
    labels = torch.arange(4)
    apart = nn.functional.normalize(normal(2, 4, 512))
    student = 0.4 * rows[labels] + 0.84**0.5 * apart
    sizes = [
        made(tau=0.93, margin=m).group(student, labels, whole(rows))[1].mean() for m in (0.0, 0.4)
    ]
    assert sizes[0] < 10
    assert sizes[1] > 100


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 9), st.floats(0.01, 1))
def test_zero_at_equality_and_never_negative(seed: int, b: int, c: int, tau: float) -> None:
    student = normal(seed, b, 4).requires_grad_()
    rows, labels = whole(normal(seed + 1, c, 4)), labels_of(seed, b, c)
    value, _ = made(tau=tau, largest=5)(student, student.detach(), labels, rows, rows)
    value.backward()
    assert student.grad is not None
    assert_close(value.item(), 0.0, rtol=0, atol=1e-9)
    assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-9)
    other, _ = made(tau=tau, largest=5)(normal(seed + 2, b, 4), student, labels, rows, rows)
    assert other > -1e-9


@pytest.mark.parametrize(
    "options",
    [{"margin": 0.0}, {"tau": 0.93}, {"largest": 2, "binary": 0.0}, {"standardize": False}],
)
def test_conforms_with_other_options(options: dict[str, Any]) -> None:
    check_method(lambda weight=1.0: GKD(weight=weight, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "gkd: temperature must be above 0; found 0"),
        ({"scale": -1.0}, "gkd: scale must be above 0; found -1"),
        ({"scale": float("nan")}, "gkd: scale must be finite; found nan"),
        ({"margin": -0.1}, "gkd: margin must be at least 0 and at most 2; found -0.1"),
        ({"primary": -1.0}, "gkd: primary must be at least 0; found -1"),
        ({"binary": -1.0}, "gkd: binary must be at least 0; found -1"),
        ({"tau": 0.0}, "gkd: tau must be above 0 and at most 1; found 0"),
        ({"tau": 1.1}, "gkd: tau must be above 0 and at most 1; found 1.1"),
        ({"largest": 0}, "gkd: largest must be at least 1; found 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        made(**options)


# --- two ranks against one process -----------------------------------------------------------

_SPLIT, _LABELS = (5, 4), torch.tensor([0, 8, 3, 4, 2, -1, 5, 3])
_OPTIONS: dict[str, dict[str, Any]] = {
    "by_probability": {"tau": 0.9, "scale": 8.0},
    "by_size": {"tau": 1.0, "largest": 5},  # more classes than the second rank has
    "no_margin": {"margin": 0.0},
    "standardized": {"standardize": True, "tau": 0.9, "scale": 8.0},
}


def _scenario(options: dict[str, Any]) -> Results:
    return scenario(GKD(**{"standardize": False, **options}).classifier_share(), _SPLIT, _LABELS)


def _scenarios() -> dict[str, Results]:
    NUMBERS["cpu"] = 2 * len(_LABELS)  # two classes at a time, in these processes
    return {name: _scenario(options) for name, options in _OPTIONS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", _OPTIONS)
def test_classes_split_over_ranks_are_those_of_one_process(
    name: str, ranks: list[dict[str, Results]]
) -> None:
    alone = _scenario(_OPTIONS[name])
    for found in ranks:
        assert_close(found[name]["same"], alone["same"], rtol=1e-9, atol=1e-12)
    shards = torch.cat([found[name]["head"] for found in ranks])
    assert_close(shards, alone["head"], rtol=1e-9, atol=1e-12)
    assert alone["head"].abs().max() > 1e-3


def test_two_factors_of_zero_are_refused() -> None:
    with pytest.raises(KDHooksError, match="gkd: primary or binary must be above 0; found 0 twice"):
        GKD(primary=0, binary=0.0)
