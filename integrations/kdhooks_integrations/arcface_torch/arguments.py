"""Checks the arguments of `attach` before the teacher is loaded."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdhooks.errors import KDHooksError, listed


def checked_heads(head: object) -> list[nn.Module]:
    heads: list[Any] = list(head) if isinstance(head, Sequence) else [head]
    others = [type(one).__name__ for one in heads if not isinstance(one, nn.Module)]
    if others or not heads or len({id(one) for one in heads}) < len(heads):
        raise KDHooksError(
            "arcface_torch: head must be the trainer's PartialFC, or a list of several different "
            f"ones; found {listed(others) if others else f'{len(heads)}, not all different'}; pass "
            "the module whose call returns the loss"
        )
    return heads


def check_kinds(
    backbone: object, optimizer: object, get_model: object, accumulation: object
) -> None:
    """Refuse arguments of a wrong kind, or in a wrong order, before the teacher is loaded."""
    faults = {
        "backbone must be the student, an nn.Module": (backbone, isinstance(backbone, nn.Module)),
        "optimizer must be a torch.optim.Optimizer": (optimizer, isinstance(optimizer, Optimizer)),
        "get_model must be a function, or left out": (
            get_model,
            get_model is None or callable(get_model),
        ),
        "accumulation must be a whole number, at least 1, or left out": (
            accumulation,
            accumulation is None or (type(accumulation) is int and accumulation >= 1),
        ),
    }
    for rule, (found, right) in faults.items():
        if not right:
            simple = isinstance(found, str | int | float)
            shown = repr(found) if simple else type(found).__name__
            raise KDHooksError(
                f"arcface_torch: {rule}; found {shown}; call attach(backbone, head, optimizer, "
                "schedule, recipe)"
            )


def refuse_late(backbone: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Refuse other kinds of schedules, and objects that do not fit together or already ran."""
    if not isinstance(schedule, LRScheduler):
        raise KDHooksError(
            "arcface_torch: schedule must be a torch.optim.lr_scheduler of the optimizer, whose "
            f"checkpoints then hold the methods' state; found {type(schedule).__name__}; with "
            "another kind, or none, use kdhooks.Distiller in the loop (README, a loop of your own)"
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    faults = {
        "the schedule is of another optimizer": schedule.optimizer is not optimizer,
        "the optimizer does not train the backbone": not any(
            id(p) in trained for p in backbone.parameters()
        ),
        "the optimizer has taken or resumed steps": bool(optimizer.state),
        "the schedule has taken or resumed steps": schedule.last_epoch > 0,
    }
    for fault, found in faults.items():
        if found:
            raise KDHooksError(
                f"arcface_torch: {fault}; attach right after the LR schedule is created, before "
                "anything is resumed"
            )
