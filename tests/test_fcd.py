"""Values and gradients of every distance of feature consistency agree with their equations."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from kdhooks import KDHooksError, Model
from kdhooks_plugins.fcd import FCD, Distance
from tests import golden
from tests.maps import labels as any_labels
from tests.maps import normal
from tests.references import fcd as reference
from tests.references.differences import central_differences

DISTANCES = get_args(Distance)
ANGULAR = [name for name in DISTANCES if name != "raw_mse"]
sizes = st.tuples(st.integers(1, 6), st.integers(2, 8), st.integers(0, 2**16))
drawn = settings(deadline=None, max_examples=40)


def made(distance: Distance, d: int = 6, e: int = 6, projector: bool = False) -> nn.Module:
    method = FCD(distance=distance, projector=projector)
    return method.embedding_tap(Model(None, d), Model(None, e)).loss.double()


@pytest.mark.parametrize(("distance", "expected"), golden.EMBEDDING_DISTANCE.items())
def test_gives_the_golden_value(distance: Distance, expected: float) -> None:
    found = made(distance)(golden.S, golden.T, golden.Y)
    assert_close(found.item(), expected, rtol=0, atol=6e-9)
    by_loop = reference.embedding_distance(golden.S.numpy(), golden.T.numpy(), distance)
    assert_close(by_loop, expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("b", "d"), [(1, 2), (2, 9), (5, 4), (8, 3)])
def test_agrees_with_the_equation(distance: Distance, b: int, d: int) -> None:
    student, teacher = normal(1, b, d).requires_grad_(), 3 * normal(2, b, d)
    value = made(distance, d, d)(student, teacher, any_labels(b))
    value.backward()

    def loss(x: np.ndarray) -> float:
        return reference.embedding_distance(x, teacher.numpy(), distance)

    at = student.detach().numpy()
    assert_close(value.item(), loss(at))
    assert student.grad is not None
    assert_close(student.grad.numpy(), central_differences(loss, at), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("d", "e"), [(3, 5), (6, 2), (4, 4)])
def test_the_projector_is_linear_and_trained(distance: Distance, d: int, e: int) -> None:
    torch.manual_seed(0)  # of the projector
    module = made(distance, d, e, projector=True)
    student, teacher = normal(3, 4, d).requires_grad_(), normal(4, 4, e)
    value = module(student, teacher, any_labels(4))
    value.backward()
    [projector] = module.parameters()
    matrix, at = projector.detach().numpy(), student.detach().numpy()
    assert projector.shape == (e, d)

    def loss(x: np.ndarray, weight: np.ndarray) -> float:
        projected = reference.linear(x, weight)
        return reference.embedding_distance(projected, teacher.numpy(), distance)

    assert_close(value.item(), loss(at, matrix))
    assert student.grad is not None
    assert projector.grad is not None
    by_student = central_differences(lambda x: loss(x, matrix), at)
    by_weight = central_differences(lambda w: loss(at, w), matrix)
    assert_close(student.grad.numpy(), by_student, rtol=1e-6, atol=1e-8)
    assert_close(projector.grad.numpy(), by_weight, rtol=1e-6, atol=1e-8)


def test_the_forms_differ_by_the_factors_that_the_docstring_states() -> None:
    values = {name: made(name)(golden.S, golden.T, golden.Y) for name in DISTANCES}
    assert_close(values["l2"], 2 * values["cosine"])
    assert_close(values["mse"], 2 * values["cosine"] / 6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_embeddings_have_no_loss_and_no_gradient(distance: Distance) -> None:
    student = golden.T.clone().requires_grad_()
    value = made(distance)(student, golden.T, golden.Y)
    value.backward()
    assert_close(value, torch.zeros_like(value))
    assert_close(student.grad, torch.zeros_like(student))


@drawn
@given(sizes, st.sampled_from(ANGULAR), st.floats(0.01, 100), st.floats(0.01, 100))
def test_ignores_the_lengths_of_embeddings(
    size: tuple[int, int, int], distance: Distance, ours: float, theirs: float
) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made(distance, d, d)
    expected = module(student, teacher, any_labels(b))
    assert_close(module(ours * student, theirs * teacher, any_labels(b)), expected)


def test_raw_mse_depends_on_the_lengths_of_embeddings() -> None:
    module = made("raw_mse")
    before = module(golden.S, golden.T, golden.Y)
    assert_close(module(2 * golden.S, 2 * golden.T, golden.Y), 4 * before)


@drawn
@given(sizes, st.sampled_from(DISTANCES))
def test_ignores_batch_order_and_labels(size: tuple[int, int, int], distance: Distance) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made(distance, d, d)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    expected = module(student, teacher, any_labels(b))
    assert_close(module(student[order], teacher[order], any_labels(b) - 1), expected)


@drawn
@given(sizes, st.sampled_from(DISTANCES))
def test_is_never_negative_and_zero_at_equality(
    size: tuple[int, int, int], distance: Distance
) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made(distance, d, d)
    assert module(student, teacher, any_labels(b)) > -1e-12
    assert_close(module(student, student, any_labels(b)), torch.zeros((), dtype=torch.float64))


@drawn
@given(sizes, st.sampled_from(DISTANCES))
def test_precisions_agree(size: tuple[int, int, int], distance: Distance) -> None:
    b, d, seed = size
    student, teacher = normal(seed, b, d), normal(seed + 1, b, d)
    exact = made(distance, d, d)(student, teacher, any_labels(b))
    module = made(distance, d, d).float()
    single = module(student.float(), teacher.float(), any_labels(b))
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)
    ours, theirs = student.bfloat16(), teacher.bfloat16()
    rounded = made(distance, d, d)(ours.double(), theirs.double(), any_labels(b))
    half = module(ours.float(), theirs.float(), any_labels(b))
    assert_close(half.double(), rounded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_reaches_only_student_and_projector(distance: Distance, projector: bool) -> None:
    module = made(distance, projector=projector)
    student, teacher = golden.S.clone().requires_grad_(), golden.T.clone().requires_grad_()
    module(student, teacher, golden.Y).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert len(list(module.parameters())) == int(projector)


def test_the_tap_has_the_weight() -> None:
    assert FCD().embedding_tap(Model(None, 4), Model(None, 4)).weight == 32
    assert FCD(weight=8).embedding_tap(Model(None, 4), Model(None, 4)).weight == 8


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(
        KDHooksError, match=r"fcd: distance must be one of 'cosine', .*; found 'l1'"
    ):
        FCD(distance="l1")  # type: ignore[arg-type]  # the mistake


def test_other_widths_need_a_projector() -> None:
    with pytest.raises(KDHooksError, match="equally wide; found 4 and 6; set projector = true"):
        FCD().embedding_tap(Model(None, 4), Model(None, 6))
