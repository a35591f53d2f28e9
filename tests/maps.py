"""Helpers for the tests of feature methods: maps by formula, models of given shapes, gradients."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Model, Stage

Shape = tuple[int, ...]


def _by_formula(wave: Callable[..., np.ndarray]) -> Tensor:
    axes = np.meshgrid(np.arange(2), np.arange(3), np.arange(7), np.arange(7), indexing="ij")
    return torch.from_numpy(wave(*(axis.astype(np.float64) for axis in axes)))


STUDENT = _by_formula(lambda b, c, h, w: np.sin(0.3 * b + 0.5 * c + 0.7 * h + 1.1 * w))
TEACHER = _by_formula(lambda b, c, h, w: np.cos(0.2 * b + 0.4 * c - 0.3 * h + 0.9 * w + 0.1))

# The results of the equations on these maps, computed once in numpy (float64).
GOLDEN_HCL = 0.65930426
GOLDEN_AT = 0.00907406
GOLDEN_COSINE = 0.22231449  # 1 - cos of mean_c F²
GOLDEN_HCCSL = 0.13389579  # levels {full, 4, 2}
GOLDEN_HCCSL_EMPTY_LEVEL = 0.12496941  # with a level 1, which adds only its weight


def model(*shapes: Shape) -> Model:
    """Return the description of a model with stages 's0', 's1', … of these shapes."""
    return Model(None, 4, tuple(Stage(f"s{k}", shape) for k, shape in enumerate(shapes)))


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def features(seed: int, b: int, *shapes: Shape) -> list[Tensor]:
    return [normal(seed + place, b, *shape) for place, shape in enumerate(shapes)]


def labels(b: int) -> Tensor:
    return torch.zeros(b, dtype=torch.long)


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def seeded(loss: nn.Module, seed: int = 7) -> nn.Module:
    """Convert the loss to float64, and replace its initial weights by reproducible ones."""
    loss.double()
    with torch.no_grad():
        for place, parameter in enumerate(loss.parameters()):
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + 0.5 * normal(seed + place, *parameter.shape))
    return loss


def weights(loss: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in loss.named_parameters()}


def check_reads_no_value(
    loss: nn.Module, student: tuple[Shape, ...], teacher: tuple[Shape, ...]
) -> None:
    """Run the loss on the meta device, whose tensors have no values to wait for or branch on."""
    loss = copy.deepcopy(loss).to("meta")
    ours, theirs = (
        [x.to("meta").requires_grad_() for x in features(1, 3, *shapes)]
        for shapes in (student, teacher)
    )
    value, _ = loss(ours, theirs, labels(3).to("meta"))
    value.backward()
    assert value.shape == ()


def check_gradients(
    loss: nn.Module,
    student: list[Tensor],
    teacher: list[Tensor],
    expected: Callable[[list[np.ndarray], dict[str, np.ndarray]], float],
    directions: int = 3,
) -> None:
    """Compare the gradients of features and weights with the reference's slope along random
    directions.
    """
    inputs = [x.clone().requires_grad_() for x in student]
    loss.zero_grad()
    loss(inputs, teacher, labels(len(teacher[0])))[0].backward()
    own = weights(loss)
    named = dict(loss.named_parameters())
    for seed in range(directions):
        rng = np.random.default_rng(seed)
        towards = [rng.standard_normal(tuple(x.shape)) for x in student]
        of_weights = {name: rng.standard_normal(w.shape) for name, w in own.items()}
        found = sum(_inner(x, v) for x, v in zip(inputs, towards, strict=True))
        found += sum(_inner(named[name], v) for name, v in of_weights.items())
        up, down = (
            expected(
                [x.numpy() + step * v for x, v in zip(student, towards, strict=True)],
                {name: w + step * of_weights[name] for name, w in own.items()},
            )
            for step in (2e-7, -2e-7)
        )
        assert_close(found, (up - down) / 4e-7, rtol=1e-5, atol=1e-7)


def _inner(x: Tensor, direction: np.ndarray) -> float:
    assert x.grad is not None
    return float((x.grad.numpy() * direction).sum())
