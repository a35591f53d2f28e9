"""Calls a loss with the arguments of one step, for the conformance checks.

Every call gets copies of the tensors, so that no check hides a mistake from another.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.declarations import Tap

Arguments: TypeAlias = tuple[Any, ...]
"""The arguments of a loss: tensors, lists of tensors, shards, None."""


def require(kept: object, name: str, rule: str) -> None:
    """Raise AssertionError unless the method of this name keeps the rule."""
    if not kept:
        raise AssertionError(f"{name}: a method {rule}")


@dataclass(frozen=True)
class Case:
    """A tap whose loss has not run yet, and the arguments of one step."""

    tap: Tap
    arguments: Arguments
    again: Callable[[], nn.Module]  # creates the method again, and returns its loss for this tap
    adapted: bool  # whether the method adds parameters to the teacher

    def require(self, kept: object, rule: str) -> None:
        require(kept, self.tap.name, rule)

    def loss(self) -> nn.Module:
        """Return a copy, so that the tap's own loss keeps its initial state."""
        return copy.deepcopy(self.tap.loss)

    def warmed_loss(self, steps: int) -> nn.Module:
        """Return a copy after some steps, since a term may start at 0 and grow."""
        loss = self.loss()
        for step in range(steps):
            call(loss, self.at(step))
        return loss

    def value(self, arguments: Arguments) -> Tensor:
        """Return the value of the loss in its first step."""
        return call(self.loss(), arguments)

    def at(self, step: int) -> Arguments:
        """Return the arguments with noise that differs from step to step, like training batches."""
        generator = torch.Generator().manual_seed(step)

        def noisy(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            return x + 0.1 * x.abs().mean() * noise

        student, *teacher = mapped(self.arguments[:2], noisy)
        return (*_trained((student,)), *teacher, *self.arguments[2:])

    def with_batch(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """Return the arguments with changed student's and teacher's tensors and labels."""
        return (*mapped(self.arguments[:3], change), *self.arguments[3:])

    def with_labels(self, labels: Tensor) -> Arguments:
        return (*self.arguments[:2], labels, *self.arguments[3:])


def call(loss: nn.Module, arguments: Arguments) -> Tensor:
    """Return the value of a loss, which may also return notes."""
    result = loss(*mapped(arguments, torch.clone))
    value: Tensor = result[0] if isinstance(result, tuple) else result
    return value


def differentiate(loss: nn.Module, arguments: Arguments) -> tuple[Tensor, list[Tensor]]:
    """Return the value, and its gradient with respect to each of the student's tensors."""
    student = _trained(arguments[:1])
    value = call(loss, (*student, *arguments[1:]))
    value.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors(student)]
    return value.detach(), gradients


def _trained(arguments: Arguments) -> Arguments:
    return mapped(arguments, lambda x: x.detach().clone().requires_grad_())


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors, including those in lists and shards."""
    for item in arguments:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, ClassShard):
            yield item.weight
        elif isinstance(item, list):
            yield from tensors(item)


def mapped(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """Return the arguments with every tensor changed, including those in lists and shards."""
    return tuple(_map_one(item, change) for item in arguments)


def _map_one(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, ClassShard):
        return replace(item, weight=change(item.weight))
    return [_map_one(x, change) for x in item] if isinstance(item, list) else item
