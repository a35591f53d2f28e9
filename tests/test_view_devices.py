"""The student's views are the same on another device than the CPU, and do not wait for it."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, StudentView
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.second_device import CUDA, NAME, device_at

STEPS = 4
VIEWS: dict[str, Any] = {
    "mask": {"p": 0.5},
    "grey": {"p": 0.5},
    "blur": {"p": 0.5},
    "low_resolution": {"sizes": [4, 8], "p": 0.5, "up": "bicubic"},
    "blocks": {"p": 0.5},
}


class Waits(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b 3 h w)."""
        return images * float(images.sum())


class Noise(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b 3 h w)."""
        return images + torch.rand_like(images)


FOREIGN = {"waits": Waits, "noise": Noise}


def seen_on(place: str, name: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the student's images in each step; from the second on, the host must not wait."""
    device = device_at(place)
    seen: list[Tensor] = []
    view = FOREIGN[name]() if name in FOREIGN else StudentView(**{name: VIEWS[name]})
    with device:
        torch.manual_seed(0)
        student = TinyFaceNet().to(place, dtype).train()
        teacher = tiny_teacher()
        kd = Distiller(student, teacher, ["fcd"], input_shape=(3, 32, 32), student_view=view)
        kd.to(dtype)
        student.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        images, labels = (x.to(place) for x in tiny_batch(copies=8))
        images = images.clamp(-1, 1).to(dtype)
        for step in range(STEPS):
            with nullcontext() if step == 0 else device.never_waited_for():
                student(images)
                kd(images, labels)
        kd.check_finite()
        kd.remove()
        return [x.detach().cpu() for x in seen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_the_same_on_another_device_and_never_waits(
    process: ProcessPoolExecutor, place: str, name: str, dtype: torch.dtype
) -> None:
    there = process.submit(seen_on, place, name, dtype).result()
    assert len(there) == STEPS
    assert not torch.equal(there[1], there[2])
    here = process.submit(seen_on, "cpu", name, dtype).result()
    if name == "blocks" and place != NAME and dtype != torch.float64:
        # A coefficient halfway between two quantisation steps may be rounded to either.
        share = sum((a - b).abs().gt(1e-3).float().mean() for a, b in zip(there, here, strict=True))
        assert share < 0.01
        return
    tolerance = 1e-3 if dtype == torch.float16 else 1e-5
    assert_close(there, here, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("place", [CUDA], indirect=True)
def test_random_numbers_of_a_foreign_view_are_not_waited_for(
    process: ProcessPoolExecutor, place: str
) -> None:
    first, second = (process.submit(seen_on, place, "noise", torch.float32).result() for _ in "ab")
    assert_close(first, second, rtol=0, atol=0)


def test_a_view_that_waits_is_noticed(process: ProcessPoolExecutor, place: str) -> None:
    with pytest.raises(RuntimeError, match=r"the host waits|synchronizing CUDA"):
        process.submit(seen_on, place, "waits", torch.float32).result()
