"""The one exception for errors that a caller can fix, and helpers for its messages."""

import difflib
from collections.abc import Iterable

from torch import Tensor


class KDHooksError(Exception):
    """An error that the caller can fix; the message states subject, rule, value found, way out."""


KDHooksError.__module__ = "kdhooks"


def near_miss(found: str, known: Iterable[str]) -> str:
    """Return "did you mean 'layer3'? " for an unknown name, or "" if no known name is close."""
    names = list(known)
    close = [name for name in names if name.lower() == found.strip().lower()]
    close = close or difflib.get_close_matches(found, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in close)}? " if close else ""


def in_one_line(error: Exception) -> str:
    """Return the class of an error and the first line of its message."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def shown_tensor(value: object) -> str:
    """Describe a value in an error: a tensor by dtype and shape, anything else by its type."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
