"""Conformance: checks the rules that every method must follow, with one call for each method.

from kdhooks.testing import check_method

def test_conforms() -> None:
    check_method(MyMethod, k=2)
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks.teacher.teacher import Teacher
from kdhooks.testing.loss_calls import Arguments, Case, mapped, require
from kdhooks.testing.rules import check_loss

_CLASSES = 6
_STAGES = ("layer1", "layer2", "layer3", "layer4")


class TinyFaceNet(nn.Module):
    """A minimal face network, with four stages and an embedding."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, dim: int = 12, width: int = 4) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 3 * width, 4 * width]
        for stage, (inside, outside) in zip(_STAGES, itertools.pairwise(widths), strict=True):
            conv = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
            self.add_module(stage, nn.Sequential(conv, nn.BatchNorm2d(outside), nn.PReLU()))
        self.fc = nn.Linear(widths[-1] * 4, dim)
        self.features = nn.BatchNorm1d(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 32 32) -> (b d)."""
        x = images
        for stage in _STAGES:
            x = self.get_submodule(stage)(x)
        embedding: Tensor = self.features(self.fc(x.flatten(1)))
        return embedding


def tiny_teacher(dim: int = 12, width: int = 6) -> Teacher:
    """Return a TinyFaceNet with batch statistics, and with class rows that fit `tiny_batch`."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        network = TinyFaceNet(dim, width)
    images, labels = tiny_batch(copies=4)
    with torch.no_grad():
        for _ in range(20):
            network(images)
        embedding = F.normalize(network.eval()(images))
    rows = [embedding[labels == label].mean(dim=0) for label in range(_CLASSES)]
    return Teacher(network, classifier=torch.stack(rows))


def tiny_batch(copies: int = 2) -> tuple[Tensor, Tensor]:
    """Return images (b 3 32 32) and labels (b); each class has its own pattern, with some noise."""
    generator = torch.Generator().manual_seed(2)
    patterns = torch.rand(_CLASSES, 3, 4, 4, generator=generator) * 2 - 1
    labels = torch.arange(_CLASSES).repeat(copies)
    images = F.interpolate(patterns, 32)[labels]
    return images + 0.1 * torch.randn(images.shape, generator=generator), labels


def check_method(
    method: Callable[..., object],
    *,
    student: Callable[[], nn.Module] = TinyFaceNet,
    teacher: Callable[[], Teacher] = tiny_teacher,
    student_stages: Sequence[str] = _STAGES,
    teacher_stages: Sequence[str] = _STAGES,
    **options: object,
) -> None:
    """Check that a method follows all rules; otherwise raise AssertionError with the broken rule.

    method: its class, created with the options.
    student, teacher: functions that create models for images (b 3 32 32). They are needed if the
        method cannot run on two networks of class TinyFaceNet. With `teacher=lambda:
        tiny_teacher(width=4)` the stages of both sides have the same shapes, so that a loss on
        features is also checked for a student that equals the teacher.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = student().train()
        rows = torch.randn(_CLASSES, 12, requires_grad=True)

    def distiller(**more: object) -> Distiller:
        return Distiller(
            network,
            teacher(),
            [method(**{**options, **more})],
            student_stages=student_stages,
            teacher_stages=teacher_stages,
            head=ClassShard(rows, 0, _CLASSES),
            input_shape=(3, 32, 32),
        )

    before = torch.get_rng_state()
    made = distiller()
    name = made.taps[0].name if made.taps else str(method)
    require(torch.equal(before, torch.get_rng_state()), name, "leaves the global generator alone")
    for case in _cases(made, network, distiller):
        check_loss(case)
    _weight_zero(distiller(weight=0.0), network)


def _cases(distiller: Distiller, student: nn.Module, again: Callable[[], Distiller]) -> list[Case]:
    """Return each tap with its loss in the initial state, and the loss's arguments in one step."""
    taps = [replace(tap, loss=copy.deepcopy(tap.loss)) for tap in distiller.taps]
    seen: dict[int, Arguments] = {}

    def note(loss: nn.Module, arguments: Arguments) -> None:
        # Copies, since the loss that runs next may change the tensors in place.
        seen[id(loss)] = mapped(arguments, lambda x: x.detach().clone())

    for tap in distiller.taps:
        tap.loss.register_forward_pre_hook(note)
    images, labels = tiny_batch()
    student(images)
    try:
        distiller(images, labels)
    except KDHooksError as error:
        names = ", ".join(tap.name for tap in taps)
        raise AssertionError(f"{names}: a method runs in a Distiller; {error}") from error
    finally:
        distiller.remove()

    def loss_made_again(name: str) -> nn.Module:
        other = again()
        other.remove()
        return other.losses[name]

    adapted = distiller.adapter is not None
    return [
        Case(new, seen[id(old.loss)], partial(loss_made_again, new.name), adapted)
        for new, old in zip(taps, distiller.taps, strict=True)
    ]


def _weight_zero(distiller: Distiller, student: nn.Module) -> None:
    """Check that a weight of 0 leaves the student unchanged."""
    images, labels = tiny_batch()
    student.zero_grad()
    student(images)
    terms = distiller(images, labels)
    sum(terms.values(), start=torch.zeros(())).backward()
    distiller.remove()
    for name, term in terms.items():
        require(term == 0, name, "takes a weight, and returns 0 if that is 0")
        moved = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()]
        require(not moved, name, f"has no gradient if its weight is 0; found one for {moved}")
