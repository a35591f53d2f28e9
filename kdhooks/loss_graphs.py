"""Examines the autograd graphs of a step's losses, to compare their gradients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdhooks.balance import Parts
from kdhooks.errors import KDHooksError, in_one_line, listed


def gradient_at(parameters: Sequence[nn.Parameter], loss: Tensor) -> Parts:
    """Return the gradient of a loss () at these parameters, and leave their `grad` as it is."""
    try:
        return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        way_out = (
            "call it before the training's own backward pass, and with a loss that overwrites "
            "nothing in its backward pass. arcface_torch's PartialFC does; `kdhooks doctor` "
            "compares its gradients"
        )
        if "fabric.backward" in str(error):  # raised by Fabric with a mixed precision
            way_out = "compare the gradients in a run with Fabric(precision='32-true')"
        raise KDHooksError(
            "compare_gradients: the backward pass of each loss must be able to run several times; "
            f"found: {in_one_line(error)}; {way_out}"
        ) from error


def reached(parameters: Sequence[nn.Parameter], terms: Iterable[Tensor]) -> list[nn.Parameter]:
    """Return the parameters that at least one term reaches; all of them if there are no terms.

    A head inside the student is left out: the terms leave it as it is, and its gradient would make
    that of the trainer's own loss look longer.
    """
    nodes = set[Any]().union(*map(_nodes, terms))
    found = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    return [p for p in parameters if id(p) in found] if found else list(parameters)


def check_losses(task: object, terms: object, known: Sequence[str]) -> None:
    """known: the names of the terms."""
    if not isinstance(task, Tensor) or task.ndim or not task.requires_grad:
        found = type(task).__name__
        if isinstance(task, Tensor):
            found = f"shape {tuple(task.shape)}, requires_grad {task.requires_grad}"
        raise KDHooksError(
            "compare_gradients: task_loss must be a scalar tensor with a gradient; found "
            f"{found}; pass the trainer's own loss, before its backward pass"
        )
    if not isinstance(terms, Mapping) or set(terms) != set(known):
        found = listed(terms) if isinstance(terms, Mapping) else type(terms).__name__
        raise KDHooksError(
            "compare_gradients: terms must be what kd returned in this step, with "
            f"{listed(known)}; found {found}; pass kd(images, labels) unchanged"
        )
    for name, term in terms.items():
        if not isinstance(term, Tensor) or not term.requires_grad:
            found = "no gradient" if isinstance(term, Tensor) else type(term).__name__
            raise KDHooksError(
                f"compare_gradients: the term {name} must be the tensor that kd returned, with its "
                f"gradient; found {found}; pass kd(images, labels) unchanged, and not kd.metrics"
            )
    nodes = _nodes(task)
    if inside := [
        name for name, term in terms.items() if term is not task and term.grad_fn in nodes
    ]:
        raise KDHooksError(
            "compare_gradients: task_loss must be the trainer's own loss without the terms; found "
            f"{listed(inside)} in it; pass it before the terms are added to it"
        )
    every = nodes.union(*map(_nodes, terms.values()))
    if any(node.name() == "CheckpointFunctionBackward" for node in every):
        raise KDHooksError(
            "compare_gradients: the student's checkpointed blocks must not be reentrant, since a "
            "gradient at single parameters then lacks those of the blocks; create them with "
            "torch.utils.checkpoint.checkpoint(…, use_reentrant=False)"
        )


def _nodes(loss: Tensor) -> set[Any]:
    """Return the nodes of the graph of a loss."""
    seen, left = set[Any](), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return seen
