"""The classes nearest to each class, for CoupleFace: mined once, ahead of the training.

    python -m kdhooks_plugins.neighbours rows.pt --k 100 --out neighbours

Then `{ name = "coupleface", neighbours = "neighbours" }`. The folder holds what is done so far, so
a run that was stopped goes on from there; and a digest of the rows, so that it serves no others.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdhooks import KDHooksError
from kdhooks.arguments import usable_device
from kdhooks.classes.rows import Rows
from kdhooks.tensor_files import user_path
from kdhooks_plugins._neighbour_files import STATE, keep, made, opened, read_state

ROWS = 1024  # classes at a time
COLUMNS = 65536  # against so many others

Progress: TypeAlias = Callable[[Sequence[int]], Iterable[int]]
"""What to wrap around the chunks: tqdm, for one."""


@dataclass(frozen=True)
class Mined:
    index: Tensor  # (c k) int32, nearest first; -1 where fewer than k are left
    passed_over: int  # classes that have others closer than max_sim


def nearest_classes(
    rows: Rows,
    k: int,
    max_sim: float | None = None,
    *,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    chunk: tuple[int, int] = (ROWS, COLUMNS),
    progress: Progress = list,
) -> Mined:
    """Each class's k nearest others by cosine; the device holds all rows meanwhile.

    Classes closer than max_sim count as the same person under two labels: they are passed over.
    folder: keep the index there, and go on with what it holds already.
    """
    if type(k) is not int or not 1 <= k < rows.total:
        raise KDHooksError(
            f"neighbours: k must lie between 1 and {rows.total - 1}, the other classes; found {k}"
        )
    if max_sim is not None and not -1 <= max_sim <= 1:
        raise KDHooksError(
            f"neighbours: max_sim is a cosine, from -1 to 1, about 0.7; found {max_sim}"
        )
    key = {"rows": digest(rows), "classes": rows.total, "k": k, "max_sim": max_sim}
    state: dict[str, Any] = {**key, "done": 0, "passed_over": 0}
    index: NDArray[np.int32] = np.full((rows.total, k), -1, dtype=np.int32)
    if folder is not None:
        folder = user_path(folder, "neighbours")
        known = read_state(folder, state)
        index = opened(folder, known, "r+") if known else made(folder, state)
        state = known or state
    left = range(state["done"], rows.total, chunk[0])
    unit = torch.empty(rows.total if left else 0, rows.dim, device=device)
    if left:
        for offset, part in rows.chunks(COLUMNS):
            unit[offset : offset + len(part)] = part
    for start in progress(left):
        stop = min(start + chunk[0], rows.total)
        found, close = nearest_of(unit, slice(start, stop), k, max_sim, chunk[1])
        index[start:stop] = found.to("cpu", torch.int32).numpy()
        state.update(done=stop, passed_over=state["passed_over"] + close)
        if folder is not None:
            keep(folder, index, state)
    return Mined(torch.from_numpy(np.array(index)), state["passed_over"])


def mined(folder: str | Path, rows: Rows, k: int, max_sim: float | None) -> Mined:
    """What a folder holds, if it is complete and of these rows; its own k may be larger."""
    folder = user_path(folder, "neighbours")
    state = read_state(folder, {"rows": digest(rows), "classes": rows.total, "max_sim": max_sim})
    if state is None:
        raise KDHooksError(
            f"neighbours: '{folder}' holds no {STATE}; make it with "
            "python -m kdhooks_plugins.neighbours"
        )
    if state["done"] < state["classes"] or state["k"] < k:
        raise KDHooksError(
            f"neighbours: '{folder}' must hold {k} of each class; it holds {state['k']} of "
            f"{state['done']} among {state['classes']} classes; run the mining to its end"
        )
    index = opened(folder, state, "r")
    return Mined(torch.from_numpy(np.array(index[:, :k])), state["passed_over"])


def digest(rows: Rows) -> str:
    """SHA-256 of all rows, as they are stored."""
    found = hashlib.sha256()
    for start in range(0, rows.total, COLUMNS):
        found.update(rows.slice(start, min(start + COLUMNS, rows.total)).numpy().data)
    return found.hexdigest()


def nearest_of(
    unit: Tensor, own: slice, k: int, max_sim: float | None = None, columns: int = COLUMNS
) -> tuple[Tensor, int]:
    """(c e) -> the index (own k) of some classes, and how many of them have one too close."""
    number = torch.arange(len(unit), device=unit.device)
    rows, itself = unit[own], number[own, None]
    best = rows.new_full((len(rows), k), -torch.inf)
    index = torch.full_like(best, -1, dtype=torch.long)
    close = torch.zeros(len(rows), dtype=torch.bool, device=unit.device)
    for others, numbers in zip(unit.split(columns), number.split(columns), strict=True):
        cosine = rows @ others.T
        cosine.masked_fill_(numbers == itself, -torch.inf)
        if max_sim is not None:
            close |= (cosine > max_sim).any(dim=1)
            cosine.masked_fill_(cosine > max_sim, -torch.inf)
        found, place = cosine.topk(min(k, len(others)), dim=1)
        best, kept = torch.cat([best, found], dim=1).topk(k, dim=1)
        index = torch.cat([index, numbers[place]], dim=1).gather(1, kept)
    return index.masked_fill_(best == -torch.inf, -1), int(close.sum())


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where the caller can fix what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m kdhooks_plugins.neighbours", description=__doc__
    )
    parser.add_argument("rows", help="classifier rows or class means (c e): a file, or a glob")
    parser.add_argument("--k", type=int, default=100, help="neighbours of each class")
    parser.add_argument("--max-sim", type=float, help="pass over classes closer than this")
    parser.add_argument("--out", required=True, help="folder for the index")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=default)
    try:
        options = parser.parse_args(argv)
        rows = Rows.open(options.rows)
        found = nearest_classes(
            rows,
            options.k,
            options.max_sim,
            folder=options.out,
            device=options.device,
            progress=_bar,
        )
    except KDHooksError as error:
        print(f"kdhooks: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.k} neighbours of {rows.total} classes in {options.out}; {found.passed_over} "
        "classes had others too close"
    )
    return 0


def _bar(chunks: Sequence[int]) -> Iterator[int]:
    """How far the mining is, on one line."""
    for number, start in enumerate(chunks, start=1):
        yield start
        print(f"\r{number} of {len(chunks)} chunks", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
