"""A trainer's optimizer trains the methods' own weights, and is saved as if it did not.

What the trainer saves of the two is what it would save without kdhooks; what the methods need to go
on lies beside it, under the key "kdhooks" of the optimizer's state, where a run without kdhooks
passes it over. So either kind of run resumes from a checkpoint of the other.
"""

import logging
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypeAlias
from weakref import WeakSet

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdhooks.classes.shards import world
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks.taps import Removable

log = logging.getLogger("kdhooks")

KEY = "kdhooks"

State: TypeAlias = dict[str, Any]
Groups: TypeAlias = list[dict[str, Any]]
Change: TypeAlias = Callable[[list[Any]], list[Any]]

_BY_GROUP = (  # a schedule's lists with an entry a group
    "base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums",
)  # fmt: skip
_INNER = "_schedulers"  # of SequentialLR and ChainedScheduler

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
        self._dressed: dict[LRScheduler, type[LRScheduler]] = {}
        self._resize(schedule, self._with)
        self.adopt(schedule)

    def adopt(self, schedule: LRScheduler) -> None:
        """Save and load it as if our groups were not there; it may have been made with them."""
        for inner in vars(schedule).get(_INNER, ()):
            if inner in self._dressed:  # what is saved of it goes through the outer one now
                inner.__class__ = self._dressed.pop(inner)
        self._dressed[schedule] = type(schedule)
        schedule.__class__ = _as_without(type(schedule), self)

    def _resize(self, schedule: LRScheduler, change: Change) -> None:
        for inner in vars(schedule).get(_INNER, ()):
            self._resize(inner, change)
        vars(schedule).update(_by_group(vars(schedule), change))

    def _count_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.steps += 1

    # --- the optimizer ------------------------------------------------------------------------

    def _take_out(self, optimizer: Optimizer, state: State) -> State:
        groups: Groups = state["param_groups"]
        ours = _numbered(groups[self._ours], state["state"])
        theirs = _numbered(self._without(groups), state["state"])
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
        return _merged(groups, ours["param_groups"], state["state"], ours["state"])

    def _fresh_groups(self, optimizer: Optimizer, head: dict[str, Any]) -> Groups:
        """Our groups with what the checkpoint says of the head's, but for their decay."""
        own = optimizer.param_groups[self._ours]
        sizes = [len(group["params"]) for group in own]
        return [
            {**head, "weight_decay": group["weight_decay"], "params": numbers}
            for group, numbers in zip(own, _consecutive(sizes), strict=True)
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

    def with_ours(self, state: State) -> State:
        """A schedule's state with entries for our groups, those of the head's."""
        return _changed(state, self._with)

    def without_ours(self, state: State) -> State:
        return _changed(state, self._without)

    def _with(self, values: list[Any]) -> list[Any]:
        return [*values[: self._at], *values[-1:] * self._count, *values[self._at :]]

    def _without(self, values: list[Any]) -> list[Any]:
        return [*values[: self._at], *values[self._ours.stop :]]

    def remove(self) -> None:
        """Give all back as it was."""
        for handle in self._handles:
            handle.remove()
        for group in self._optimizer.param_groups[self._ours]:
            for parameter in group["params"]:
                self._optimizer.state.pop(parameter, None)
        del self._optimizer.param_groups[self._ours]
        for schedule, kind in self._dressed.items():
            schedule.__class__ = kind
            self._resize(schedule, self._without)
        _joined.discard(self._optimizer)


def _by_group(state: State, change: Change) -> State:
    return {key: change(v) for key, v in state.items() if key in _BY_GROUP and v is not None}


def _changed(state: State, change: Change) -> State:
    inner = [_changed(one, change) for one in state.get(_INNER, ())]
    return {**state, **_by_group(state, change), **({_INNER: inner} if inner else {})}


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


def _as_without(kind: type[LRScheduler], joined: Joined) -> type[LRScheduler]:
    """A kind of schedule whose state is that of a run without kdhooks."""

    class Schedule(kind):  # type: ignore[misc,valid-type]
        def state_dict(self) -> State:
            state: State = super().state_dict()
            return joined.without_ours(state)

        def load_state_dict(self, state_dict: State) -> None:
            super().load_state_dict(joined.with_ours(state_dict))

    return Schedule


def _numbered(groups: Groups, state: dict[int, Any]) -> State:
    """These groups alone, their parameters numbered from 0."""
    every = (old for group in groups for old in group["params"])
    number = {old: new for new, old in enumerate(every)}
    return {
        "state": {number[old]: of for old, of in state.items() if old in number},
        "param_groups": [{**g, "params": [number[old] for old in g["params"]]} for g in groups],
    }


def _merged(
    groups: Groups, ours: Groups, theirs_state: dict[int, Any], ours_state: dict[int, Any]
) -> State:
    """All groups in a row, their parameters numbered from 0; `ours` are among them."""
    state: dict[int, Any] = {}
    merged: Groups = []
    for group, numbers in zip(
        groups, _consecutive([len(g["params"]) for g in groups]), strict=True
    ):
        source = ours_state if any(group is own for own in ours) else theirs_state
        pairs = list(zip(group["params"], numbers, strict=True))
        state.update({new: copy(source[old]) for old, new in pairs if old in source})
        merged.append({**group, "params": numbers})
    return {"state": state, "param_groups": merged}


def _consecutive(sizes: Sequence[int]) -> list[list[int]]:
    """[2, 1] -> [[0, 1], [2]]."""
    numbers = iter(range(sum(sizes)))
    return [[next(numbers) for _ in range(size)] for size in sizes]
