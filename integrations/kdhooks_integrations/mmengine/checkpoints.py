"""Lets torch read MMEngine's checkpoints with weights_only, although they contain other objects."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from kdhooks.errors import KDHooksError


@contextmanager
def readable() -> Iterator[None]:
    """Inside this context, torch reads MMEngine's checkpoints; afterwards, as before."""
    allowed = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([one for one in history() if one not in allowed]):
        yield


def history() -> list[Any]:
    """Return the classes of MMEngine's log and numpy, and a `getattr` restricted to the log's."""
    rebuild = [made.__reduce__()[0] for made in (np.float64(0), np.zeros(1))]
    kinds = {type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")}
    marked = [HistoryBuffer, np.ndarray, np.dtype, *rebuild, *kinds]
    return [*marked, (_method, "builtins.getattr")]


def _method(owner: object, name: str) -> object:
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise KDHooksError(
            f"checkpoint: may only use the methods of MMEngine's HistoryBuffer; found '{name}' of "
            f"{owner!r}; it was not written by MMEngine"
        )
    return getattr(owner, name)
