"""Every method trains on another device than the CPU, and lets the host run ahead of it.

Each test runs on a device that is written in Python, which needs no GPU, and again on CUDA if
there is a GPU: see `second_device`.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import ClassShard, Distiller, EmbeddingTap, hookimpl, methods
from kdhooks.discovery import load
from kdhooks.later import Sent
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.teacher import Teacher
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests import second_streams
from tests.second_device import FAR, NAME, Device, device_at
from tests.transformers import TinyViT, teacher_of

only_far = pytest.mark.parametrize("place", [FAR], indirect=True)
WAITED = {NAME: "the host waits for the device: aten.", "cuda": "called a synchronizing CUDA "}
MIXED = {NAME: r"on one device; aten.mul.Tensor found far:0 and", "cuda": "on the same device"}

STAGES = ("layer1", "layer2", "layer3", "layer4")
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
STEPS = 4
NAMES = [info.name for info in methods()]
WARM_UP = {"value": 0.5, "warmup": 2}


def run(teacher: Teacher, **options: Any) -> Teacher:
    """Return the same teacher with other options."""
    assert teacher.module is not None
    return Teacher(teacher.module, classifier=teacher.classifier, **options)


def trained(
    place: str,
    make: Callable[[], object],
    transformer: bool = False,
    waits: int = 1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Tensor]:
    """Return the loss of each step, followed by the student's and the losses' weights.

    waits: the number of first steps in which the host may wait; dtype: of all weights and images;
    options: of the teacher.
    """
    device = device_at(place)
    with device:
        torch.manual_seed(0)
        student = TinyFaceNet().to(place, dtype).train()
        rows = nn.Parameter(torch.randn(6, 12).to(place, dtype))
        teacher = teacher_of(TinyViT) if transformer else tiny_teacher()
        assert teacher.module is not None
        teacher.module.to(dtype)
        kd = Distiller(
            student,
            run(teacher, **options),
            [make()],
            student_stages=STAGES,
            teacher_stages=BLOCKS if transformer else STAGES,
            head=ClassShard(rows, 0, 6),
            input_shape=(3, 32, 32),
        ).to(dtype)
        images, labels = (x.to(place) for x in tiny_batch())
        images = images.to(dtype)
        learned = [*student.parameters(), *kd.parameters(), rows]
        optimizer = torch.optim.SGD(learned, lr=0.01, momentum=0.9)
        losses = []
        for step in range(STEPS):
            with nullcontext() if step < waits else device.never_waited_for():
                task = student(images).square().mean()
                loss = torch.stack([task, *kd(images, labels).values()]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(loss)
        kd.check_finite()
        kd.remove()
        assert not second_streams.faults  # always empty on CUDA
        return [x.detach().cpu() for x in (*losses, *learned)]


def method(name: str, **options: Any) -> object:
    return load(name)(**options)


def compare(
    process: ProcessPoolExecutor, place: str, make: Callable[[], object], **options: Any
) -> None:
    """Train on the device and on the CPU, and compare.

    CUDA sums in another order than the CPU, and some methods amplify this difference in float32
    from step to step. So on CUDA, only the first loss is compared in float32, and all steps in
    float64.
    """
    there = process.submit(trained, place, make, **options).result()
    here = process.submit(trained, "cpu", make, **options).result()
    if place == NAME:
        assert_close(there, here)
        return
    assert_close(there[0], here[0], rtol=1e-3, atol=1e-4)
    assert all(tensor.isfinite().all() for tensor in there)
    there, here = (
        process.submit(trained, at, make, dtype=torch.float64, **options).result()
        for at in (place, "cpu")
    )
    assert_close(there, here, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_on_another_device_and_never_waits(
    process: ProcessPoolExecutor, place: str, name: str
) -> None:
    """The first step may wait, because its checks do."""
    compare(process, place, partial(method, name))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coupleface", {"k": 2, "relations": "bank", "bank_momentum": 0.5, "alpha": WARM_UP}),
        ("fcd", {"projector": True}),
        ("proxylesskd", {"projector": True, "extra_fcd_weight": 1.0, "m": WARM_UP}),
    ],
)
def test_an_options_state_trains_on_another_device_and_never_waits(
    process: ProcessPoolExecutor, place: str, name: str, options: dict[str, Any]
) -> None:
    compare(process, place, partial(method, name, **options))


def test_prompts_train_on_another_device_and_never_wait(
    process: ProcessPoolExecutor, place: str
) -> None:
    make = partial(method, "cakd", prompts={"number": 2})
    compare(process, place, make, transformer=True)


@pytest.mark.parametrize("name", ["fcd", "at", "cakd"])
def test_a_teacher_on_its_own_stream_has_the_same_results_and_no_race(
    process: ProcessPoolExecutor, place: str, name: str
) -> None:
    compare(process, place, partial(method, name), side_stream=True)


def test_prompts_are_trained_on_the_students_stream(
    process: ProcessPoolExecutor, place: str
) -> None:
    """Otherwise their gradient would be computed on another stream."""
    make = partial(method, "cakd", prompts={"number": 2})
    compare(process, place, make, transformer=True, side_stream=True)


def test_a_cached_step_waits_only_for_the_keys(
    process: ProcessPoolExecutor, place: str, tmp_path: Path
) -> None:
    """The first step may wait too, and the second, which compares a cached row with the teacher."""
    make = partial(method, "fcd")
    there = process.submit(
        trained, place, make, waits=2, cache=CacheOptions(path=tmp_path / "there")
    )
    here = process.submit(trained, "cpu", make, cache=CacheOptions(path=tmp_path / "here"))
    # The cache rounds to float16, and CUDA may round an embedding to the next number.
    rtol, atol = (None, None) if place == NAME else (1e-2, 1e-3)
    assert_close(there.result(), here.result(), rtol=rtol, atol=atol)


def order(place: str, **options: Any) -> list[tuple[str, bool]]:
    """Return the order in which teacher and student run in the second step, each with whether it
    runs on its own stream.
    """
    with device_at(place):
        student, teacher = TinyFaceNet().to(place).train(), run(tiny_teacher(), **options)
        kd = Distiller(student, teacher, ["fcd"], input_shape=(3, 32, 32))
        images, labels = (x.to(place) for x in tiny_batch())
        student(images)
        kd(images, labels)
        found: list[tuple[str, bool]] = []
        main = torch.cuda.current_stream()
        for name, model in (("student", student), ("teacher", teacher.module)):
            assert model is not None
            first = next(module for module in model.modules() if not list(module.children()))
            first.register_forward_hook(
                lambda *_, name=name: found.append((name, torch.cuda.current_stream() != main))
            )
        student(images)
        kd(images, labels)
        student(images.clone())  # the losses of this forward are never computed
        kd.remove()
        assert not second_streams.faults
        return found[:2]


def test_a_teacher_on_its_own_stream_starts_before_the_student(
    process: ProcessPoolExecutor, place: str
) -> None:
    beside = process.submit(order, place, side_stream=True).result()
    assert beside == [("teacher", True), ("student", False)]
    assert process.submit(order, place).result() == [("teacher", False), ("student", False)]


def read_from_the_host(place: str) -> None:
    side = torch.cuda.Stream()
    with device_at(place), torch.cuda.stream(side):
        sent = Sent(made := torch.ones(2, device=place) * 2)
    assert sent.get().tolist() == [2, 2]
    with device_at(place):
        made.sum()  # no race, because the host has waited
        made.record_stream(torch.cuda.current_stream())


def test_reading_a_sent_tensor_waits_for_it(process: ProcessPoolExecutor, place: str) -> None:
    """On CUDA, `test_gpu` shows that a missing wait would be noticed."""
    process.submit(read_from_the_host, place).result()


# --- each of these faults would be noticed -------------------------------------------------------


class _Reading(nn.Module):
    """Reads a number in each step."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        loss = (student - teacher).square().mean()
        return loss / (1 + loss.item())


