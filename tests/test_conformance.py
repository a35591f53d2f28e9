"""Every installed method keeps the rules; and each rule can be broken."""

import pytest
import torch
from torch import Tensor, nn

from kdhooks import EmbeddingTap, hookimpl, methods
from kdhooks.discovery import load
from kdhooks.testing import check_method


@pytest.mark.parametrize("name", [info.name for info in methods()])
def test_installed_method_conforms(name: str) -> None:
    check_method(load(name))


class _Mean(nn.Module):
    """A loss that keeps all rules; the classes below each break one."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher.detach()).square().mean()


class _Undocumented(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return super().forward(student, teacher, labels)


class _Leaking(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher).square().mean()


class _UnusedParameter(_Mean):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(1))


class _FirstSample(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return super().forward(student[:1], teacher[:1], labels) + 0 * student.sum()


class _Rounding(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        one = 1e4 if student.dtype == torch.float32 else 1e4 + 100
        return super().forward(student, teacher, labels) + one


class _HiddenState(_Mean):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        self.calls += 1
        return self.calls * super().forward(student, teacher, labels)


class _Method:
    def __init__(self, loss: type[nn.Module] = _Mean, weight: float = 1.0) -> None:
        self.loss, self.weight = loss, weight

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("mean", self.loss(), self.weight)


class _Unweighted(_Method):
    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("mean", self.loss())


class _Drawing(_Method):
    def __init__(self, loss: type[nn.Module] = _Mean, weight: float = 1.0) -> None:
        super().__init__(loss, weight)
        torch.rand(1)


def test_a_sound_method_conforms() -> None:
    check_method(_Method)


@pytest.mark.parametrize(
    ("loss", "rule"),
    [
        (_Undocumented, "documents its forward"),
        (_Leaking, "gives the teacher no gradient"),
        (_UnusedParameter, "trains its own parameter idle"),
        (_FirstSample, "ignores batch order"),
        (_Rounding, "agrees in float32 and float64"),
        (_HiddenState, "goes on exactly from its state dict"),
    ],
)
def test_a_broken_rule_is_named(loss: type[nn.Module], rule: str) -> None:
    with pytest.raises(AssertionError, match=f"mean: a method {rule}"):
        check_method(_Method, loss=loss)


def test_a_method_must_take_its_weight() -> None:
    with pytest.raises(AssertionError, match="mean: a method takes a weight"):
        check_method(_Unweighted)


def test_a_method_must_leave_the_generator_alone() -> None:
    with pytest.raises(AssertionError, match="leaves the global generator alone"):
        check_method(_Drawing)
