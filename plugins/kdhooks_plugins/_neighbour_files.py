"""The folder of `neighbours`: the index, the progress, and digests of the rows."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdhooks import KDHooksError

INDEX, STATE = "index.npy", "mining.json"
_COUNTS = ("classes", "k", "done", "passed_over")
_AGAIN = "remove the folder and run the search again, or name another"
_CHUNK = 8192  # classes that are checked at a time


def read_state(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the state of a folder's search, which must match `wanted`; None if there is none."""
    path = folder / STATE
    try:
        if not path.exists():
            return None
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KDHooksError(f"neighbours: '{path}' can't be read ({error}); {_AGAIN}") from error
    counts = [state.get(name) if isinstance(state, dict) else None for name in _COUNTS]
    whole = all(type(count) is int and count >= 0 for count in counts)
    if not whole or state["done"] > state["classes"]:
        raise KDHooksError(f"neighbours: '{path}' must contain {', '.join(_COUNTS)}; {_AGAIN}")
    rows = state.get("rows")
    if not (isinstance(rows, list) and all(isinstance(digest, str) for digest in rows)):
        raise KDHooksError(f"neighbours: '{path}' must contain digests as rows; {_AGAIN}")
    for name in [name for name in wanted if name not in ("done", "passed_over")]:
        if name == "rows" and rows != wanted[name]:
            raise KDHooksError(
                f"neighbours: '{folder}' was created from other rows than these; name another "
                "folder, or run the search again"
            )
        if state.get(name) != wanted[name]:
            raise KDHooksError(
                f"neighbours: '{folder}' was created with {name} {state.get(name)}, not "
                f"{wanted[name]}; name another folder, or run the search again"
            )
    found: dict[str, Any] = state
    return found


def made(folder: Path, state: Mapping[str, Any]) -> NDArray[np.int32]:
    """Create an empty index in a folder that has none."""
    shape = (state["classes"], state["k"])
    path = folder / INDEX
    try:
        if path.exists():
            raise KDHooksError(
                f"neighbours: '{path}' exists without {STATE}; remove it, or name another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 4 * shape[0] * shape[1]:
            raise KDHooksError(f"neighbours: the disk has no room for '{path}', {shape} of int32")
        index = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=shape)
    except OSError as error:
        raise KDHooksError(
            f"neighbours: '{folder}' must be a folder that can be written; found "
            f"'{error.strerror}'; name another"
        ) from error
    keep(folder, index, state)
    return index


def opened(
    folder: Path, state: Mapping[str, Any], mode: Literal["r", "r+"], own: slice | None = None
) -> NDArray[np.int32]:
    """Open the index of a folder, after checking that it is complete and undamaged.

    own: the classes whose neighbours are checked; by default those that are done.
    """
    path, shape = folder / INDEX, (state["classes"], state["k"])
    try:
        size = path.stat().st_size
        index = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:  # a truncated file raises one of these too
        raise KDHooksError(
            f"neighbours: '{path}' can't be read ({error}): it is damaged or truncated; {_AGAIN}"
        ) from error
    whole = isinstance(index, np.memmap) and index.flags.c_contiguous
    if not whole or (index.shape, index.dtype) != (shape, np.dtype(np.int32)):
        found = f"{index.shape} of {index.dtype}" if isinstance(index, np.ndarray) else "an archive"
        raise KDHooksError(
            f"neighbours: '{path}' must hold {shape} of int32; found {found}; {_AGAIN}"
        )
    if size != index.offset + index.nbytes:
        raise KDHooksError(
            f"neighbours: '{path}' must have {index.offset + index.nbytes} bytes; found {size}; "
            f"{_AGAIN}"
        )
    own = own or slice(0, state["done"])
    for start in range(own.start, own.stop, _CHUNK):
        _check_numbers(index[start : min(start + _CHUNK, own.stop)], start, len(index), path)
    whole_index: NDArray[np.int32] = np.load(path, mmap_mode=mode)
    return whole_index


def _check_numbers(part: NDArray[np.int32], start: int, classes: int, path: Path) -> None:
    """Check that each row holds other classes, each only once, and -1 after the last of them."""
    own = np.arange(start, start + len(part))[:, None]
    wrong = (part < -1) | (part >= classes) | (part == own)
    wrong[:, 1:] |= (part[:, 1:] >= 0) & (part[:, :-1] < 0)
    order = np.argsort(part, axis=1, kind="stable")
    in_order = np.take_along_axis(part, order, axis=1)
    twice = np.zeros_like(wrong)
    twice[:, 1:] = (in_order[:, 1:] >= 0) & (in_order[:, 1:] == in_order[:, :-1])
    np.put_along_axis(wrong, order, np.take_along_axis(wrong, order, axis=1) | twice, axis=1)
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        raise KDHooksError(
            f"neighbours: '{path}' must hold other classes, 0 to {classes - 1}, each once, and -1 "
            f"after them; class {start + row} has {part[row, place]} at place {place}; {_AGAIN}"
        )


def keep(folder: Path, index: NDArray[np.int32], state: Mapping[str, Any]) -> None:
    """Write the index first and then, atomically, the state that declares it written."""
    assert isinstance(index, np.memmap)
    draft = folder / f"{STATE}.part"
    try:
        index.flush()
        draft.write_text(json.dumps(state), encoding="utf-8")
        draft.replace(folder / STATE)
    except OSError as error:
        raise KDHooksError(
            f"neighbours: '{folder}' can't be written ({error.strerror}); free disk space and run "
            "again: the search continues from what is written"
        ) from error
