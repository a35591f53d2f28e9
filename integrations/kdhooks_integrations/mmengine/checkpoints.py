"""What MMEngine's checkpoints hold beside tensors, for a reader that takes tensors alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from kdhooks.errors import KDHooksError


@contextmanager
def readable() -> Iterator[None]:
    """Inside, torch reads MMEngine's checkpoints; what was allowed before stays so."""
    allowed = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([one for one in history() if one not in allowed]):
        yield


def history() -> list[Any]:
    """The log's classes and numpy's; of `getattr`, no more than the history's own methods."""
    rebuild = [made.__reduce__()[0] for made in (np.float64(0), np.zeros(1))]
    kinds = {type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")}
    marked = [HistoryBuffer, np.ndarray, np.dtype, *rebuild, *kinds]
    return [*marked, (_method, "builtins.getattr")]


def _method(owner: object, name: str) -> object:
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise KDHooksError(f"checkpoint asks for '{name}' of {owner!r}; MMEngine's own does not")
    return getattr(owner, name)
