"""Correlation congruence agrees with its equations and with public code; two ranks agree with one
process.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError, Schedule, Scheduled
from kdhooks.testing import check_method
from kdhooks_plugins.cc import CC, Correlations
from kdhooks_plugins.sp import SP
from tests import golden
from tests.maps import gradient, normal
from tests.maps import labels as any_labels
from tests.ranks import Results, mean_gradients, mine, on_two_ranks
from tests.references import cc as reference
from tests.references.differences import central_differences

drawn = settings(deadline=None, max_examples=40)
sizes = st.tuples(st.integers(1, 6), st.integers(2, 8), st.integers(0, 2**16))  # b, d, seed


def made(gamma: Scheduled = 0.4, terms: int = 3, global_batch: bool = True) -> Correlations:
    loss = CC(gamma=gamma, terms=terms, global_batch=global_batch).embedding_tap().loss
    assert isinstance(loss, Correlations)
    return loss


@pytest.mark.parametrize(("terms", "value"), [(2, 0.00601680), (3, 0.00525510)])
def test_gives_the_golden_value(terms: int, value: float) -> None:
    found = made(terms=terms)(golden.S, golden.T, golden.Y)
    assert_close(found.item(), value, rtol=0, atol=6e-9)
    by_loop = reference.correlation_congruence(golden.S.numpy(), golden.T.numpy(), terms=terms)
    assert_close(by_loop, value, rtol=0, atol=6e-9)


# Tencent/TFace, commit 171ec1434aca0972e111663ac646c9c1e3e44b5b, in recognition/tasks/ekd, with
# torch 2.13.0 on the CPU, g = torch.Generator().manual_seed(0), dtype=torch.float64:
#   s, t = torch.randn(6, 5, generator=g).requires_grad_(), torch.randn(6, 7, generator=g)
#   value = distillation.cc.CC(0.4, terms)(s, t); value.backward()
#   print(value.item(), s.grad.abs().sum().item())
@pytest.mark.parametrize(
    ("terms", "value", "total"),
    [
        (2, 0.048542643467, 0.054644835104),
        (3, 0.048525975737, 0.060172576811),
        (5, 0.051851102606, 0.066871631234),
    ],
)
def test_agrees_with_public_code(terms: int, value: float, total: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    found = made(terms=terms)(student, teacher, any_labels(6))
    found.backward()
    assert_close(found.item(), value, rtol=0, atol=1e-11)
    assert_close(gradient(student).abs().sum().item(), total, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("gamma", "terms"), [(0.4, 2), (0.4, 3), (0.1, 4), (1.5, 7)])
@pytest.mark.parametrize(("b", "d", "e"), [(1, 3, 3), (2, 9, 4), (5, 4, 4), (7, 3, 6)])
def test_agrees_with_the_equation(gamma: float, terms: int, b: int, d: int, e: int) -> None:
    student, teacher = normal(1, b, d).requires_grad_(), 3 * normal(2, b, e)
    value = made(gamma, terms)(student, teacher, any_labels(b))
    value.backward()

    def loss(x: np.ndarray) -> float:
        return reference.correlation_congruence(x, teacher.numpy(), gamma, terms)

    at = student.detach().numpy()
    assert_close(value.item(), loss(at))
    by_difference = central_differences(loss, at)
    assert_close(gradient(student).numpy(), by_difference, rtol=1e-6, atol=1e-8)


def test_two_terms_are_similarity_preservation_times_a_constant() -> None:
    """This is why two terms are not the default."""
    similarities = SP().embedding_tap().loss(golden.S, golden.T, golden.Y)
    found = made(terms=2)(golden.S, golden.T, golden.Y)
    assert_close(found, 0.8**2 * math.exp(-1.6) * similarities)
    more = made(terms=3)(golden.S, golden.T, golden.Y)
    assert not torch.isclose(more / found, torch.ones(()).double(), rtol=0.05)


def test_many_terms_are_the_gaussian_kernel() -> None:
    ours, theirs = (nn.functional.normalize(x) for x in (golden.S, golden.T))
    wanted, kernel = (torch.exp(-0.7 * torch.cdist(x, x).square()) for x in (theirs, ours))
    found = made(0.7, terms=20)(golden.S, golden.T, golden.Y)
    assert_close(found, nn.functional.mse_loss(kernel, wanted))


def test_gamma_follows_a_schedule() -> None:
    loss = made(Schedule(value=0.8, initial=0.4, start=1))
    for step, gamma in ((0, 0.4), (1, 0.8)):
        loss.gamma.move(step, None)
        expected = made(gamma)(golden.S, golden.T, golden.Y)
        assert_close(loss(golden.S, golden.T, golden.Y), expected)


@drawn
@given(sizes, st.floats(0.01, 100), st.floats(0.01, 100))
def test_ignores_rotation_and_length_of_either_side(
    size: tuple[int, int, int], ours: float, theirs: float
) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made()
    rotation: Tensor = torch.linalg.qr(normal(seed + 2, d, d))[0]
    expected = module(student, teacher, any_labels(b))
    found = module(ours * student @ rotation, theirs * teacher @ rotation, any_labels(b))
    assert_close(found, expected, rtol=1e-6, atol=1e-12)


@drawn
@given(sizes)
def test_zero_at_equality_and_in_any_batch_order(size: tuple[int, int, int]) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made()
    assert_close(module(student, student, any_labels(b)).item(), 0.0)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    expected = module(student, teacher, any_labels(b))
    assert expected >= 0
    assert_close(module(student[order], teacher[order], any_labels(b) - 1), expected)


@drawn
@given(sizes)
def test_precisions_agree(size: tuple[int, int, int]) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made()
    exact = module(student, teacher, any_labels(b))
    single = module(student.float(), teacher.float(), any_labels(b))
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)


def test_gradient_reaches_only_the_student_and_there_is_no_state() -> None:
    student, teacher = golden.S.clone().requires_grad_(), golden.T.clone().requires_grad_()
    module = made()
    module(student, teacher, golden.Y).backward()
    assert gradient(student).any()
    assert teacher.grad is None
    assert not module.state_dict()


@pytest.mark.parametrize("options", [{"terms": 6, "gamma": 1.0}, {"global_batch": False}])
def test_conforms_with_other_options(options: dict[str, object]) -> None:
    check_method(lambda weight=1.0: CC(weight=weight, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", [0, 1])
def test_a_constant_series_is_refused(terms: int) -> None:
    with pytest.raises(KDHooksError, match=f"cc: terms must be at least 2; found {terms}"):
        CC(terms=terms)


def test_a_kernel_without_a_width_is_refused() -> None:
    with pytest.raises(KDHooksError, match=r"cc: gamma must be above 0 .*; found 0"):
        CC(gamma=0.0)


@pytest.mark.parametrize(
    ("gamma", "terms", "message"),
    [
        (20, 3, "terms must be enough .* at gamma = 20 about 83; found 3"),
        (5.0, 3, "at gamma = 5 about 23; found 3"),
        (Schedule(value=20, initial=0.4, warmup=9), 3, "at gamma = 20 about 83; found 3"),
        (Schedule(value=0.4, initial=20, warmup=9), 3, "at gamma = 20 about 83; found 3"),
        (50, 203, "gamma must be above 0 and at most 40; found 50"),
    ],
)
def test_a_series_far_below_its_kernel_is_refused(
    gamma: Scheduled, terms: int, message: str
) -> None:
    with pytest.raises(KDHooksError, match=f"cc: .*{message}"):
        CC(gamma=gamma, terms=terms)


@pytest.mark.parametrize("gamma", [0.001, 0.4, 2.0, 10.0, 40.0])
def test_the_advised_number_of_terms_gives_the_kernel(gamma: float) -> None:
    x = nn.functional.normalize(golden.S)
    found = made(gamma, math.ceil(4 * gamma + 3))._correlations(x.float())
    assert_close(found.double(), torch.exp(-gamma * torch.cdist(x, x).square()), rtol=0, atol=1e-2)


# --- two ranks against one process -----------------------------------------------------------


def _scenario(global_batch: bool) -> Results:
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    embedding = student(mine(normal(23, 6, 5)))
    module = made(global_batch=global_batch)
    loss = module(embedding, mine(normal(24, 6, 7)), mine(any_labels(6)))
    loss.backward()
    return {"loss": loss.detach(), "gradients": mean_gradients(student)}


def _scenarios() -> dict[str, Results]:
    return {"global": _scenario(global_batch=True), "local": _scenario(global_batch=False)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("ranks"))


def test_a_global_batch_is_that_of_one_process(ranks: list[dict[str, Results]]) -> None:
    alone = _scenario(global_batch=True)
    for found in ranks:
        assert_close(found["global"], alone, rtol=1e-9, atol=1e-12)
    assert any(gradient.abs().max() > 1e-3 for gradient in alone["gradients"].values())


def test_a_local_batch_is_each_ranks_own(ranks: list[dict[str, Results]]) -> None:
    first, second = (found["local"]["loss"] for found in ranks)
    assert not torch.isclose(first, second)
    weight, bias, x = normal(20, 4, 5), normal(21, 4), normal(23, 6, 5)
    halves = zip((x @ weight.T + bias).chunk(2), normal(24, 6, 7).chunk(2), strict=True)
    assert_close([first, second], [made()(s, t, any_labels(3)) for s, t in halves])
