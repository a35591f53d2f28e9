"""With weights of 0 only, a run is the plain run, also if it clips the norm of its gradients."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from benchmarks.gloo import gloo_group
from kdhooks import Distiller, Schedule
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.small_distiller import SMALL, student

STAGES = [f"layer{number}" for number in range(1, 5)]
METHODS: list[dict[str, Any]] = [{"name": "fitnet"}, {"name": "fskd"}, {"name": "acsr"}]
Wrap = Callable[[nn.Module], nn.Module]


def distil(net: nn.Module, weight: object) -> Distiller:
    stages: dict[str, Any] = {"student_stages": STAGES, "teacher_stages": STAGES}
    methods = [{**method, "weight": weight} for method in METHODS]
    return Distiller(net, tiny_teacher(), methods, input_shape=SMALL, **stages)


class Trained(nn.Module):
    """A student, and a Distiller as a child, as in Lightning."""

    def __init__(self, net: TinyFaceNet, kd: Distiller | None) -> None:
        super().__init__()
        self.net, self.kd = net, kd

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        task: Tensor = self.net(images).square().mean()
        return task if self.kd is None else sum(self.kd(images, labels).values(), start=task)


def train(weight: object, wrap: Wrap, steps: int = 6) -> tuple[Trained, list[float]]:
    """Clip the norm of all gradients; return the models and these norms."""
    net = student()
    whole = Trained(net, None if weight is None else distil(net, weight))
    model = wrap(whole)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    images, labels = tiny_batch()
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(images, labels).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
        optimizer.step()
    if whole.kd is not None:
        whole.kd.remove()
    return whole, norms


def in_views(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel, in_views])
def test_weight_0_leaves_a_clipped_norm_as_it_is(tmp_path: Path, wrap: Wrap) -> None:
    with gloo_group(0, 1, tmp_path, timedelta(seconds=60)):
        plain, expected = train(None, wrap)
        idle, found = train(0.0, wrap)
        _, other = train(1e-3, wrap)
    assert found == expected
    assert_close(idle.net.state_dict(), plain.net.state_dict(), rtol=0, atol=0)
    assert idle.kd is not None
    assert all(parameter.grad is None for parameter in idle.kd.parameters())
    assert other != expected


def test_the_parameters_train_from_the_first_weight_above_0() -> None:
    """Gradients of several batches are added, and the first batch has weight 0."""
    net = student()
    kd = distil(net, Schedule(value=1.0, start=1))
    images, labels = tiny_batch()
    grown = []
    for _ in range(3):
        net(images)
        sum(kd(images, labels).values(), start=torch.zeros(())).backward()
        grown.append([None if p.grad is None else p.grad.clone() for p in kd.parameters()])
    assert all(gradient is None for gradient in grown[0])
    for second, third in zip(grown[1], grown[2], strict=True):
        assert second is not None
        assert third is not None
        assert second.any()
        assert not torch.equal(second, third)


def test_one_backward_pass_through_two_batches_keeps_the_gradients_of_the_second() -> None:
    net = student()
    kd = distil(net, Schedule(value=1.0, start=1))
    images, labels = tiny_batch()
    losses = []
    for _ in range(2):
        net(images)
        losses.extend(kd(images, labels).values())
    torch.stack(losses).sum().backward()
    assert all(parameter.grad is not None for parameter in kd.parameters())


def test_gradients_of_something_else_are_kept() -> None:
    net = student()
    kd = distil(net, 0.0)
    images, labels = tiny_batch()
    for parameter in kd.parameters():
        parameter.grad = torch.ones_like(parameter)
    net(images)
    sum(kd(images, labels).values(), start=torch.zeros(())).backward()
    assert all(parameter.grad is not None for parameter in kd.parameters())
