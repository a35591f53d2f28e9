"""What a copy or a pickle of a distilled module carries in place of the hooks of the original."""

from collections.abc import Callable
from typing import Any


class NotCopied:
    """An attribute; a copy or a pickle of its owner has None instead."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


class IdleCopy:
    """A hook; a copy or a pickle of its module has a hook instead that does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle_hook, ()


def _nothing() -> None:
    return None


def _idle_hook() -> Callable[..., None]:
    return _idle


def _idle(*_: object) -> None: ...
