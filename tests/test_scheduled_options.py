"""Every option that may follow a schedule acts in each step like the constant of that step."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import ClassShard, Distiller, KDHooksError, Schedule, methods
from kdhooks.discovery import create, load
from kdhooks.kinds import Bounds, Option, alternatives
from kdhooks.options import Options, declared_options
from kdhooks.testing import tiny_batch, tiny_teacher
from tests.small_distiller import student
from tests.transformers import TinyViT, teacher_of

STAGES = ("layer1", "layer2", "layer3", "layer4")
STEPS = 4
SMALL: dict[str, dict[str, Any]] = {
    "cakd": {"urfm": {"centres": 3, "width": 8, "heads": 2}, "prompts": {"number": 0}},
    "coupleface": {"k": 2, "q": 1.8},
    "gkd": {"largest": 3, "scale": 8.0},
}
# Further options without which an option has no effect.
WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("adadistill", "quality"): {"margin_type": "adaface"},
    ("cakd", "weight"): {"embedding_weight": 1.0},
    ("fitnet", "temperature"): {"distance": "kl"},
    ("cakd", "teacher_cls_weight"): {"prompts": {"number": 2}},
    ("proxylesskd", "m2"): {"margin_type": "combined"},
}
# Options that need a transformer as teacher, which has one stage here.
TRANSFORMER = {("cakd", "teacher_cls_weight")}
Outcome: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]  # the terms, and all gradients


def scheduled(made: type, prefix: str = "") -> Iterator[tuple[str, Option]]:
    """Yield the dotted names of a method's options that may follow a schedule."""
    for name, declared in declared_options(made).items():
        kinds = alternatives(declared.kind)
        if Schedule in kinds:
            yield prefix + name, declared
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Options) and kind is not Schedule:
                yield from scheduled(kind, f"{prefix}{name}.")


EVERY = [(info.name, path) for info in methods() for path, _ in scheduled(load(info.name))]
every_option = pytest.mark.parametrize(("name", "path"), EVERY)
# The clock of steps and epochs is the same for all options, so one of each method suffices.
one_option_each = pytest.mark.parametrize(("name", "path"), [*dict(EVERY).items()])


def declared(name: str, path: str) -> Option:
    return dict(scheduled(load(name)))[path]


def numbers(name: str, path: str) -> tuple[float, float]:
    """Return two numbers inside of the bounds, neither of them the default."""
    if (name, path) == ("coupleface", "q"):
        return 1.5, 1.9  # with smaller values the hinge is 0 between these networks
    default = declared(name, path).default
    return (0.5 * default, 0.75 * default) if default else (0.1, 0.3)


def distil(name: str, path: str, value: object, net: nn.Module, **more: Any) -> Distiller:
    """Return a Distiller of the method with one option set, with the same weights in each call."""
    options: dict[str, Any] = {"name": name, **SMALL.get(name, {}), **WITH.get((name, path), {})}
    *groups, last = path.split(".")
    table = options
    for group in groups:
        table[group] = dict(table.get(group, {}))
        table = table[group]
    table[last] = value
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    transformer = (name, path) in TRANSFORMER
    return Distiller(
        net,
        teacher_of(TinyViT) if transformer else tiny_teacher(),
        [create(options)],
        student_stages=STAGES,
        teacher_stages=["blocks.2"] if transformer else STAGES,
        head=ClassShard(rows, 0, 6),
        input_shape=(3, 32, 32),
        **more,
    )


def step(kd: Distiller, net: nn.Module) -> Outcome:
    """Run a step without an optimizer: only the state of the loss and of BatchNorm changes."""
    for trained in (kd, net):
        trained.zero_grad()
    images, labels = tiny_batch()
    net(images)
    terms = kd(images, labels)
    torch.stack(list(terms.values())).sum().backward()
    gradients = {
        f"{owner}.{key}": parameter.grad.clone()
        for owner, trained in (("loss", kd), ("student", net))
        for key, parameter in trained.named_parameters()
        if parameter.grad is not None
    }
    return {key: term.detach() for key, term in terms.items()}, gradients


def run(name: str, path: str, value: object, **more: Any) -> list[Outcome]:
    net = student()
    with distil(name, path, value, net, **more) as kd:
        return [step(kd, net) for _ in range(STEPS)]


@cache
def constant_run(name: str, path: str, number: float) -> list[Outcome]:
    return run(name, path, number)


