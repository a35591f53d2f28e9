"""Similarity preservation: both forms agree with their equations; two ranks agree with one."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks.testing import check_method
from kdhooks_plugins.sp import SP, Similarity
from tests import golden
from tests.maps import normal
from tests.ranks import Results, mean_gradients, mine, on_two_ranks
from tests.references import sp as reference
from tests.references.differences import central_differences

SIMILARITIES = get_args(Similarity)
drawn = settings(deadline=None, max_examples=40)
sizes = st.tuples(st.integers(1, 6), st.integers(2, 8), st.integers(0, 2**16))  # b, d, seed


def made(similarity: Similarity = "cosine", global_batch: bool = True) -> nn.Module:
    return SP(similarity=similarity, global_batch=global_batch).embedding_tap().loss


def any_labels(b: int) -> Tensor:
    return torch.zeros(b, dtype=torch.long)


def rotation(seed: int, d: int) -> Tensor:
    q: Tensor = torch.linalg.qr(normal(seed, d, d))[0]
    return q


def test_gives_the_golden_value() -> None:
    found = made()(golden.S, golden.T, golden.Y)
    assert_close(found.item(), 0.04656466, rtol=0, atol=6e-9)
    by_loop = reference.similarity_preservation(golden.S.numpy(), golden.T.numpy())
    assert_close(by_loop, 0.04656466, rtol=0, atol=6e-9)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("b", "d", "e"), [(1, 3, 3), (2, 9, 4), (5, 4, 4), (7, 3, 6)])
def test_agrees_with_the_equation(similarity: Similarity, b: int, d: int, e: int) -> None:
    student, teacher = normal(1, b, d).requires_grad_(), 3 * normal(2, b, e)
    value = made(similarity)(student, teacher, any_labels(b))
    value.backward()

    def loss(x: np.ndarray) -> float:
        return reference.similarity_preservation(x, teacher.numpy(), similarity)

    at = student.detach().numpy()
    assert_close(value.item(), loss(at))
    assert student.grad is not None
    assert_close(student.grad.numpy(), central_differences(loss, at), rtol=1e-6, atol=1e-8)


def test_the_forms_agree_on_orthogonal_faces() -> None:
    """Embeddings of length 1 have similar losses, so one default weight suits both forms."""
    student, teacher = torch.eye(4, 6).double(), 2 * rotation(3, 6)[:4]
    near = student + 0.01 * normal(4, 4, 6)
    values = [made(name)(near, teacher, any_labels(4)) for name in SIMILARITIES]
    assert_close(values[0], values[1], rtol=0.1, atol=0)


@drawn
@given(sizes, st.sampled_from(SIMILARITIES), st.floats(0.01, 100), st.floats(0.01, 100))
def test_ignores_rotation_and_length_of_either_side(
    size: tuple[int, int, int], similarity: Similarity, ours: float, theirs: float
) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made(similarity)
    expected = module(student, teacher, any_labels(b))
    found = module(
        ours * student @ rotation(seed, d), theirs * teacher @ rotation(seed + 1, d), any_labels(b)
    )
    assert_close(found, expected, rtol=1e-6, atol=1e-12)


@drawn
@given(sizes, st.sampled_from(SIMILARITIES))
def test_zero_at_equality_and_in_any_batch_order(
    size: tuple[int, int, int], similarity: Similarity
) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made(similarity)
    assert_close(module(student, student, any_labels(b)).item(), 0.0)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    expected = module(student, teacher, any_labels(b))
    assert expected >= 0
    assert_close(module(student[order], teacher[order], any_labels(b) - 1), expected)


@drawn
@given(sizes, st.sampled_from(SIMILARITIES))
def test_precisions_agree(size: tuple[int, int, int], similarity: Similarity) -> None:
    b, d, seed = size
    student, teacher, module = normal(seed, b, d), normal(seed + 1, b, d), made(similarity)
    exact = module(student, teacher, any_labels(b))
    single = module(student.float(), teacher.float(), any_labels(b))
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)
    ours, theirs = student.bfloat16(), teacher.bfloat16()
    rounded = module(ours.double(), theirs.double(), any_labels(b))
    half = module(ours.float(), theirs.float(), any_labels(b))
    assert_close(half.double(), rounded, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_only_the_student_receives_gradients_and_there_is_no_state(similarity: Similarity) -> None:
    module = made(similarity)
    student, teacher = golden.S.clone().requires_grad_(), golden.T.clone().requires_grad_()
    module(student, teacher, golden.Y).backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None
    assert not module.state_dict()


@pytest.mark.parametrize("options", [{"similarity": "gram"}, {"global_batch": False}])
def test_conforms_with_other_options(options: dict[str, object]) -> None:
    check_method(lambda weight=1.0: SP(weight=weight, **options))  # type: ignore[arg-type]


def test_an_unknown_similarity_is_refused() -> None:
    with pytest.raises(
        KDHooksError, match="sp: similarity must be one of 'cosine', 'gram'; found 'dot'"
    ):
        SP(similarity="dot")  # type: ignore[arg-type]  # the mistake


# --- two ranks against one process -----------------------------------------------------------


def _scenario(similarity: Similarity, global_batch: bool) -> Results:
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    embedding = student(mine(normal(23, 6, 5)))
    loss = made(similarity, global_batch)(embedding, mine(normal(24, 6, 7)), mine(any_labels(6)))
    loss.backward()
    return {"loss": loss.detach(), "gradients": mean_gradients(student)}


def _scenarios() -> dict[str, Results]:
    return {
        f"{similarity} {'global' if everywhere else 'local'}": _scenario(similarity, everywhere)
        for similarity in SIMILARITIES
        for everywhere in (True, False)
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_global_batch_is_that_of_one_process(
    similarity: Similarity, ranks: list[dict[str, Results]]
) -> None:
    alone = _scenario(similarity, global_batch=True)
    for found in ranks:
        assert_close(found[f"{similarity} global"], alone, rtol=1e-9, atol=1e-12)
    assert any(gradient.abs().max() > 1e-3 for gradient in alone["gradients"].values())


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_local_batch_is_each_ranks_own(
    similarity: Similarity, ranks: list[dict[str, Results]]
) -> None:
    first, second = (found[f"{similarity} local"]["loss"] for found in ranks)
    assert not torch.isclose(first, second)
    weight, bias, x = normal(20, 4, 5), normal(21, 4), normal(23, 6, 5)
    halves = zip((x @ weight.T + bias).chunk(2), normal(24, 6, 7).chunk(2), strict=True)
    expected = [made(similarity)(s, t, any_labels(3)) for s, t in halves]
    assert_close([first, second], expected)
