"""The folder of `neighbours`: the index, how far it goes, and of which rows it is."""

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
_AGAIN = "remove the folder and mine again, or name another"
_CHUNK = 8192  # classes that are checked at a time


def read_state(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far the mining in a folder goes; None if there is none. It must be the one wanted."""
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
        raise KDHooksError(f"neighbours: '{path}' must say {', '.join(_COUNTS)}; {_AGAIN}")
    rows = state.get("rows")
    if not (isinstance(rows, list) and all(isinstance(digest, str) for digest in rows)):
        raise KDHooksError(f"neighbours: '{path}' must say rows, digests of them; {_AGAIN}")
    for name in [name for name in wanted if name not in ("done", "passed_over")]:
        if name == "rows" and rows != wanted[name]:
            raise KDHooksError(
                f"neighbours: '{folder}' was mined with other rows than these; name another "
                "folder, or mine again"
            )
        if state.get(name) != wanted[name]:
            raise KDHooksError(
                f"neighbours: '{folder}' was mined with {name} {state.get(name)}, not "
                f"{wanted[name]}; name another folder, or mine again"
            )
    found: dict[str, Any] = state
    return found


def made(folder: Path, state: Mapping[str, Any]) -> NDArray[np.int32]:
    """An empty index, in a folder without one."""
    shape = (state["classes"], state["k"])
    path = folder / INDEX
    try:
        if path.exists():
            raise KDHooksError(
                f"neighbours: '{path}' is there without {STATE}; remove it, or name another folder"
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
    """The index in a folder, found to be whole before it is opened for writing.

    own: the classes whose numbers are checked; by default those that are done.
    """
    path, shape = folder / INDEX, (state["classes"], state["k"])
    try:
        size = path.stat().st_size
        index = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:  # also where it is cut short
        raise KDHooksError(
            f"neighbours: '{path}' can't be read ({error}): it is damaged, or cut short; {_AGAIN}"
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
    """Other classes, each once, and -1 behind the last of them."""
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
            f"behind them; class {start + row} has {part[row, place]} at place {place}; {_AGAIN}"
        )


def keep(folder: Path, index: NDArray[np.int32], state: Mapping[str, Any]) -> None:
    """First the index, then, at one stroke, the word that it is there."""
    assert isinstance(index, np.memmap)
    draft = folder / f"{STATE}.part"
    try:
        index.flush()
        draft.write_text(json.dumps(state), encoding="utf-8")
        draft.replace(folder / STATE)
    except OSError as error:
        raise KDHooksError(
            f"neighbours: '{folder}' can't be written ({error.strerror}); make room, and start "
            "again: what is done stays"
        ) from error