def check_follows(found: list[Outcome], name: str, path: str, course: list[float]) -> None:
    """Check that each step is bit-identical to a run with that step's number as a constant."""
    constant = {number: constant_run(name, path, number) for number in set(course)}
    for place, number in enumerate(course):
        assert_close(found[place], constant[number][place], rtol=0, atol=0)
    first, last = (constant[number][-1] for number in (course[0], course[-1]))
    assert first[0] != last[0], "the option has no effect here, so nothing was compared"


@every_option
def test_a_schedule_is_a_constant_in_each_step(name: str, path: str) -> None:
    low, high = numbers(name, path)
    found = run(name, path, {"value": high, "initial": low, "start": 1, "warmup": 2})
    check_follows(found, name, path, [low, low, low + (high - low) / 2, high])


@one_option_each
def test_a_schedule_may_count_epochs(name: str, path: str) -> None:
    low, high = numbers(name, path)
    growing = {"value": high, "initial": low, "warmup": 1.5, "unit": "epoch"}
    found = run(name, path, growing, steps_per_epoch=2)
    check_follows(found, name, path, [low + (high - low) * k / 3 for k in range(3)] + [high])


@every_option
def test_a_function_of_the_step_is_a_constant_in_each_step(name: str, path: str) -> None:
    low, high = numbers(name, path)
    found = run(name, path, lambda step: high if step % 2 else low)
    check_follows(found, name, path, [low, high, low, high])


@one_option_each
def test_a_schedule_resumes_bit_by_bit_from_the_distillers_state_dict(name: str, path: str) -> None:
    low, high = numbers(name, path)
    growing = {"value": high, "initial": low, "warmup": 4}
    straight = run(name, path, growing)
    net, resumed = student(), student()
    with distil(name, path, growing, net) as kd:
        for _ in range(2):
            step(kd, net)
        states = kd.state_dict(), net.state_dict()
    with distil(name, path, growing, resumed) as kd:
        kd.load_state_dict(states[0])
        resumed.load_state_dict(states[1])
        found = [step(kd, resumed) for _ in range(2)]
    assert_close(found, straight[2:], rtol=0, atol=0)


def outside(bounds: Bounds) -> float:
    for bound in (bounds.least, bounds.above):
        if bound is not None:
            return bound - 1
    raise AssertionError("an option without a lower bound")


@every_option
def test_a_function_out_of_bounds_is_refused_in_its_step(name: str, path: str) -> None:
    low, _ = numbers(name, path)
    wrong = outside(declared(name, path).bounds)
    net = student()
    *groups, last = path.split(".")
    where = ": ".join([name, *groups, last])
    with distil(name, path, lambda step: wrong if step == 2 else low, net) as kd:
        for _ in range(2):
            step(kd, net)
        rule = f"{where} in step 2 must be {declared(name, path).bounds}.*; found {wrong}"
        with pytest.raises(KDHooksError, match=rf"^{rule}"):
            step(kd, net)


class Falling:
    def __call__(self, step: int) -> float:
        return 1.0 - step


@pytest.mark.parametrize("function", [Falling(), partial(pow, -1.0)])
def test_every_callable_is_checked(function: Callable[[int], float]) -> None:
    net = student()
    with distil("kd", "temperature", function, net) as kd:
        step(kd, net)
        with pytest.raises(
            KDHooksError, match=r"^kd: temperature in step 1 must be above 0; found"
        ):
            step(kd, net)


@pytest.mark.parametrize("result", [None, "2", True, torch.ones(()), float("nan")])
def test_a_result_that_is_no_finite_number_is_refused(result: Any) -> None:
    net = student()
    rule = "^kd: temperature in step 0 must be (a number|finite); found"
    with (
        distil("kd", "temperature", lambda step: result, net) as kd,
        pytest.raises(KDHooksError, match=rule),
    ):
        step(kd, net)


@every_option
@pytest.mark.parametrize("key", ["value", "initial"])
def test_a_schedule_out_of_bounds_is_refused_at_the_start(name: str, path: str, key: str) -> None:
    low, high = numbers(name, path)
    table = {"value": high, "initial": low, "warmup": 2, key: outside(declared(name, path).bounds)}
    with pytest.raises(KDHooksError, match=rf"^{name}: {path}\.{key} must be "):
        distil(name, path, table, student())
