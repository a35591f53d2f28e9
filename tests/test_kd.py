"""Logit distillation: values and gradients against the equation; classes split over two ranks."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import ClassShard, Distiller, KDHooksError
from kdhooks.classes.chunked_sums import NUMBERS
from kdhooks.testing import TinyFaceNet, check_method, tiny_teacher
from kdhooks_plugins.kd import KD
from tests import golden
from tests.compared import normal, scenario, whole
from tests.ranks import Results, on_two_ranks
from tests.references import kd as reference
from tests.references.differences import central_differences

drawn = settings(deadline=None, max_examples=40)
sizes = st.tuples(
    st.integers(1, 5), st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**16)
)  # b, c, d, seed
options_drawn = st.fixed_dictionaries(
    {"temperature": st.floats(0.5, 20), "scale": st.floats(1, 64), "margin": st.floats(0, 0.5)}
)


def made(**options: Any) -> nn.Module:
    """The plain form, unless the options say otherwise."""
    return KD(**{"standardize": False, **options}).classifier_share().loss


def labels_of(seed: int, b: int, c: int) -> Tensor:
    return torch.randint(c, (b,), generator=torch.Generator().manual_seed(seed))


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def test_gives_the_golden_value() -> None:
    rows = whole(golden.W)
    value, _ = made(margin=0.4)(golden.S, golden.T, golden.Y, rows, rows)
    assert_close(value.item(), 118.29862214, rtol=0, atol=6e-9)
    s, t, w, y = (x.numpy() for x in (golden.S, golden.T, golden.W, golden.Y))
    assert_close(reference.distillation(s, t, y, w, w, margin=0.4), 118.29862214, rtol=0, atol=6e-9)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("scale", [8.0, 64.0])
@pytest.mark.parametrize("margin", [0.0, 0.35])
@pytest.mark.parametrize(("b", "c", "d", "e"), [(1, 2, 3, 3), (5, 4, 3, 6), (4, 7, 6, 2)])
def test_agrees_with_the_equation(
    b: int,
    c: int,
    d: int,
    e: int,
    margin: float,
    scale: float,
    temperature: float,
    standardize: bool,
) -> None:
    student, ours = normal(1, b, d).requires_grad_(), (2 * normal(2, c, d)).requires_grad_()
    teacher, theirs, labels = normal(3, b, e), 3 * normal(4, c, e), labels_of(5, b, c)
    options: dict[str, Any] = {"temperature": temperature, "scale": scale, "margin": margin}
    options["standardize"] = standardize
    value, _ = made(**options)(student, teacher, labels, whole(theirs), whole(ours))
    value.backward()

    def loss(x: np.ndarray, w: np.ndarray) -> float:
        return reference.distillation(
            x, teacher.numpy(), labels.numpy(), w, theirs.numpy(), **options
        )

    at, rows = student.detach().numpy(), ours.detach().numpy()
    assert_close(value.item(), loss(at, rows))
    by_student = central_differences(lambda x: loss(x, rows), at)
    by_rows = central_differences(lambda w: loss(at, w), rows)
    assert_close(gradient(student).numpy(), by_student, rtol=1e-5, atol=1e-6)
    assert_close(gradient(ours).numpy(), by_rows, rtol=1e-5, atol=1e-6)


def test_is_torchs_kl_divergence_of_softened_logits() -> None:
    """A second reference: the reduction that is named batchmean, T² in front."""
    student, teacher = normal(1, 5, 3), normal(2, 5, 4)
    ours, theirs, labels = normal(3, 7, 3), normal(4, 7, 4), labels_of(5, 5, 7)
    value, notes = made()(student, teacher, labels, whole(theirs), whole(ours))
    log_s = F.log_softmax(16 * F.normalize(student) @ F.normalize(ours).T, dim=1)
    log_t = F.log_softmax(16 * F.normalize(teacher) @ F.normalize(theirs).T, dim=1)
    expected = 16 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    assert_close(value, expected)
    entropy = reference.entropy(teacher.numpy(), labels.numpy(), theirs.numpy())
    assert_close(notes["teacher_entropy"].item(), entropy)


@pytest.mark.parametrize("factor", [0.3, 7.0])
def test_standardized_scores_do_not_depend_on_the_scale_but_as_a_factor(factor: float) -> None:
    """Nor on that of the student's cosines: one with a seventh of their spread, in the same order,
    costs nothing, where plain scores would have it spread.
    """
    student, teacher, labels = normal(1, 5, 3), normal(2, 5, 4), labels_of(3, 5, 9)
    ours, theirs = whole(normal(4, 9, 3)), whole(normal(5, 9, 4))
    value, _ = made(standardize=True)(student, teacher, labels, theirs, ours)
    other, _ = made(standardize=True, scale=64 * factor)(student, teacher, labels, theirs, ours)
    assert_close(other, factor * value)
    plain, _ = made(scale=64 * factor)(student, teacher, labels, theirs, ours)
    assert plain != made()(student, teacher, labels, theirs, ours)[0]
    flat = torch.tensor([[0.0, 0, 1]]).double()  # its cosines with these are all near 1
    near = torch.cat([0.1 * normal(6, 9, 2), torch.ones(9, 1).double()], dim=1)
    cosines = nn.functional.normalize(near)[:, 2]
    spread = torch.stack([factor * (cosines - cosines.mean()), torch.ones(9)], dim=1).double()
    spread[:, 1] = (1 - spread[:, 0].square()).sqrt()
    one = torch.tensor([[1.0, 0]]).double()  # its cosines: the same less their mean, times factor
    cost, _ = made(standardize=True)(flat, one, labels[:1], whole(spread), whole(near))
    assert_close(cost.item(), 0.0, rtol=0, atol=1e-6)
    assert made(scale=64.0)(flat, one, labels[:1], whole(spread), whole(near))[0] > 1e-3


def test_one_class_and_equal_scores_are_finite_when_standardized() -> None:
    student, rows = normal(1, 4, 3).requires_grad_(), normal(2, 1, 3)
    labels = torch.zeros(4, dtype=torch.long)
    for same in (rows, rows.expand(5, 3)):
        value, _ = made(standardize=True)(
            student, normal(3, 4, 3), labels, whole(same), whole(same)
        )
        value.backward()
        assert_close(value.item(), 0.0, rtol=0, atol=1e-6)
        assert gradient(student).isfinite().all()


@drawn
@given(sizes, options_drawn)
def test_zero_at_equality_and_never_negative(
    size: tuple[int, int, int, int], options: dict[str, float]
) -> None:
    b, c, d, seed = size
    student, rows, labels = (
        normal(seed, b, d).requires_grad_(),
        normal(seed + 1, c, d),
        labels_of(seed, b, c),
    )
    module = made(**options)
    value, _ = module(student, student.detach(), labels, whole(rows), whole(rows))
    value.backward()
    assert_close(value.item(), 0.0, rtol=0, atol=1e-9)
    assert_close(gradient(student), torch.zeros_like(student), rtol=0, atol=1e-9)
    other, _ = module(normal(seed + 2, b, d), student, labels, whole(rows), whole(rows))
    assert other > -1e-9


@drawn
@given(sizes, options_drawn, st.floats(0.01, 100))
def test_ignores_lengths_batch_order_and_the_names_of_classes(
    size: tuple[int, int, int, int], options: dict[str, float], length: float
) -> None:
    b, c, d, seed = size
    student, teacher, labels = normal(seed, b, d), normal(seed + 1, b, d + 1), labels_of(seed, b, c)
    ours, theirs, module = normal(seed + 2, c, d), normal(seed + 3, c, d + 1), made(**options)
    expected, _ = module(student, teacher, labels, whole(theirs), whole(ours))
    found, _ = module(
        length * student.flip(0),
        teacher.flip(0) / length,
        c - 1 - labels.flip(0),
        whole(length * theirs.flip(0)),
        whole(ours.flip(0) / length),
    )
    assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_labels_matter_to_the_margin_alone() -> None:
    rows, other, unknown = whole(golden.W), whole(normal(6, 5, 6)), torch.full_like(golden.Y, -1)
    plain, _ = made()(golden.S, golden.T, golden.Y, rows, other)
    assert_close(made()(golden.S, golden.T, unknown, rows, other)[0], plain)
    assert_close(made(margin=0.4)(golden.S, golden.T, unknown, rows, other)[0], plain)
    assert made(margin=0.4)(golden.S, golden.T, golden.Y, rows, other)[0] != plain


@drawn
@given(sizes)
def test_precisions_agree(size: tuple[int, int, int, int]) -> None:
    b, c, d, seed = size
    batch = (normal(seed, b, d), normal(seed + 1, b, d))
    rows, labels, module = (
        (normal(seed + 2, c, d), normal(seed + 3, c, d)),
        labels_of(seed, b, c),
        made(),
    )

    def value(dtype: torch.dtype, rounded: bool) -> Tensor:
        s, t, theirs, ours = ((x.bfloat16() if rounded else x).to(dtype) for x in (*batch, *rows))
        found: Tensor = module(s, t, labels, whole(theirs), whole(ours))[0]
        assert found.dtype == dtype
        return found.double()

    for rounded in (False, True):
        exact = value(torch.float64, rounded)
        assert_close(value(torch.float32, rounded), exact, rtol=1e-4, atol=1e-2)


def test_gradient_reaches_student_and_head_alone_and_there_is_no_state() -> None:
    tensors = [x.clone().requires_grad_() for x in (golden.S, golden.T, golden.W, golden.W)]
    student, teacher, theirs, ours = tensors
    module = made()
    value, notes = module(student, teacher, golden.Y, whole(theirs), whole(ours))
    value.backward()
    assert gradient(student).any()
    assert gradient(ours).any()
    assert teacher.grad is None
    assert theirs.grad is None
    assert not notes["teacher_entropy"].requires_grad
    assert not module.state_dict()


@pytest.mark.parametrize(
    "options",
    [{"margin": 0.4}, {"temperature": 16.0, "scale": 30.0, "standardize": False}],
)
def test_conforms_with_other_options(options: dict[str, Any]) -> None:
    check_method(lambda weight=1.0: KD(weight=weight, **options))


# --- what the caller can fix -----------------------------------------------------------------


def distilled(head: ClassShard | None) -> None:
    Distiller(TinyFaceNet(), tiny_teacher(), ["kd"], head=head, input_shape=(3, 32, 32))


def test_a_host_without_a_head_is_refused() -> None:
    with pytest.raises(
        KDHooksError, match=r"kd .*classifier is not known; pass Distiller\(…, head="
    ):
        distilled(None)


def test_a_head_of_another_width_is_refused() -> None:
    with pytest.raises(KDHooksError, match="found rows of width 5 and an embedding of width 12"):
        distilled(whole(torch.ones(6, 5)))


def test_a_head_that_is_not_trained_is_refused() -> None:
    with pytest.raises(KDHooksError, match=r"kd: .* must be trained; found rows that do not"):
        distilled(whole(torch.ones(6, 12)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "kd: temperature must be above 0; found 0"),
        ({"scale": -1.0}, "kd: scale must be above 0; found -1"),
        ({"margin": -0.1}, "kd: margin must be at least 0 and at most 2; found -0.1"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        made(**options)


# --- two ranks against one process -----------------------------------------------------------

_SPLIT, _LABELS = (4, 3), torch.tensor([0, 6, 3, 4, 2, -1, 5, 3])
_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": 0.4},
    "hot": {"temperature": 20.0, "scale": 30.0},
    "standardized": {"standardize": True, "temperature": 2.0, "margin": 0.2},
}


def _scenario(options: dict[str, Any]) -> Results:
    return scenario(KD(**{"standardize": False, **options}).classifier_share(), _SPLIT, _LABELS)


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
    assert any(part.abs().max() > 1e-3 for part in alone["same"]["gradients"].values())


@pytest.mark.parametrize("name", _OPTIONS)
def test_each_rank_has_its_own_rows_gradient_of_the_global_loss(
    name: str, ranks: list[dict[str, Results]]
) -> None:
    alone = _scenario(_OPTIONS[name])
    shards = torch.cat([found[name]["head"] for found in ranks])
    assert_close(shards, alone["head"], rtol=1e-9, atol=1e-12)
    assert alone["head"].abs().max() > 1e-3
