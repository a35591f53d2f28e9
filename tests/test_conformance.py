"""Every installed method follows the rules, and a method that breaks a rule is noticed."""

import random
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, FeatureTap, KDHooksError, Teacher, hookimpl, methods
from kdhooks.discovery import load
from kdhooks.testing import check_method, tiny_teacher


@pytest.mark.parametrize("name", [info.name for info in methods()])
def test_installed_method_conforms(name: str) -> None:
    check_method(load(name))


@pytest.mark.parametrize("name", ["acsr", "at", "cakd", "fitnet", "fskd", "reviewkd"])
def test_installed_method_conforms_with_equal_stages(name: str) -> None:
    check_method(load(name), teacher=partial(tiny_teacher, width=4))


class _Scoring(nn.Module):
    """A network that returns class scores; its embedding is what `net` returns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(images)[:, :5]
        return scores


def _scoring_teacher() -> Teacher:
    teacher = tiny_teacher()
    assert teacher.module is not None
    return Teacher(_Scoring(teacher.module), embedding="net", classifier=teacher.classifier)


@pytest.mark.parametrize("name", [info.name for info in methods()])
def test_installed_method_conforms_if_the_teacher_returns_class_scores(name: str) -> None:
    """As mmpretrain's classifiers do: the embedding is the output of a submodule."""
    stages = [f"net.layer{number}" for number in range(1, 5)]
    check_method(load(name), teacher=_scoring_teacher, teacher_stages=stages)


class _Described(_Scoring):
    """A network that returns its embedding in a dict."""

    def forward(self, images: Tensor) -> Any:
        return {"embedding": self.net(images)}


def _described_teacher() -> Teacher:
    teacher = tiny_teacher()
    assert teacher.module is not None
    return Teacher(
        _Described(teacher.module),
        run=lambda model, images: model(images)["embedding"],
        classifier=teacher.classifier,
    )


@pytest.mark.parametrize("name", [info.name for info in methods()])
def test_installed_method_conforms_if_a_function_runs_the_teacher(name: str) -> None:
    """The embedding is what that function returns, which no submodule does."""
    stages = [f"net.layer{number}" for number in range(1, 5)]
    check_method(load(name), teacher=_described_teacher, teacher_stages=stages)


class _Mean(nn.Module):
    """A loss that follows all rules; each class below breaks one."""

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


class _LateCounter(_HiddenState):
    """The number of calls only matters from the fifth call on."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        self.calls += 1
        return max(1, self.calls - 3) * _Mean.forward(self, student, teacher, labels)


class _Queue(_Mean):
    def __init__(self) -> None:
        super().__init__()
        self.past: list[Tensor] = []

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        self.past = [*self.past[-1:], teacher.detach()]
        return super().forward(student, torch.stack(self.past).mean(dim=0), labels)


class _KeepsGraph(_Mean):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        value = super().forward(student, teacher, labels)
        self.total = self.total + value
        return value


class _EditsLabels(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        labels += 1
        return super().forward(student, teacher, labels)


class _ClampsLabels(_Mean):
    """Changes only labels of -1."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        labels.clamp_(min=0)
        return super().forward(student, teacher, labels)


