"""Heads that are not arcface_torch's PartialFC, and schedules that are not torch's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from kdhooks import KDHooksError
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_integrations.arcface_torch import attach

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
    """As arcface_torch's PartialFC of 2021, which calls its own forward."""

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


@pytest.mark.parametrize("schedule", [None, object()])
def test_a_schedule_that_is_not_torchs_is_refused(schedule: Any) -> None:
    backbone, head = TinyFaceNet().train(), Head()
    optimizer = SGD([{"params": m.parameters()} for m in (backbone, head)], lr=0.1)
    with pytest.raises(KDHooksError, match=f"found {type(schedule).__name__}; with another kind"):
        attach(backbone, head, optimizer, schedule, RECIPE)
    assert not backbone._forward_hooks
