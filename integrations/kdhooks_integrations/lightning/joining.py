"""Adds groups with the losses' parameters to the optimizer of `configure_optimizers`.

The optimizer and its schedules save the same state as in a run without kdhooks. The state of the
added groups is saved separately, under the key "kdhooks" of the optimizer's state. So a run with
kdhooks resumes from a checkpoint without it, and vice versa.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks_integrations.groups import Dressed, Groups, State, consecutive, merged, numbered

KEY = "kdhooks"
_WITHOUT_MORE_GROUPS = ("LBFGS", "ZeroRedundancyOptimizer")  # importing the latter warns
_BY_HAND = (
    "give one optimizer self.kdhooks.parameter_groups(weight_decay) in configure_optimizers, "
    "besides its other parameters"
)


class Joined:
    """The added groups of one optimizer, until `remove`.

    A group in which configure_optimizers has put only parameters of the losses remains unchanged.
    All other parameters of the losses join with the options of the group that holds most of the
    student.
    """

    def __init__(
        self,
        distiller: Distiller,
        student: nn.Module,
        optimizers: Sequence[Optimizer],
        schedules: Sequence[object],
    ) -> None:
        self._ids = {id(p) for p in distiller.parameters() if p.requires_grad}
        self.optimizer = _only_one(optimizers, self._ids, student)
        groups = self.optimizer.param_groups
        taken = [sum(p.numel() for p in _take_out(group, self._ids)) for group in groups]
        theirs = {id(p): p.numel() for p in student.parameters()}
        sizes = [sum(theirs.get(id(p), 0) for p in group["params"]) for group in groups]
        self._like = max(range(len(groups)), key=lambda place: (taken[place] > 0, sizes[place]))
        count = len(groups)
        self._add(distiller, groups[self._like])
        self._ours = [place for place, group in enumerate(groups) if self._is_ours(group)]
        self._added = len(groups) - count
        self._handles: list[RemovableHandle] = [
            self.optimizer.register_state_dict_post_hook(self._leave_out),
            self.optimizer.register_load_state_dict_pre_hook(self._put_in),
        ]
        self._dressed = Dressed(self)
        for schedule in schedules:
            if getattr(schedule, "optimizer", None) is self.optimizer:
                self._adopt(schedule)

    def _add(self, distiller: Distiller, like: State) -> None:
        options: State = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in like.items()
            if key not in ("params", "param_names")
        }
        names = {id(p): f"{KEY}.{name}" for name, p in distiller.named_parameters()}
        there = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for group in distiller.parameter_groups(options.get("weight_decay", 0.0)):
            ids = self._ids - there
            parameters: list[Any] = [p for p in group["params"] if id(p) in ids]
            if "param_names" in like:
                parameters = [(names[id(p)], p) for p in parameters]
            if parameters:
                decay = {key: group[key] for key in ("weight_decay",) if key in options}
                self.optimizer.add_param_group({**options, **decay, "params": parameters})

    def _is_ours(self, group: State) -> bool:
        return bool(group["params"]) and all(id(p) in self._ids for p in group["params"])

    def _adopt(self, schedule: object) -> None:
        if not isinstance(schedule, LRScheduler):
            raise KDHooksError(
                "lightning: the losses' parameters join the optimizer, whose schedule must be a "
                f"torch.optim.lr_scheduler; found {type(schedule).__name__}; {_BY_HAND}, and "
                "create the schedule after it, or use methods that train no parameters"
            )
        if self._added:
            self._dressed.resize(schedule, self._extended)
        self._dressed.dress(schedule)

    def _extended(self, values: list[Any]) -> list[Any]:
        return [*values, *[values[self._like]] * self._added]

    # --- the state ----------------------------------------------------------------------------

    def with_ours(self, values: list[Any]) -> list[Any]:
        """Insert an entry for each added group: the entry of the group whose options it has."""
        like = values[self._like - sum(place < self._like for place in self._ours)]
        values = list(values)
        for place in self._ours:
            values.insert(place, like)
        return values

    def without_ours(self, values: list[Any]) -> list[Any]:
        return [value for place, value in enumerate(values) if place not in self._ours]

    def _leave_out(self, optimizer: Optimizer, state: State) -> State:
        groups: Groups = state["param_groups"]
        ours = numbered([groups[place] for place in self._ours], state["state"])
        return {**numbered(self.without_ours(groups), state["state"]), KEY: ours}

    def _put_in(self, optimizer: Optimizer, state: State) -> State:
        theirs: Groups = state["param_groups"]
        if len(theirs) != len(optimizer.param_groups) - len(self._ours):
            return state  # the state of another student, which torch refuses
        ours: State = state.get(KEY) or {"state": {}, "param_groups": self._fresh(theirs)}
        groups = list(theirs)
        for place, group in zip(self._ours, ours["param_groups"], strict=True):
            groups.insert(place, group)
        return {**state, **merged(groups, ours["param_groups"], state["state"], ours["state"])}

    def _fresh(self, theirs: Groups) -> Groups:
        """Return the added groups with the current scheduled values of the group they copy."""
        like = self.with_ours(theirs)[self._ours[0]]
        own = [self.optimizer.param_groups[place] for place in self._ours]
        kept = ("weight_decay", "param_names")
        return [
            {**like, **{key: group[key] for key in kept if key in group}, "params": numbers}
            for group, numbers in zip(
                own, consecutive([len(group["params"]) for group in own]), strict=True
            )
        ]

    def remove(self) -> None:
        """Restore the optimizer and its schedules."""
        for handle in self._handles:
            handle.remove()
        for place in reversed(self._ours):
            for parameter in self.optimizer.param_groups[place]["params"]:
                self.optimizer.state.pop(parameter, None)
            del self.optimizer.param_groups[place]
        self._dressed.undress()


def _only_one(optimizers: Sequence[Optimizer], ours: set[int], student: nn.Module) -> Optimizer:
    """Return the optimizer that holds the losses' parameters, or else the student's."""
    theirs = {id(p) for p in student.parameters()}
    homes = [one for one in optimizers if _holds(one, ours)]
    homes = homes or [one for one in optimizers if _holds(one, theirs)]
    if len(homes) != 1:
        raise KDHooksError(
            "lightning: one optimizer must train the losses' parameters besides the student; found "
            f"{len(homes)} that train the student; {_BY_HAND}, or use methods that train none"
        )
    if any(kind.__name__ in _WITHOUT_MORE_GROUPS for kind in type(homes[0]).__mro__):
        raise KDHooksError(
            "lightning: the losses' parameters need groups of their own, and "
            f"{type(homes[0]).__name__} does not accept more groups; use another optimizer, or "
            "methods that train no parameters"
        )
    return homes[0]


def _holds(optimizer: Optimizer, ids: set[int]) -> bool:
    return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])


def _take_out(group: State, ours: set[int]) -> list[nn.Parameter]:
    """Remove the losses' parameters from a group that also holds others, and return them."""
    members: list[nn.Parameter] = group["params"]
    if all(id(p) in ours for p in members):
        return []
    kept = [place for place, p in enumerate(members) if id(p) not in ours]
    found = [p for p in members if id(p) in ours]
    group["params"] = [members[place] for place in kept]
    if "param_names" in group:
        group["param_names"] = [group["param_names"][place] for place in kept]
    return found
