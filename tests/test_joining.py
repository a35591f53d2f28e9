"""The methods' weights can join a trainer's optimizer and schedule of any kind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from kdhooks import Distiller, EmbeddingTap, KDHooksError, hookimpl
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_integrations.arcface_torch.joining import Joined

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.25),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.25),
}
SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "linear": lambda optimizer: LinearLR(optimizer, 0.5, total_iters=4),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "sequence": lambda optimizer: SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.5, total_iters=2), CosineAnnealingLR(optimizer, 5)],
        milestones=[2],
    ),
}
KINDS = pytest.mark.parametrize(
    ("kind", "plan"), [(kind, plan) for kind in OPTIMIZERS for plan in SCHEDULES]
)


class Aligned(nn.Module):
    """A loss whose map has weight decay, and whose bias has none."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(12, 12)

    def no_weight_decay(self) -> set[str]:
        return {"map.bias"}

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        gap: Tensor = (self.map(student) - teacher).square().mean()
        return gap


class Method:
    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("aligned", Aligned())


class Run:
    """A backbone and a head with optimizer and schedule, with or without distillation."""

    def __init__(self, kind: str, plan: str, distilled: bool) -> None:
        torch.manual_seed(0)
        self.backbone, self.head = TinyFaceNet().train(), nn.Linear(12, 6)
        models = [{"params": m.parameters()} for m in (self.backbone, self.head)]
        self.optimizer = OPTIMIZERS[kind](models)
        self.schedule = SCHEDULES[plan](self.optimizer)
        self.kd: Distiller | None = None
        if distilled:
            shape = (3, 32, 32)
            self.kd = Distiller(self.backbone, tiny_teacher(), [Method()], input_shape=shape)
            self.joined = Joined(self.kd, self.optimizer, self.schedule)

    def train(self, steps: int) -> "Run":
        images, labels = tiny_batch()
        for _ in range(steps):
            loss = self.head(self.backbone(images)).square().mean()
            if self.kd:
                loss = loss + self.kd(images, labels)["aligned"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        return self

    def saved(self) -> dict[str, Any]:
        """Return a trainer's checkpoint; the trainer does not know the distiller."""
        parts: dict[str, Any] = {"backbone": self.backbone, "head": self.head}
        parts |= {"optimizer": self.optimizer, "schedule": self.schedule}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, saved: dict[str, Any]) -> "Run":
        for name, part in saved.items():
            getattr(self, name).load_state_dict(part)
        return self

    def weights(self) -> list[Tensor]:
        modules = [self.backbone, self.head, *([self.kd] if self.kd else [])]
        return [p.detach().clone() for module in modules for p in module.parameters()]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_each_parameter_has_its_decay_and_the_head_is_last() -> None:
    run = Run("sgd", "linear", distilled=True)
    groups = run.optimizer.param_groups
    loss = run.kd.losses["aligned"]  # type: ignore[union-attr]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.25, 0.0, 0.25]
    assert groups[1]["params"] == [loss.map.weight]  # type: ignore[union-attr]
    assert groups[2]["params"] == [loss.map.bias]  # type: ignore[union-attr]
    assert groups[3]["params"] == list(run.head.parameters())


@KINDS
def test_every_group_follows_the_schedule(kind: str, plan: str) -> None:
    run = Run(kind, plan, distilled=True).train(3)
    alone = Run(kind, plan, distilled=False).train(3)
    rates = {group["lr"] for group in run.optimizer.param_groups}
    assert rates == {group["lr"] for group in alone.optimizer.param_groups}


@KINDS
def test_a_checkpoint_has_one_key_more_than_that_of_a_plain_run(kind: str, plan: str) -> None:
    ours = Run(kind, plan, distilled=True).train(2).saved()
    theirs = Run(kind, plan, distilled=False).train(2).saved()
    extra = ours["optimizer"].pop("kdhooks")
    assert set(extra) == {"state", "param_groups", "distiller"}
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert ours["schedule"] == theirs["schedule"]


@KINDS
def test_a_resumed_run_equals_the_straight_one(kind: str, plan: str) -> None:
    straight = Run(kind, plan, distilled=True).train(5)
    resumed = Run(kind, plan, distilled=True)
    resumed.load(Run(kind, plan, distilled=True).train(2).saved()).train(3)
    assert_same(resumed.weights(), straight.weights())
    assert resumed.kd is not None
    assert resumed.kd.step == 5


@KINDS
def test_either_kind_of_run_resumes_from_the_other(kind: str, plan: str) -> None:
    distilled = Run(kind, plan, distilled=True).train(2).saved()
    off = Run(kind, plan, distilled=False).load(distilled).train(2)
    assert len(off.optimizer.param_groups) == 2
    on = Run(kind, plan, distilled=True).load(off.saved()).train(2)
    assert len({group["lr"] for group in on.optimizer.param_groups}) == 1
    assert on.kd is not None
    assert on.kd.step == 2


@KINDS
def test_remove_restores_both(kind: str, plan: str) -> None:
    run = Run(kind, plan, distilled=True)
    alone = Run(kind, plan, distilled=False)
    run.joined.remove()
    assert type(run.schedule) is type(alone.schedule)
    assert run.kd is not None
    run.kd.remove()
    run.kd = None
    assert_same(run.train(3).weights(), alone.train(3).weights())
    assert run.saved()["optimizer"].keys() == alone.saved()["optimizer"].keys()


def test_remove_after_some_steps_leaves_no_state() -> None:
    run = Run("adamw", "linear", distilled=True).train(2)
    run.joined.remove()
    assert len(run.optimizer.state) == len(Run("adamw", "linear", distilled=False).weights())
    assert "kdhooks" not in run.saved()["optimizer"]


def test_an_optimizer_is_joined_once() -> None:
    run = Run("sgd", "linear", distilled=True)
    assert run.kd is not None
    with pytest.raises(KDHooksError, match="already trains the weights of another attachment"):
        Joined(run.kd, run.optimizer, run.schedule)
    run.joined.remove()
    Joined(run.kd, run.optimizer, run.schedule)


def test_a_sequence_of_schedules_that_were_joined_one_by_one() -> None:
    """In a script, the first schedule exists before the sequence."""
    run, alone = (Run("sgd", "linear", distilled=distilled) for distilled in (True, False))
    for one in (run, alone):
        second = CosineAnnealingLR(one.optimizer, 5)
        if one is run:
            one.joined.adopt(second)
        one.schedule = SequentialLR(one.optimizer, [one.schedule, second], milestones=[2])
        if one is run:
            one.joined.adopt(one.schedule)
        one.train(3)
    assert run.saved()["schedule"] == alone.saved()["schedule"]
    run.schedule.load_state_dict(alone.schedule.state_dict())
    run.train(2)
    run.joined.remove()
    assert run.schedule.state_dict().keys() == alone.schedule.state_dict().keys()
    assert len(run.schedule.get_last_lr()) == len(run.optimizer.param_groups) == 2
