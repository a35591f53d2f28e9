"""Teacher-head distillation is logit distillation with the teacher's rows on both sides."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kdhooks import ClassShard, KDHooksError, Model
from kdhooks.testing import check_method
from kdhooks_plugins.thkd import THKD
from tests.maps import normal
from tests.references import kd as reference
from tests.references.differences import central_differences


def declared(width: int = 4, **options: Any) -> nn.Module:
    return THKD(**options).classifier_share(Model(None, width), Model(None, 4)).loss


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("scale", [8.0, 64.0])
@pytest.mark.parametrize(("b", "c", "e"), [(1, 2, 3), (5, 4, 6), (4, 7, 2)])
def test_agrees_with_the_equation(b: int, c: int, e: int, scale: float, temperature: float) -> None:
    student, teacher = normal(1, b, e).requires_grad_(), normal(2, b, e)
    rows, labels = normal(3, c, e).requires_grad_(), torch.zeros(b, dtype=torch.long)
    options: dict[str, Any] = {"temperature": temperature, "scale": scale}
    value, _ = declared(**options)(student, teacher, labels, ClassShard(rows, 0, c))
    value.backward()
    w = rows.detach().numpy()

    def by_loop(x: np.ndarray) -> float:
        return reference.distillation(x, teacher.numpy(), labels.numpy(), w, w, **options)

    at = student.detach().numpy()
    assert_close(value.item(), by_loop(at))
    assert student.grad is not None
    found = central_differences(by_loop, at)
    assert_close(student.grad.numpy(), found, rtol=1e-5, atol=1e-6)
    assert rows.grad is None, "the teacher's classifier is frozen"


def test_equal_embeddings_have_zero_loss() -> None:
    student = normal(1, 5, 4).requires_grad_()
    rows = ClassShard(normal(2, 7, 4), 0, 7)
    value, _ = declared()(student, 3 * student.detach(), torch.zeros(5, dtype=torch.long), rows)
    value.backward()
    assert student.grad is not None
    assert_close(value.item(), 0.0, rtol=0, atol=1e-9)
    assert_close(student.grad.abs().max().item(), 0.0, rtol=0, atol=1e-9)


def test_conforms_with_options() -> None:
    check_method(THKD, temperature=2.0, scale=32.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0; found 0"),
        ({"scale": -1.0}, "scale must be above 0; found -1"),
        ({"width": 3}, "as wide as the teacher's rows; found 3 and 4"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=f"thkd: .*{message}"):
        declared(**options)
