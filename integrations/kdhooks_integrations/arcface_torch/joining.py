"""A trainer's optimizer trains the methods' own weights, and is saved as if it did not.

What the trainer saves of the two is what it would save without kdhooks; what the methods need to go
on lies beside it, under the key "kdhooks" of the optimizer's state, where a run without kdhooks
passes it over. So either kind of run resumes from a checkpoint of the other.
"""

import logging
from typing import Any
from weakref import WeakSet

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdhooks.classes.ranks import world
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks.taps import Removable
from kdhooks_integrations.groups import Dressed, Groups, State, consecutive, merged, numbered

log = logging.getLogger("kdhooks")

KEY = "kdhooks"

_joined: "WeakSet[Optimizer]" = WeakSet()


class Joined:
    """The distiller's parameters in groups of their own, before the trainer's last, the head's.

    That one stays last, since old heads of arcface_torch put the sampled rows there in each step.
    """

    def __init__(self, distiller: Distiller, optimizer: Optimizer, schedule: LRScheduler) -> None:
        if optimizer in _joined:
            raise KDHooksError(
                "arcface_torch: this optimizer trains another distillation's weights already; "
                "remove() that first, or give each distillation an optimizer"
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
        self.steps = 0  # that the optimizer took; a GradScaler skips some
        self._handles: list[Removable] = [
            optimizer.register_state_dict_post_hook(self._take_out),
            optimizer.register_load_state_dict_pre_hook(self._put_in),
            optimizer.register_step_post_hook(self._count_step),
        ]
        self._optimizer, self.schedule = optimizer, schedule
        self._dressed = Dressed(self)
        self._dressed.resize(schedule, self.with_ours)
        self.adopt(schedule)

    def adopt(self, schedule: LRScheduler) -> None:
        """Save and load it as if our groups were not there; it may have been made with them."""
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
        """Our groups with what the checkpoint says of the head's, but for their decay."""
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
                f"resume with those, or start a new run; {error}"
            ) from error

    # --- the schedule -------------------------------------------------------------------------

    def with_ours(self, values: list[Any]) -> list[Any]:
        """A list with an entry for each group: ours get that of the head's."""
        return [*values[: self._at], *values[-1:] * self._count, *values[self._at :]]

    def without_ours(self, values: list[Any]) -> list[Any]:
        return [*values[: self._at], *values[self._ours.stop :]]

    def remove(self) -> None:
        """Give all back as it was."""
        for handle in self._handles:
            handle.remove()
        for group in self._optimizer.param_groups[self._ours]:
            for parameter in group["params"]:
                self._optimizer.state.pop(parameter, None)
        del self._optimizer.param_groups[self._ours]
        self._dressed.undress()
        _joined.discard(self._optimizer)


def _refuse_ranks_apart(ours: State | None) -> None:
    """Each rank saves its own checkpoint; a run that is killed meanwhile leaves two ages."""
    if world() is None:
        return
    step = None if ours is None else int(ours["distiller"]["_extra_state"])
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise KDHooksError(
            f"arcface_torch: the ranks' checkpoints must be of one step; found {steps}, by rank: "
            "the run ended while it saved; on the ranks that are ahead put "
            "checkpoint_gpu_….pt.previous in its place"
        )