class _Choosing(nn.Module):
    """Selects samples by a mask, whose result has a size that the host must know."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher)[labels > 0].square().mean()


class _Fetching(nn.Module):
    """Copies a number from the host in each step."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher).square().mean() * student.new_tensor(2.0)


class _Homeless(nn.Module):
    """Holds a tensor that is no buffer, and so stays on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(12)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return ((student - teacher) * self.scale).square().mean()


class _Method:
    def __init__(self, loss: type[nn.Module]) -> None:
        self.loss = loss

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("odd", self.loss())


def check_noticed(
    process: ProcessPoolExecutor, place: str, loss: type[nn.Module], cause: str
) -> None:
    make = partial(_Method, loss)
    with pytest.raises(RuntimeError, match=WAITED[place] + (cause if place == NAME else "")):
        process.submit(trained, place, make).result()
    process.submit(trained, place, make, waits=STEPS).result()


@pytest.mark.parametrize(
    ("loss", "cause"), [(_Reading, "_local_scalar_dense"), (_Choosing, "index.Tensor")]
)
def test_a_loss_that_waits_is_noticed(
    process: ProcessPoolExecutor, place: str, loss: type[nn.Module], cause: str
) -> None:
    check_noticed(process, place, loss, cause)


@only_far
def test_a_number_from_the_host_is_noticed(process: ProcessPoolExecutor, place: str) -> None:
    """CUDA may copy a single number without waiting, and torch then has nothing to report."""
    check_noticed(process, place, _Fetching, "_to_copy")


def read_too_early() -> None:
    side = torch.cuda.Stream()
    with Device(), torch.cuda.stream(side):
        made = torch.ones(2, device=NAME) * 2
    with Device():
        made.sum()


def read_by_another() -> tuple[Tensor, torch.cuda.Stream]:
    """Return a tensor that another stream may still be reading, and that stream."""
    side, made = torch.cuda.Stream(), torch.ones(2, device=NAME) * 2
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made.sum()
    return made, side


def written_too_early() -> None:
    with Device():
        made, _ = read_by_another()
        made.add_(1)


@only_far
@pytest.mark.parametrize("race", [read_too_early, written_too_early])
def test_a_race_is_noticed(process: ProcessPoolExecutor, race: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError, match="races with another stream"):
        process.submit(race).result()


def freed_in_use(recorded: bool) -> list[str]:
    second_streams.faults.clear()
    with Device():
        made, side = read_by_another()
        if recorded:
            made.record_stream(side)
        del made
    found = list(second_streams.faults)
    second_streams.faults.clear()
    return found


@only_far
def test_memory_that_is_freed_while_in_use_is_noticed(process: ProcessPoolExecutor) -> None:
    assert process.submit(freed_in_use, recorded=False).result()
    assert not process.submit(freed_in_use, recorded=True).result()


def test_a_tensor_left_on_the_cpu_is_noticed(process: ProcessPoolExecutor, place: str) -> None:
    make = partial(_Method, _Homeless)
    with pytest.raises(RuntimeError, match=MIXED[place]):
        process.submit(trained, place, make, waits=STEPS).result()
    process.submit(trained, "cpu", make).result()
