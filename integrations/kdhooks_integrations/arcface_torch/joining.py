"""Adds the methods' parameters to a trainer's optimizer without changing its saved state.

The trainer saves the same state of its optimizer and schedule as without kdhooks. The state of the
methods is saved under the additional key "kdhooks" of the optimizer's state, which a run without
kdhooks ignores. So a run with kdhooks resumes from a checkpoint without it, and vice versa.
"""

import logging
from typing import Any
from weakref import WeakSet

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from kdhooks.classes.ranks import world
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks_integrations.groups import Dressed, Groups, State, consecutive, merged, numbered

log = logging.getLogger("kdhooks")

KEY = "kdhooks"

_joined: "WeakSet[Optimizer]" = WeakSet()


class Joined:
    """Adds groups with the distiller's parameters before the trainer's last group, the head's.

    The head's group must stay last, since heads from before 2023 replace the last group's
    parameters by the sampled rows in each step.
    """

    def __init__(self, distiller: Distiller, optimizer: Optimizer, schedule: LRScheduler) -> None:
        if optimizer in _joined:
            raise KDHooksError(
                "arcface_torch: this optimizer already trains the weights of another attachment; "
                "remove() that attachment first, or use one optimizer for each"
            )
        _joined.add(optimizer)
        self.distiller = distiller
        head = optimizer.param_groups[-1]
        options = {key: v for key, v in head.items() if key not in ("params", "param_names")}
        groups = distiller.parameter_groups(options.get("weight_decay", 0.0))
        self._at, self._count = len(optimizer.param_groups) - 1, len(groups)
        self._ours = slice(self._at, self._at + self._count)
        for place, group in enumerate(groups, start=self._at):
            optimizer.add_param_group({**options, **group})
            optimizer.param_groups.insert(place, optimizer.param_groups.pop())
        self.steps = 0  # steps that the optimizer took; a GradScaler skips some
        self._handles: list[RemovableHandle] = [
            optimizer.register_state_dict_post_hook(self._take_out),
            optimizer.register_load_state_dict_pre_hook(self._put_in),
            optimizer.register_step_post_hook(self._count_step),
        ]
        self._optimizer, self.schedule = optimizer, schedule
        self._dressed = Dressed(self)
        self._dressed.resize(schedule, self.with_ours)
        self.adopt(schedule)

    def adopt(self, schedule: LRScheduler) -> None:
        """Save and load this schedule without our groups."""
        self._dressed.dress(schedule)

    def _count_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.steps += 1

    # --- the optimizer ------------------------------------------------------------------------

    def _take_out(self, optimizer: Optimizer, state: State) -> State:
        groups: Groups = state["param_groups"]
        ours = numbered(groups[self._ours], state["state"])
        theirs = numbered(self.without_ours(groups), state["state"])
        return {**theirs, KEY: {**ours, "distiller": self.distiller.state_dict()}}

    def _put_in(self, optimizer: Optimizer, state: State) -> State:
        ours: State | None = state.get(KEY)
        theirs: Groups = state["param_groups"]
        _refuse_ranks_apart(ours)
        if ours is None:
            log.warning(
                "checkpoint written without kdhooks: the methods start from their first step"
            )
            ours = {"state": {}, "param_groups": self._fresh_groups(optimizer, theirs[-1])}
        else:
            self._load(ours)
        groups = [*theirs[: self._at], *ours["param_groups"], *theirs[self._at :]]
        return merged(groups, ours["param_groups"], state["state"], ours["state"])

    def _fresh_groups(self, optimizer: Optimizer, head: dict[str, Any]) -> Groups:
        """Return our groups with the checkpoint's options of the head, except the weight decay."""
        own = optimizer.param_groups[self._ours]
        sizes = [len(group["params"]) for group in own]
        return [
            {**head, "weight_decay": group["weight_decay"], "params": numbers}
            for group, numbers in zip(own, consecutive(sizes), strict=True)
        ]

    def _load(self, ours: State) -> None:
        try:
            self.distiller.load_state_dict(ours["distiller"])
        except RuntimeError as error:
            raise KDHooksError(
                "arcface_torch: this checkpoint was written with other methods than the recipe's; "
                f"resume with the checkpoint's methods, or start a new run; {error}"
            ) from error

    # --- the schedule -------------------------------------------------------------------------

    def with_ours(self, values: list[Any]) -> list[Any]:
        """Insert an entry for each of our groups: a copy of the entry of the head's group."""
        return [*values[: self._at], *values[-1:] * self._count, *values[self._at :]]

    def without_ours(self, values: list[Any]) -> list[Any]:
        return [*values[: self._at], *values[self._ours.stop :]]

    def remove(self) -> None:
        """Restore the optimizer and its schedules."""
        for handle in self._handles:
            handle.remove()
        for group in self._optimizer.param_groups[self._ours]:
            for parameter in group["params"]:
                self._optimizer.state.pop(parameter, None)
        del self._optimizer.param_groups[self._ours]
        self._dressed.undress()
        _joined.discard(self._optimizer)


def _refuse_ranks_apart(ours: State | None) -> None:
    """Refuse checkpoints of different steps.

    Each rank saves its own checkpoint. If a run is killed while it saves, some ranks still have
    their previous one.
    """
    if world() is None:
        return
    step = None if ours is None else int(ours["distiller"]["_extra_state"])
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise KDHooksError(
            f"arcface_torch: the checkpoints of all ranks must be of the same step; found {steps}, "
            "by rank: the run ended while saving; for each rank that is ahead, replace "
            "checkpoint_gpu_….pt by its checkpoint_gpu_….pt.previous"
        )
