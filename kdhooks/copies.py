"""Classes whose objects lose their effect in a copy or a pickle of a distilled module."""

from collections.abc import Callable
from typing import Any


class NotCopied:
    """Base of an attribute that becomes None in a copy or a pickle of its owner."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


class IdleCopy:
    """Base of a hook that does nothing in a copy or a pickle of its module."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle_hook, ()


def _nothing() -> None:
    return None


def _idle_hook() -> Callable[..., None]:
    return _idle


def _idle(*_: object) -> None: ...
