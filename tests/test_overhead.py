"""What kdhooks adds to a step, in Python calls, and what it holds after one: nothing."""

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.overhead.measures import calls, tensor_bytes
from benchmarks.overhead.ways import Pair, Step, by_hand, distilled, material, telling
from kdhooks import KDHooksError

SIZE = 32

# 86 in Python 3.11, where a comprehension is a call; fewer in later ones. On the same step and
# counted alike: 35 for hooks by hand, 56 for torchdistill's hooks, 114 for its whole loop.
EXTRA_CALLS = 88


def pair() -> Pair:
    student, teacher = material(width=4, blocks=1, size=SIZE)
    return Pair(student, teacher, torch.device("cpu"))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, SIZE, SIZE, generator=generator) * 2 - 1, torch.arange(6)


def steady(step: Step) -> Step:
    """After the first steps, which check what is checked once, and make the gradients."""
    for _ in range(2):
        step(*batch())
    return step


def python_calls(step: Step) -> int:
    images, labels = batch()
    return calls(partial(steady(step), images, labels)).python


def test_a_step_adds_few_python_calls() -> None:
    """To the same loss of models that return their maps, without any hook."""
    step, _ = distilled(pair(), SIZE)
    assert python_calls(step) - python_calls(telling(pair())) <= EXTRA_CALLS


def test_a_call_more_for_each_tap_would_be_counted() -> None:
    distilled_pair = pair()
    step, _ = distilled(distilled_pair, SIZE)
    before = python_calls(step)
    for module in distilled_pair.teacher.children():
        module.register_forward_hook(lambda module, args, output: None)
    assert python_calls(step) >= before + 5


def test_the_step_that_is_counted_computes_what_the_loop_by_hand_does() -> None:
    gradients = []
    for way in (telling, by_hand, lambda pair: distilled(pair, SIZE)[0]):
        trained = pair()
        way(trained)(*batch())
        gradients.append([parameter.grad for parameter in trained.trained])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def held_after(step: Callable[[Tensor, Tensor], object]) -> int:
    """Bytes in tensors that a batch and its step made."""
    return tensor_bytes(lambda: step(*batch())).held


def test_nothing_is_held_after_a_step() -> None:
    step, _ = distilled(pair(), SIZE)
    metrics = 2 * 4  # the last value of each term, a float32
    assert held_after(steady(step)) == metrics


def test_what_a_tap_kept_would_be_noticed() -> None:
    trained = pair()
    step, _ = distilled(trained, SIZE)
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output)

    trained.teacher.get_submodule("stage4").register_forward_hook(keep)
    assert held_after(steady(step)) > 6 * 32 * 2 * 2 * 4


def test_nothing_is_held_after_an_evaluation() -> None:
    trained = pair()
    steady(distilled(trained, SIZE)[0])

    def evaluate(images: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            trained.student.eval()(images)

    assert held_after(evaluate) == 0


class Unlucky(nn.Module):
    """Raises when it is told to; the identity else."""

    raises = False

    def forward(self, x: Tensor) -> Tensor:
        if self.raises:
            raise RuntimeError("unlucky")
        return x


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nothing_is_held_after_a_model_raised(side: str) -> None:
    """Nor by the evaluation that comes then."""
    trained = pair()
    unlucky = Unlucky()
    getattr(trained, side).embedding.append(unlucky)
    step, kd = distilled(trained, SIZE)
    steady(step)
    unlucky.raises = True

    def fail(images: Tensor, labels: Tensor) -> None:
        with contextlib.suppress(RuntimeError):
            step(images, labels)
        unlucky.raises = False
        with torch.no_grad():
            trained.student.eval()(images)
            trained.teacher(images)

    assert held_after(fail) == 0
    assert kd.pending is None


@pytest.mark.parametrize("match", ["of the same samples", "overwritten in place"])
def test_nothing_is_held_after_the_distiller_raised(match: str) -> None:
    trained = pair()
    step, kd = distilled(trained, SIZE)
    steady(step)

    def fail(images: Tensor, labels: Tensor) -> None:
        embedding = trained.student(images)
        if match == "overwritten in place":
            embedding.mul_(2)
        with pytest.raises(KDHooksError, match=match):
            kd(images, labels[1:])

    assert held_after(fail) == 0
