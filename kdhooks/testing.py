"""Conformance: what every method must do, checked without a test of its own.

from kdhooks.testing import check_method

def test_conforms() -> None:
    check_method(MyMethod, k=2)
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.declarations import ParameterTap, Tap
from kdhooks.distiller import Distiller
from kdhooks.teacher.teacher import Teacher

Arguments: TypeAlias = tuple[Any, ...]
"""What a loss is called with: tensors, lists of tensors, shards, None."""

_CLASSES = 6
_STAGES = ("layer1", "layer2", "layer3", "layer4")


class TinyFaceNet(nn.Module):
    """Four stages and an embedding: the smallest thing with the shape of a face network."""

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


def tiny_teacher(dim: int = 12) -> Teacher:
    """A TinyFaceNet that has seen data, with class rows that fit `tiny_batch`."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        network = TinyFaceNet(dim, width=6)
    images, labels = tiny_batch(copies=4)
    with torch.no_grad():
        for _ in range(20):
            network(images)
        embedding = F.normalize(network.eval()(images))
    rows = [embedding[labels == label].mean(dim=0) for label in range(_CLASSES)]
    return Teacher(network, classifier=torch.stack(rows))


def tiny_batch(copies: int = 2) -> tuple[Tensor, Tensor]:
    """(b 3 32 32) and (b): each class a pattern of its own, under a little noise."""
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
    """Raise AssertionError, naming the rule that is broken, unless the method keeps them all.

    method: its class, made with the options. student, teacher: makers of the models, for a method
    that needs others than a TinyFaceNet on both sides; they take (b 3 32 32).
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = student().train()
        rows = torch.randn(_CLASSES, 12, requires_grad=True)

    def distiller(network: nn.Module, **more: object) -> Distiller:
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
    made = distiller(network)
    name = made.taps[0].name if made.taps else str(method)
    _rule(torch.equal(before, torch.get_rng_state()), name, "leaves the global generator alone")
    for tap, arguments in _calls(made, network):
        _gradients(tap, arguments, adapted=made.adapter is not None)
        for check in (_contract, _order, _precision, _resume):
            check(tap, arguments)
    _weight_zero(distiller(network, weight=0.0), network)


def _calls(distiller: Distiller, student: nn.Module) -> list[tuple[Tap, Arguments]]:
    """Each tap with its loss as made, and what one step calls it with."""
    taps = [replace(tap, loss=copy.deepcopy(tap.loss)) for tap in distiller.taps]
    seen: dict[int, Arguments] = {}

    def note(loss: nn.Module, arguments: Arguments) -> None:
        seen[id(loss)] = _mapped(arguments, torch.Tensor.detach)

    for tap in distiller.taps:
        tap.loss.register_forward_pre_hook(note)
    images, labels = tiny_batch()
    student(images)
    distiller(images, labels)
    distiller.remove()
    return [(new, seen[id(old.loss)]) for new, old in zip(taps, distiller.taps, strict=True)]


# --- the rules -------------------------------------------------------------------------------


def _rule(kept: object, name: str, rule: str) -> None:
    if not kept:
        raise AssertionError(f"{name}: a method {rule}")


def _contract(tap: Tap, arguments: Arguments) -> None:
    """The first line of the loss's forward says what it is called with, and is true."""
    expected = tap.contract
    found = (tap.loss.forward.__doc__ or "").strip().split("\n")[0]
    _rule(found == expected, tap.name, f"documents its forward as {expected!r}; found {found!r}")
    value = _first(tap, arguments)
    _rule(value.ndim == 0 and bool(torch.isfinite(value)), tap.name, "gives a finite scalar")


def _gradients(tap: Tap, arguments: Arguments, adapted: bool) -> None:
    """They reach the student and the loss's own parameters, and nothing of the teacher."""
    loss = copy.deepcopy(tap.loss)
    sides = _mapped(arguments[:2], lambda x: x.clone().requires_grad_())
    _value(loss, (*sides, *arguments[2:])).backward()
    for tensor in _tensors(sides[:1]):
        moved = tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())
        _rule(moved, tap.name, "gives all that it taps of the student a finite gradient")
    for name, parameter in loss.named_parameters():
        _rule(parameter.grad is not None, tap.name, f"trains its own parameter {name}")
    if not adapted:
        leaks = [x for x in _tensors(sides[1:]) if x.grad is not None]
        _rule(not leaks, tap.name, "gives the teacher no gradient")


def _order(tap: Tap, arguments: Arguments) -> None:
    if isinstance(tap, ParameterTap):
        return
    flipped = (*_mapped(arguments[:3], lambda x: x.flip(0)), *arguments[3:])
    _agree(tap, _first(tap, flipped), _first(tap, arguments), "ignores batch order")


def _precision(tap: Tap, arguments: Arguments) -> None:
    double = copy.deepcopy(tap.loss).double()
    exact = _value(double, _mapped(arguments, lambda x: x.double() if x.is_floating_point() else x))
    _agree(tap, _first(tap, arguments), exact, "agrees in float32 and float64")
    rounded = _mapped(arguments, lambda x: x.bfloat16().float() if x.is_floating_point() else x)
    finite = torch.isfinite(_first(tap, rounded))
    _rule(finite, tap.name, "bears inputs that were rounded to bfloat16")


def _resume(tap: Tap, arguments: Arguments) -> None:
    """What two steps left behind is all in the state dict."""
    straight, resumed = copy.deepcopy(tap.loss), copy.deepcopy(tap.loss)
    for _ in range(2):
        straight(*arguments)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    same = torch.equal(_value(straight, arguments), _value(resumed, arguments))
    _rule(same, tap.name, "goes on exactly from its state dict")
    graphs = [name for name, buffer in straight.named_buffers() if buffer.requires_grad]
    _rule(not graphs, tap.name, f"keeps no graph in its buffers; found {graphs}")


def _weight_zero(distiller: Distiller, student: nn.Module) -> None:
    images, labels = tiny_batch()
    student.zero_grad()
    student(images)
    terms = distiller(images, labels)
    sum(terms.values(), start=torch.zeros(())).backward()
    distiller.remove()
    for name, term in terms.items():
        _rule(term == 0, name, "takes a weight, and gives 0 when that is 0")
        moved = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()]
        _rule(not moved, name, f"moves nothing with weight 0; found {moved}")


# --- small things ----------------------------------------------------------------------------


def _value(loss: nn.Module, arguments: Arguments) -> Tensor:
    result = loss(*arguments)
    value: Tensor = result[0] if isinstance(result, tuple) else result
    return value


def _first(tap: Tap, arguments: Arguments) -> Tensor:
    """The loss as it was made; the tap's own state stays as it is."""
    return _value(copy.deepcopy(tap.loss), arguments)


def _agree(tap: Tap, found: Tensor, expected: Tensor, rule: str) -> None:
    close = torch.isclose(found.double(), expected.double(), rtol=1e-3, atol=1e-4)
    _rule(close, tap.name, f"{rule}; found {found.item()} and {expected.item()}")


def _tensors(arguments: Arguments | list[Any]) -> Iterator[Tensor]:
    for item in arguments:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, ClassShard):
            yield item.weight
        elif isinstance(item, list):
            yield from _tensors(item)


def _mapped(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    return tuple(_map_one(item, change) for item in arguments)


def _map_one(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, ClassShard):
        return replace(item, weight=change(item.weight))
    return [_map_one(x, change) for x in item] if isinstance(item, list) else item
