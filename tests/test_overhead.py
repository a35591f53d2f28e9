"""The Python calls and operators that kdhooks adds to a step, and the memory held afterwards."""

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.overhead.measures import calls, tensor_bytes
from benchmarks.overhead.ways import DIM, Pair, Step, by_hand, distilled, material, telling
from kdhooks import Distiller, KDHooksError, Teacher
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.fingerprints import ViewKeys

SIZE = 32

# 100 is the number in Python 3.11, where a comprehension is a call; later versions need fewer. The
# same count on the same step is 35 for hand-written hooks, 56 for torchdistill's hooks and 114 for
# its whole loop. About 25 calls are guards: of images, labels, batch sizes, overwritten arguments,
# terms that were not used, and numbers that are not finite. A step does not enter an autocast that
# is off already, which would be 7 more.
EXTRA_CALLS = 100


def pair() -> Pair:
    student, teacher = material(width=4, blocks=1, size=SIZE)
    return Pair(student, teacher, torch.device("cpu"))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, SIZE, SIZE, generator=generator) * 2 - 1, torch.arange(6)


def steady(step: Step) -> Step:
    """Run the first steps, which do the checks of the first step and create the gradients."""
    for _ in range(2):
        step(*batch())
    return step


def python_calls(step: Step) -> int:
    """Return the minimum of three steps, since a finaliser of another test may run in one."""
    images, labels = batch()
    steadily = partial(steady(step), images, labels)
    return min(calls(steadily).python for _ in range(3))


def test_a_step_adds_few_python_calls() -> None:
    """The comparison is the same loss without any hook, on models that return their maps."""
    step, _ = distilled(pair(), SIZE)
    assert python_calls(step) - python_calls(telling(pair())) <= EXTRA_CALLS


def test_one_more_call_per_tap_would_be_counted() -> None:
    distilled_pair = pair()
    step, _ = distilled(distilled_pair, SIZE)
    before = python_calls(step)
    for module in distilled_pair.teacher.children():
        module.register_forward_hook(lambda module, args, output: None)
    assert python_calls(step) >= before + 5


def test_the_counted_steps_have_the_same_gradients() -> None:
    gradients = []
    for way in (telling, by_hand, lambda pair: distilled(pair, SIZE)[0]):
        trained = pair()
        way(trained)(*batch())
        gradients.append([parameter.grad for parameter in trained.trained])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


class Operators(TorchDispatchMode):
    """Records the operators that the host starts, except views, which start no device work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(work: Callable[[], object]) -> list[str]:
    found = Operators()
    with found:
        work()
    return found.names


def test_a_key_takes_five_operators() -> None:
    """On a GPU, the host needs longer to start an operator than the GPU to compute it."""
    images, _ = batch()
    keys = ViewKeys()
    keys(images)
    assert operators(lambda: keys(images)) == ["add", "mul_", "add_", "mul", "sum"]


def test_a_step_of_hits_takes_few_operators_besides_the_keys_and_the_loss(tmp_path: Path) -> None:
    """They are the memory for the rows, their float32, and the term's weight with its gradient."""
    trained = pair()
    teacher = Teacher(trained.teacher, cache=CacheOptions(path=tmp_path))
    kd = Distiller(trained.student, teacher, ["fcd"], input_shape=(3, SIZE, SIZE))
    loss = kd.losses["fcd"]
    images, labels = batch()

    def step() -> None:
        task_loss = trained.student(images).sum()
        (term,) = kd(images, labels).values()
        (term + task_loss).backward()

    def without_kdhooks() -> None:
        embedding = trained.student(images)
        (loss(embedding, rows, labels) + embedding.sum()).backward()

    for _ in range(3):
        step()
    ours = operators(step)
    kd.remove()
    rows = torch.zeros(6, DIM)
    without_kdhooks()
    added = Counter(ours)
    added.subtract(operators(without_kdhooks))
    of_keys = {"add": 1, "mul_": 1, "add_": 1, "mul": 1, "sum": 1}
    added.subtract(of_keys)
    assert +added == {"empty": 1, "_to_copy": 1, "mul": 2}


def held_after(step: Callable[[Tensor, Tensor], object]) -> int:
    """Return the bytes still held in tensors that a step has created."""
    return tensor_bytes(lambda: step(*batch())).held


def test_nothing_is_held_after_a_step() -> None:
    step, _ = distilled(pair(), SIZE)
    metrics = 2 * 4  # the last value of each term, a float32
    assert held_after(steady(step)) == metrics


def test_a_tensor_that_a_tap_keeps_would_be_noticed() -> None:
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
    """The identity, which raises if `raises` is set."""

    raises = False

    def forward(self, x: Tensor) -> Tensor:
        if self.raises:
            raise RuntimeError("unlucky")
        return x


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nothing_is_held_after_a_model_raised(side: str) -> None:
    """An evaluation after the error holds nothing either."""
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
