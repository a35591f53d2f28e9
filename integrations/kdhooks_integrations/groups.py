"""Saves and loads optimizers and LR schedules without the methods' parameter groups.

An LR schedule keeps lists with one entry for each group of its optimizer; an optimizer's state
numbers the parameters of all groups consecutively.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Protocol, TypeAlias

from torch.optim.lr_scheduler import LRScheduler

State: TypeAlias = dict[str, Any]
Groups: TypeAlias = list[dict[str, Any]]
Change: TypeAlias = Callable[[list[Any]], list[Any]]
"""Adds the entries of the methods' groups to a list with one entry per group, or removes them."""

_BY_GROUP = (  # the attributes of schedules that are lists with one entry per group
    "base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums",
)  # fmt: skip
_INNER = "_schedulers"  # an attribute of SequentialLR and ChainedScheduler


class Joining(Protocol):
    """The object that has added the methods' groups to an optimizer."""

    def with_ours(self, values: list[Any], /) -> list[Any]: ...

    def without_ours(self, values: list[Any], /) -> list[Any]: ...


# --- schedules -----------------------------------------------------------------------------------


class Dressed:
    """Schedules whose state is that of a run without the methods, until `undress`."""

    def __init__(self, joining: Joining) -> None:
        self._joining = joining
        self._kinds: dict[LRScheduler, type[LRScheduler]] = {}

    def resize(self, schedule: LRScheduler, change: Change) -> None:
        for inner in vars(schedule).get(_INNER, ()):
            self.resize(inner, change)
        vars(schedule).update(_by_group(vars(schedule), change))

    def dress(self, schedule: LRScheduler) -> None:
        for inner in vars(schedule).get(_INNER, ()):
            if inner in self._kinds:  # the outer schedule now converts its state
                inner.__class__ = self._kinds.pop(inner)
        self._kinds[schedule] = type(schedule)
        schedule.__class__ = _as_without(type(schedule), self._joining)

    def undress(self) -> None:
        """Restore the class and the lists of every schedule."""
        for schedule, kind in self._kinds.items():
            schedule.__class__ = kind
            self.resize(schedule, self._joining.without_ours)
        self._kinds.clear()


def _by_group(state: State, change: Change) -> State:
    return {key: change(v) for key, v in state.items() if key in _BY_GROUP and v is not None}


def _changed(state: State, change: Change) -> State:
    inner = [_changed(one, change) for one in state.get(_INNER, ())]
    return {**state, **_by_group(state, change), **({_INNER: inner} if inner else {})}


def _as_without(kind: type[LRScheduler], joining: Joining) -> type[LRScheduler]:
    """Return a subclass whose state is that of a run without kdhooks."""

    class Schedule(kind):  # type: ignore[misc,valid-type]
        def state_dict(self) -> State:
            state: State = super().state_dict()
            return _changed(state, joining.without_ours)

        def load_state_dict(self, state_dict: State) -> None:
            super().load_state_dict(_changed(state_dict, joining.with_ours))

    Schedule.__name__ = kind.__name__  # logs show this name
    return Schedule


# --- optimizers ----------------------------------------------------------------------------------


def numbered(groups: Groups, state: dict[int, Any]) -> State:
    """Return an optimizer state with only these groups, whose parameters are numbered from 0."""
    every = (old for group in groups for old in group["params"])
    number = {old: new for new, old in enumerate(every)}
    return {
        "state": {number[old]: of for old, of in state.items() if old in number},
        "param_groups": [{**g, "params": [number[old] for old in g["params"]]} for g in groups],
    }


def merged(
    groups: Groups, ours: Groups, theirs_state: dict[int, Any], ours_state: dict[int, Any]
) -> State:
    """Return an optimizer state with all groups, whose parameters are numbered from 0.

    ours: the methods' groups among them.
    """
    state: dict[int, Any] = {}
    joined: Groups = []
    for group, numbers in zip(groups, consecutive([len(g["params"]) for g in groups]), strict=True):
        source = ours_state if any(group is own for own in ours) else theirs_state
        pairs = list(zip(group["params"], numbers, strict=True))
        state.update({new: copy(source[old]) for old, new in pairs if old in source})
        joined.append({**group, "params": numbers})
    return {"state": state, "param_groups": joined}


def consecutive(sizes: Sequence[int]) -> list[list[int]]:
    """[2, 1] -> [[0, 1], [2]]."""
    numbers = iter(range(sum(sizes)))
    return [[next(numbers) for _ in range(size)] for size in sizes]
