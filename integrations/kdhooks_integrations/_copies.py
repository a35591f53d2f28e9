"""Hooks that a copy of a distilled module goes without."""

from collections.abc import Callable
from typing import Any


class LeftBehind:
    """A hook; what a copy or a pickle of its module carries in its place does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_idle, ()


def _make_idle() -> Callable[..., None]:
    return _idle


def _idle(*_: object) -> None: ...
