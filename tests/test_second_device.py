"""Every method trains on a device that is not the processor, and lets the host run ahead of it.

Without a GPU: see `second_device`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdhooks import ClassShard, Distiller, EmbeddingTap, hookimpl, methods
from kdhooks.discovery import load
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.second_device import NAME, Device, in_a_process, python_devices
from tests.transformers import TinyViT, teacher_of

pytestmark = python_devices

STAGES = ("layer1", "layer2", "layer3", "layer4")
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
STEPS = 4
NAMES = [info.name for info in methods()]


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with in_a_process() as pool:
        yield pool


def trained(
    place: str, make: Callable[[], object], transformer: bool = False, waiting: bool = False
) -> list[Tensor]:
    """Each step's loss, and then the student's and the losses' weights."""
    device = Device()
    with device:
        torch.manual_seed(0)
        student = TinyFaceNet().to(place).train()
        rows = nn.Parameter(torch.randn(6, 12).to(place))
        kd = Distiller(
            student,
            teacher_of(TinyViT) if transformer else tiny_teacher(),
            [make()],
            student_stages=STAGES,
            teacher_stages=BLOCKS if transformer else STAGES,
            head=ClassShard(rows, 0, 6),
            input_shape=(3, 32, 32),
        )
        images, labels = (x.to(place) for x in tiny_batch())
        learned = [*student.parameters(), *kd.parameters(), rows]
        optimizer = torch.optim.SGD(learned, lr=0.01, momentum=0.9)
        losses = []
        for step in range(STEPS):
            with nullcontext() if waiting or step == 0 else device.never_waited_for():
                task = student(images).square().mean()
                loss = torch.stack([task, *kd(images, labels).values()]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(loss)
        kd.check_finite()
        kd.remove()
        return [x.detach().cpu() for x in (*losses, *learned)]


def method(name: str, **options: Any) -> object:
    return load(name)(**options)


def both(process: ProcessPoolExecutor, make: Callable[[], object], **options: Any) -> Any:
    """There, and on the processor."""
    far, near = (process.submit(trained, place, make, **options) for place in (NAME, "cpu"))
    return far.result(), near.result()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_on_another_device_and_never_waits(
    process: ProcessPoolExecutor, name: str
) -> None:
    """The first step may wait, since its checks do."""
    torch.testing.assert_close(*both(process, partial(method, name)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coupleface", {"k": 2, "relations": "bank", "bank_momentum": 0.5, "warmup_steps": 2}),
        ("fcd", {"projector": True}),
        ("proxylesskd", {"projector": True, "extra_fcd_weight": 1.0, "margin_warmup_steps": 2}),
    ],
)
def test_an_options_state_trains_on_another_device_and_never_waits(
    process: ProcessPoolExecutor, name: str, options: dict[str, Any]
) -> None:
    torch.testing.assert_close(*both(process, partial(method, name, **options)))


def test_prompts_train_on_another_device_and_never_wait(process: ProcessPoolExecutor) -> None:
    make = partial(method, "cakd", prompts=2)
    torch.testing.assert_close(*both(process, make, transformer=True))


# --- that it would be noticed --------------------------------------------------------------------


class _Reading(nn.Module):
    """Looks at a number in each step."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        loss = (student - teacher).square().mean()
        return loss / (1 + loss.item())


class _Choosing(nn.Module):
    """Counts the samples that it takes."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher)[labels > 0].square().mean()


class _Fetching(nn.Module):
    """Brings a number from the host in each step."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher).square().mean() * student.new_tensor(2.0)


class _Homeless(nn.Module):
    """Holds a tensor that is no buffer, and so stays where it was made."""

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


@pytest.mark.parametrize(
    ("loss", "cause"),
    [(_Reading, "_local_scalar_dense"), (_Choosing, "index.Tensor"), (_Fetching, "_to_copy")],
)
def test_a_loss_that_waits_is_noticed(
    process: ProcessPoolExecutor, loss: type[nn.Module], cause: str
) -> None:
    make = partial(_Method, loss)
    with pytest.raises(RuntimeError, match=f"the host waits for the device: aten.{cause}"):
        process.submit(trained, NAME, make).result()
    process.submit(trained, NAME, make, waiting=True).result()


def test_a_tensor_left_on_the_processor_is_noticed(process: ProcessPoolExecutor) -> None:
    make = partial(_Method, _Homeless)
    with pytest.raises(RuntimeError, match=r"on one device; aten.mul.Tensor found far:0 and"):
        process.submit(trained, NAME, make, waiting=True).result()
    process.submit(trained, "cpu", make).result()
