"""A student, a method with one tap, and a Distiller of both."""

import torch
from torch import Tensor, nn

from kdhooks import Distiller, EmbeddingTap, hookimpl
from kdhooks.declarations import Weight
from kdhooks.testing import TinyFaceNet, tiny_teacher

SMALL = (3, 32, 32)


class Gap(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher).square().mean()


class Method:
    """A method with one tap."""

    def __init__(self, name: str = "gap", weight: Weight = 1.0, loss: nn.Module | None = None):
        self.tap = EmbeddingTap(name, loss or Gap(), weight)

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return self.tap


def teacher_network() -> nn.Module:
    """Return the network of the tiny teacher, with the same weights in each call."""
    module = tiny_teacher().module
    assert module is not None
    return module


def student() -> TinyFaceNet:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return TinyFaceNet().train()


def distil(*methods: object, net: nn.Module | None = None, **options: object) -> Distiller:
    return Distiller(
        net if net is not None else student(),
        options.pop("teacher", None) or tiny_teacher(),  # type: ignore[arg-type]
        methods,
        input_shape=SMALL,
        **options,  # type: ignore[arg-type]
    )
