"""Lets a distilled run resume from a plain run's checkpoint.

The parameters of the plain run keep their optimizer state. The methods' own parameters start
without one, but with the current scheduled values of the other groups.
"""

import logging
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeAlias

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from kdhooks.errors import KDHooksError
from kdhooks_integrations.mmengine.student import CHILD, Distillation, refusal

log = logging.getLogger("kdhooks")

State: TypeAlias = dict[str, Any]


def complete(runner: Any, checkpoint: State) -> None:
    """Add the methods' state to a plain checkpoint that is resumed; leave others unchanged."""
    distillation = _distillation(runner)
    if runner._resume and "optimizer" in checkpoint:
        _check_methods(runner, distillation, checkpoint)
    trained = [] if distillation is None else distillation.trained()
    plain = not any(key.startswith(f"{CHILD}.") for key in checkpoint["state_dict"])
    if distillation is None or not (trained and plain and runner._resume):
        return
    if "optimizer" in checkpoint and isinstance(runner.optim_wrapper, OptimWrapper):
        _complete_optimizer(runner, checkpoint, {id(parameter) for parameter in trained})
    for key, prefix in (("state_dict", ""), ("ema_state_dict", "module.")):
        if key in checkpoint:
            checkpoint[key].update(distillation.state_dict(prefix=f"{prefix}{CHILD}."))
    log.warning(
        "checkpoint written without kdhooks: the methods start from their first step, with their "
        "initial weights and without optimizer state; the student resumes with its own"
    )


def _check_methods(runner: Any, distillation: Distillation | None, checkpoint: State) -> None:
    """Refuse a checkpoint with other methods.

    The optimizer's state is matched by position, so torch would accept another method's state of
    the same shapes.
    """
    found = [key for key in checkpoint["state_dict"] if key.startswith(f"{CHILD}.")]
    if not found:
        return
    known = set[str]()
    if distillation is not None:
        known = set(distillation.state_dict(prefix=f"{CHILD}."))
        if why := distillation.other_methods(found):
            raise KDHooksError(why)
    if isinstance(runner.optim_wrapper, OptimWrapper) and not known.issuperset(found):
        sizes, now = (
            [len(group["params"]) for group in groups]
            for groups in (
                checkpoint["optimizer"]["param_groups"],
                runner.optim_wrapper.param_groups,
            )
        )
        if sizes != now:
            raise KDHooksError(refusal(found))


def _distillation(runner: Any) -> Distillation | None:
    model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    child = dict(model.named_children()).get(CHILD)
    return child if isinstance(child, Distillation) else None


def _complete_optimizer(runner: Any, checkpoint: State, ours: set[int]) -> None:
    wrapper = runner.optim_wrapper
    several = isinstance(wrapper, OptimWrapperDict)
    if several or isinstance(wrapper.optimizer, ZeroRedundancyOptimizer):
        found = type(wrapper if several else wrapper.optimizer).__name__
        raise KDHooksError(
            "mmengine: this checkpoint was written without kdhooks, and the methods' own weights "
            f"can't be added to the state of a {found}; use load_from without resume"
        )
    groups = wrapper.optimizer.param_groups
    theirs = [[p for p in group["params"] if id(p) not in ours] for group in groups]
    saved = checkpoint["optimizer"]
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group) for group in theirs if group]:
        return  # the state of another student, which torch will refuse
    checkpoint["optimizer"] = _widened(wrapper.optimizer.state_dict(), saved, groups, ours)
    added = [place for place, group in enumerate(theirs) if not group]
    for scheduler, state in zip(
        runner.param_schedulers or (), checkpoint.get("param_schedulers", ()), strict=False
    ):
        _add_entries(state, vars(scheduler), added)


def _widened(fresh: State, saved: State, groups: list[State], ours: set[int]) -> State:
    """Return the saved state, numbered like this optimizer's parameters."""
    remaining, merged, theirs = iter(saved["param_groups"]), [], []
    for live, numbered in zip(groups, fresh["param_groups"], strict=True):
        pairs = zip(numbered["params"], live["params"], strict=True)
        kept = [number for number, parameter in pairs if id(parameter) not in ours]
        group = next(remaining) if kept else _as_far_along(numbered, saved["param_groups"][-1])
        merged.append({**group, "params": numbered["params"]})
        theirs.extend(kept)
    before = chain.from_iterable(group["params"] for group in saved["param_groups"])
    number = dict(zip(before, theirs, strict=True))
    state = {number[old]: of for old, of in saved["state"].items()}
    return {**saved, "state": state, "param_groups": merged}


def _as_far_along(group: State, theirs: State) -> State:
    """Return our group, with its scheduled values scaled as the schedules have scaled `theirs`."""
    scaled = {}
    for initial in (key for key in group if key.startswith("initial_")):
        key = initial.removeprefix("initial_")
        if theirs.get(initial):
            scaled[key] = group[initial] * theirs[key] / theirs[initial]
    return {**group, **scaled}


def _add_entries(state: State, fresh: Mapping[str, Any], added: list[int]) -> None:
    """Insert entries for the added groups into a schedule's lists with one entry per group."""
    for key, values in state.items():
        own: object = fresh.get(key)
        if not (isinstance(values, list) and isinstance(own, list)):
            continue
        if len(own) == len(values) + len(added):
            for place in added:
                values.insert(place, own[place])
