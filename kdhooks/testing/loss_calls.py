"""Calls of a loss with the arguments of one step, as conformance checks make them.

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
        """A copy, so that the tap's own loss keeps its initial state."""
        return copy.deepcopy(self.tap.loss)

    def warmed_loss(self, steps: int) -> nn.Module:
        """A copy that has run for some steps, over which a term may grow from 0."""
        loss = self.loss()
        for step in range(steps):
            call(loss, self.at(step))
        return loss

    def value(self, arguments: Arguments) -> Tensor:
        """The loss in its first step."""
        return call(self.loss(), arguments)

    def at(self, step: int) -> Arguments:
        """The batch with noise that differs from step to step, as the batches of a training do."""
        generator = torch.Generator().manual_seed(step)

        def noisy(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            return x + 0.1 * x.abs().mean() * noise

        student, *teacher = mapped(self.arguments[:2], noisy)
        return (*_trained((student,)), *teacher, *self.arguments[2:])

    def with_batch(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """The student's and the teacher's tensors and the labels are changed."""
        return (*mapped(self.arguments[:3], change), *self.arguments[3:])

    def with_labels(self, labels: Tensor) -> Arguments:
        return (*self.arguments[:2], labels, *self.arguments[3:])


def call(loss: nn.Module, arguments: Arguments) -> Tensor:
    """The value of a loss that may also return notes."""
    result = loss(*mapped(arguments, torch.clone))
    value: Tensor = result[0] if isinstance(result, tuple) else result
    return value


def differentiate(loss: nn.Module, arguments: Arguments) -> tuple[Tensor, list[Tensor]]:
    """The value, and its gradient by each of the student's tensors."""
    student = _trained(arguments[:1])
    value = call(loss, (*student, *arguments[1:]))
    value.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors(student)]
    return value.detach(), gradients


def _trained(arguments: Arguments) -> Arguments:
    return mapped(arguments, lambda x: x.detach().clone().requires_grad_())


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """All of them, those in lists and shards included."""
    for item in arguments:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, ClassShard):
            yield item.weight
        elif isinstance(item, list):
            yield from tensors(item)


def mapped(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """The same arguments with every tensor changed, those in lists and shards included."""
    return tuple(_map_one(item, change) for item in arguments)


def _map_one(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, ClassShard):
        return replace(item, weight=change(item.weight))
    return [_map_one(x, change) for x in item] if isinstance(item, list) else item
