"""Checks of heads that are not arcface_torch's PartialFC, and of schedules that are not torch's."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from kdhooks import KDHooksError
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_integrations.arcface_torch import attach, install

RECIPE = {"teacher": tiny_teacher().module, "methods": ["fcd"], "input_shape": [3, 32, 32]}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 12))

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b) -> ()."""
        return F.cross_entropy(embedding @ self.weight.T, labels)


class Logits(Head):
    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        return embedding @ self.weight.T


class OfEachSample(Head):
    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(embedding @ self.weight.T, labels, reduction="none")


class PastItsHooks(Head):
    """Like arcface_torch's PartialFC of 2021, which calls its own forward."""

    def forward_backward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        return self.forward(embedding, labels)


def made(head: nn.Module) -> tuple[TinyFaceNet, SGD]:
    backbone = TinyFaceNet().train()
    optimizer = SGD([{"params": m.parameters()} for m in (backbone, head.train())], lr=0.1)
    attach(backbone, head, optimizer, ConstantLR(optimizer), RECIPE)
    return backbone, optimizer


@pytest.mark.parametrize(
    ("head", "shape"), [(Logits(), r"\(12, 6\)"), (OfEachSample(), r"\(12,\)")]
)
def test_a_head_that_returns_no_scalar_is_refused(head: nn.Module, shape: str) -> None:
    backbone, _ = made(head)
    images, labels = tiny_batch()
    with pytest.raises(KDHooksError, match=f"its loss as a scalar.*found shape {shape}"):
        head(backbone(images), labels)


def test_a_head_whose_hooks_never_run_is_noticed_at_the_first_step() -> None:
    head = PastItsHooks()
    backbone, optimizer = made(head)
    images, labels = tiny_batch()
    head.forward_backward(backbone(images), labels).backward()
    with pytest.raises(KDHooksError, match="by calls that run the hooks of the backbone"):
        optimizer.step()


def test_labels_of_a_batch_that_was_discarded_are_not_counted() -> None:
    backbone, heads = TinyFaceNet().train(), [Head().train(), Head().train()]
    optimizer = SGD([{"params": m.parameters()} for m in (backbone, *heads)], lr=0.1)
    attachment = attach(backbone, heads, optimizer, ConstantLR(optimizer), RECIPE)
    images, labels = tiny_batch()
    heads[0](backbone(images)[:6], labels[:6])
    attachment.distiller.discard()
    given = images.flip(0)
    embedding = backbone(given)
    plain = F.cross_entropy(embedding[:6] @ heads[0].weight.T, labels[:6])
    assert torch.equal(heads[0](embedding[:6], labels[:6]), plain), "one head is not the batch"
    heads[1](embedding[6:], labels[6:])
    assert attachment.distiller.step == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backbone": None}, "backbone must be the student, an nn.Module; found NoneType"),
        ({"backbone": "r50"}, "backbone must be the student, an nn.Module; found 'r50'"),
        ({"head": None}, "head must be the trainer's PartialFC.*found NoneType"),
        ({"head": []}, "head must be the trainer's PartialFC.*found 0, not all different"),
        ({"head": [Head(), "x"]}, "found str; pass the module whose call returns the loss"),
        ({"head": "twice"}, "found 2, not all different"),
        (
            {"optimizer": None},
            r"must be a torch.optim.Optimizer; found NoneType; call attach\(back",
        ),
        ({"get_model": "r50"}, "get_model must be a function, or left out; found 'r50'"),
        ({"accumulation": 0}, "accumulation must be a whole number, at least 1.*found 0"),
        ({"accumulation": True}, "accumulation must be a whole number, at least 1.*found True"),
        ({"accumulation": 2.0}, "accumulation must be a whole number, at least 1.*found 2.0"),
    ],
)
def test_arguments_of_another_kind_are_refused(changed: dict[str, Any], said: str) -> None:
    backbone, head = TinyFaceNet().train(), Head()
    optimizer = SGD([{"params": m.parameters()} for m in (backbone, head)], lr=0.1)
    given: dict[str, Any] = {
        "backbone": backbone, "head": head, "optimizer": optimizer,
        "schedule": ConstantLR(optimizer), "recipe": RECIPE, **changed,
    }  # fmt: skip
    if given["head"] == "twice":
        given["head"] = [head, head]
    with pytest.raises(KDHooksError, match=said):
        attach(**given)
    assert not backbone._forward_hooks


@pytest.mark.parametrize("found", [0, "2", 1.5, True])
def test_a_wrong_gradient_acc_of_the_config_is_refused(
    found: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(config=SimpleNamespace(gradient_acc=found))
    monkeypatch.setitem(sys.modules, "configs.base", config)
    with pytest.raises(KDHooksError, match=r"config\.gradient_acc must be a whole number"):
        made(Head())


def test_install_takes_the_globals_of_the_script() -> None:
    with pytest.raises(KDHooksError, match=r"must be the globals of train_v2.py.*found str; leave"):
        install(RECIPE, "train_v2.py")  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [None, object()])
def test_a_schedule_that_is_not_torchs_is_refused(schedule: Any) -> None:
    backbone, head = TinyFaceNet().train(), Head()
    optimizer = SGD([{"params": m.parameters()} for m in (backbone, head)], lr=0.1)
    with pytest.raises(KDHooksError, match=f"found {type(schedule).__name__}; with another kind"):
        attach(backbone, head, optimizer, schedule, RECIPE)
    assert not backbone._forward_hooks