class _EditsStudent(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        student.data.copy_(F.normalize(student.detach()))
        return super().forward(student, teacher, labels)


class _EditsTeacher(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        teacher.data.copy_(F.normalize(teacher.detach()))
        return super().forward(student, teacher, labels)


class _Draws(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return super().forward(F.dropout(student, 0.5), teacher, labels)


class _DrawsElsewhere(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return super().forward(student * random.random(), teacher, labels)


class _Bfloat16(_Mean):
    """Rounds to bfloat16, whatever the precision of the inputs."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        value = super().forward(student.bfloat16(), teacher.bfloat16(), labels)
        return value.to(student.dtype)


class _Autocast(_Mean):
    same: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("same", torch.eye(12))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        with torch.autocast("cpu", torch.bfloat16):
            student = student @ self.same
        return super().forward(student.to(teacher.dtype), teacher, labels)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient.bfloat16().float() if gradient.dtype == torch.float32 else gradient


class _RoundedGradient(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        rounded: Tensor = _Rounded.apply(student)  # type: ignore[no-untyped-call]  # torch's
        return super().forward(rounded, teacher, labels)


class _SlightRounding(_Mean):
    """Errs as much as bfloat16 in a mean over the batch."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        value = super().forward(student, teacher, labels)
        return value + 1e-4 * value.detach() * (value.dtype == torch.float32)


class _Detached(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return super().forward(student.detach(), teacher, labels) + 0 * student.sum()


class _Crash(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        share = F.one_hot(labels, 6).to(student).mean()
        return share * super().forward(student, teacher, labels)


class _NoSampleLeft(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        known = labels >= 0
        return ((student - teacher.detach()).square().mean(dim=1) * known).sum() / known.sum()


class _LastClass(_Mean):
    """Weights each class, and treats a sample without a class as the last class."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        weights = torch.arange(1.0, 7.0)[labels].to(student)
        return ((student - teacher.detach()).square().mean(dim=1) * weights).mean()


class _FirstClass(_LastClass):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return super().forward(student, teacher, labels.clamp(min=0))


class _Sum(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher.detach()).square().sum()


class _Variance(_Mean):
    """Divides by the variance over the batch, which a single sample does not have."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        gaps = (student - teacher.detach()).square().mean(dim=1)
        variance = (gaps - gaps.mean()).square().sum() / (len(gaps) - 1)
        return gaps.mean() / (1 + variance)


class _OtherSample(_Mean):
    """Needs two samples, and does not say so."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return super().forward(student, teacher, labels) + 0 * student[1].sum()


class _RefusesOne(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        if len(student) < 2:
            raise KDHooksError("mean: a batch must have at least two samples; found one")
        return super().forward(student, teacher, labels)


class _Root(_Mean):
    """Has no finite gradient at 0."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher.detach()).square().sum(dim=1).sqrt().mean()


class _RootOfFeatures(nn.Module):
    def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        ours, theirs = student[0].mean(dim=1), teacher[0].detach().mean(dim=1)
        return (ours - theirs).square().sum(dim=(1, 2)).sqrt().mean()


class _Method:
    def __init__(self, loss: type[nn.Module] = _Mean, weight: float = 1.0) -> None:
        self.loss, self.weight = loss, weight

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("mean", self.loss(), self.weight)


class _FeatureMethod(_Method):
    @hookimpl
    def feature_tap(self) -> FeatureTap:
        paths = ("layer4",)
        return FeatureTap("roots", _RootOfFeatures(), self.weight, student=paths, teacher=paths)


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


def test_a_method_may_refuse_a_batch_of_one_sample() -> None:
    check_method(_Method, loss=_RefusesOne)


@pytest.mark.parametrize(
    ("loss", "rule"),
    [
        (_Undocumented, "documents its forward"),
        (_Leaking, "gives the teacher no gradient"),
        (_UnusedParameter, "trains its own parameter idle"),
        (_FirstSample, "ignores batch order"),
        (_Rounding, "agrees in float32 and float64"),
        (_HiddenState, "resumes exactly from its state dict"),
        (_LateCounter, "resumes exactly from its state dict"),
        (_Queue, "resumes exactly from its state dict"),
        (_KeepsGraph, r"keeps no graph in its buffers; found \['total'\]"),
        (_EditsLabels, "runs in a Distiller; mean: its loss wrote into one of its arguments"),
        (_ClampsLabels, "runs in a Distiller; mean: its loss wrote into one of its arguments"),
        (_EditsStudent, "leaves the student's tensors unchanged"),
        (_EditsTeacher, "leaves the teacher's tensors unchanged"),
        (_Draws, "draws nothing from torch's global generator in a step"),
        (_DrawsElsewhere, "returns the same value for the same call"),
        (_Bfloat16, r"computes in float32 or better; found {torch.bfloat16}"),
        (_Autocast, r"computes in float32 or better; found {torch.bfloat16}"),
        (_SlightRounding, "agrees in float32 and float64"),
        (_RoundedGradient, "has the same gradient in float32 and float64"),
        (_Detached, "gives every tapped tensor of the student a gradient other than zero"),
        (_Crash, "accepts a label of -1, a sample without a class; found RuntimeError"),
        (_NoSampleLeft, "stays finite on a label of -1"),
        (_LastClass, "counts a label of -1 as no class, not as class 5"),
        (_FirstClass, "counts a label of -1 as no class, not as class 0"),
        (_Sum, r"takes the mean over the batch and not the sum; .* 2.00 times"),
        (_Variance, "stays finite on a batch of one sample"),
        (_OtherSample, "accepts a batch of one sample, or raises KDHooksError; found IndexError"),
        (_Root, "has a finite value and gradient if the student equals the teacher"),
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


class _UsesLabels(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        value: Tensor = (student - teacher.detach()).square().mean()
        return value * (2 if labels is None else 1)


class _CannotDoWithout(_Mean):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        value: Tensor = (student - teacher.detach())[labels > -9].square().mean()
        return value


class _WithoutLabels:
    def __init__(self, loss: type[nn.Module], weight: float = 1.0) -> None:
        self.loss, self.weight = loss, weight

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("mean", self.loss(), self.weight, needs_labels=False)


@pytest.mark.parametrize(
    ("loss", "rule"),
    [
        (_UsesLabels, "ignores the labels if it declares needs_labels=False"),
        (_CannotDoWithout, "that declares needs_labels=False accepts labels of None; found Type"),
    ],
)
def test_a_method_that_declares_to_need_no_labels_ignores_them(
    loss: type[nn.Module], rule: str
) -> None:
    check_method(_WithoutLabels, loss=_Mean)
    with pytest.raises(AssertionError, match=f"mean: a method {rule}"):
        check_method(_WithoutLabels, loss=loss)


def test_equal_stages_must_have_a_gradient() -> None:
    rule = "roots: a method has a finite value and gradient if the student equals the teacher"
    check_method(_FeatureMethod)  # stages of different widths are never equal
    with pytest.raises(AssertionError, match=rule):
        check_method(_FeatureMethod, teacher=partial(tiny_teacher, width=4))
