"""Find the classes nearest to each class, for CoupleFace, once before the training.

    python -m kdhooks_plugins.neighbours rows.pt --k 100 --out neighbours

Then set `{ name = "coupleface", neighbours = "neighbours" }`. The folder holds the results so far,
from which an interrupted run continues. It also holds digests of the rows: the training refuses the
folder if its rows are different.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks import KDHooksError
from kdhooks.arguments import usable_device
from kdhooks.classes.per_class import digest
from kdhooks.classes.rows import Rows
from kdhooks.progress import progress
from kdhooks.tensor_files import user_path
from kdhooks_plugins._neighbour_files import STATE, keep, made, opened, read_state

ROWS = 1024  # classes that are searched at a time
COLUMNS = 65536  # other classes that they are compared with at a time
BLOCK = 8192  # classes for each digest in the folder


@dataclass(frozen=True)
class Mined:
    index: Tensor  # (c k) int32, nearest first; -1 if a class has fewer than k
    passed_over: int  # number of classes that have others closer than max_sim


def nearest_classes(
    rows: Rows,
    k: int,
    max_sim: float | None = None,
    *,
    own: slice | None = None,
    device: torch.device | str = "cpu",
    chunk: tuple[int, int] = (ROWS, COLUMNS),
) -> Mined:
    """Return the k other classes with the highest cosine, for the classes `own`, by default all.

    Classes closer than max_sim count as one person with two labels, and are skipped.
    The device holds the rows of `own`, and chunk[1] other rows at a time.
    """
    _check(rows, k, max_sim)
    own = own or slice(0, rows.total)
    unit = F.normalize(rows.slice(own.start, own.stop)).to(device)
    best, index, close = Nearest.none_of(unit, k)
    for start in progress(range(0, rows.total, chunk[1]), "searching neighbours"):
        others = F.normalize(rows.slice(start, min(start + chunk[1], rows.total))).to(unit)
        for first in range(0, len(unit), chunk[0]):
            part = slice(first, first + chunk[0])
            found = merged(
                Nearest(best[part], index[part], close[part]),
                (unit[part], own.start + first),
                (others, start),
                max_sim,
            )
            best[part], index[part], close[part] = found
    index.masked_fill_(best == -torch.inf, -1)
    return Mined(index.cpu(), int(close.sum()))


def mine_into(
    folder: str | Path,
    rows: Rows,
    k: int,
    max_sim: float | None = None,
    *,
    device: torch.device | str = "cpu",
    chunk: tuple[int, int] = (ROWS, COLUMNS),
) -> Mined:
    """Search the neighbours of all classes and store them in a folder; continue what it holds.

    The device holds all rows during the search.
    """
    _check(rows, k, max_sim)
    folder = user_path(folder, "neighbours")
    key = {"rows": digests(rows), "classes": rows.total, "k": k, "max_sim": max_sim}
    state: dict[str, Any] = {**key, "done": 0, "passed_over": 0}
    known = read_state(folder, state)
    index = opened(folder, known, "r+") if known else made(folder, state)
    state = known or state
    left = range(state["done"], rows.total, chunk[0])
    unit = torch.empty(rows.total if left else 0, rows.dim, device=device)
    if left:
        for offset, part in rows.chunks(COLUMNS):
            unit[offset : offset + len(part)] = part
    for start in progress(left, "searching neighbours"):
        stop = min(start + chunk[0], rows.total)
        found, close = nearest_of(unit, slice(start, stop), k, max_sim, chunk[1])
        index[start:stop] = found.cpu().numpy()
        state.update(done=stop, passed_over=state["passed_over"] + close)
        keep(folder, index, state)
    return Mined(torch.from_numpy(np.array(index)), state["passed_over"])


def mined(
    folder: str | Path, rows: Rows, k: int, max_sim: float | None, own: slice | None = None
) -> Mined:
    """Read the neighbours of some classes, by default all, from a complete folder of these rows.

    The folder's own k may be larger.
    """
    folder, own = user_path(folder, "neighbours"), own or slice(0, rows.total)
    state = read_state(folder, {"classes": rows.total, "max_sim": max_sim})
    if state is None:
        raise KDHooksError(
            f"neighbours: '{folder}' holds no {STATE}; create it with "
            "python -m kdhooks_plugins.neighbours"
        )
    if state["done"] < state["classes"] or state["k"] < k:
        raise KDHooksError(
            f"neighbours: '{folder}' must hold {k} of each class; it holds {state['k']} of "
            f"{state['done']} among {state['classes']} classes; run the search to its end, with "
            f"--k {k} or more"
        )
    blocks = slice(own.start // BLOCK, -(-own.stop // BLOCK))
    if digests(rows, blocks) != state["rows"][blocks]:
        raise KDHooksError(
            f"neighbours: '{folder}' was created from other rows than these; name another folder, "
            "or run the search again"
        )
    index = opened(folder, state, "r", own)
    return Mined(torch.from_numpy(np.array(index[own, :k])), state["passed_over"])


def digests(rows: Rows, blocks: slice | None = None) -> list[str]:
    """Return the digest of each block of rows, in the dtype in which they are stored."""
    blocks = blocks or slice(0, -(-rows.total // BLOCK))
    found = []
    for start in range(blocks.start * BLOCK, min(blocks.stop * BLOCK, rows.total), BLOCK):
        part = rows.slice(start, min(start + BLOCK, rows.total))
        found.append(f"{digest(part, start):016x}")
    return found


def nearest_of(
    unit: Tensor, own: slice, k: int, max_sim: float | None = None, columns: int = COLUMNS
) -> tuple[Tensor, int]:
    """(c e) -> the index (own k) of some classes, and how many of them skip a close class."""
    found = Nearest.none_of(unit[own], k)
    for start, others in zip(range(0, len(unit), columns), unit.split(columns), strict=True):
        found = merged(found, (unit[own], own.start), (others, start), max_sim)
    return found.classes.masked_fill(found.best == -torch.inf, -1), int(found.close.sum())


class Nearest(NamedTuple):
    """The k nearest of r classes so far."""

    best: Tensor  # (r k), cosines, largest first
    classes: Tensor  # (r k) int32
    close: Tensor  # (r): whether another class is closer than max_sim

    @classmethod
    def none_of(cls, unit: Tensor, k: int) -> "Nearest":
        best = unit.new_full((len(unit), k), -torch.inf)
        close = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
        return cls(best, torch.full_like(best, -1, dtype=torch.int32), close)


def merged(
    found: Nearest, own: tuple[Tensor, int], others: tuple[Tensor, int], max_sim: float | None
) -> Nearest:
    """Return the k nearest of `found` and the others (c e) together.

    own (r e), others: unit rows, and the number of the class of the first row.
    """
    (ours, first), (theirs, offset) = own, others
    numbers = torch.arange(offset, offset + len(theirs), device=ours.device, dtype=torch.int32)
    itself = torch.arange(first, first + len(ours), device=ours.device)[:, None]
    cosine = ours @ theirs.T
    cosine.masked_fill_(numbers == itself, -torch.inf)
    close = found.close
    if max_sim is not None:
        near = cosine > max_sim
        close = close | near.any(dim=1)
        cosine.masked_fill_(near, -torch.inf)
    k = found.best.shape[1]
    value, place = cosine.topk(min(k, len(theirs)), dim=1)
    best, kept = torch.cat([found.best, value], dim=1).topk(k, dim=1)
    index = torch.cat([found.classes, numbers[place]], dim=1).gather(1, kept)
    return Nearest(best, index, close)


def _check(rows: Rows, k: int, max_sim: float | None) -> None:
    if type(k) is not int or not 1 <= k < rows.total:
        raise KDHooksError(
            f"neighbours: k must lie between 1 and {rows.total - 1}, the other classes; found {k}"
        )
    if max_sim is not None and not -1 <= max_sim <= 1:
        raise KDHooksError(
            f"neighbours: max_sim is a cosine, from -1 to 1, about 0.7; found {max_sim}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 for an error that the caller can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m kdhooks_plugins.neighbours", description=__doc__
    )
    parser.add_argument("rows", help="classifier rows or class means (c e): a file, or a glob")
    parser.add_argument("--k", type=int, default=100, help="neighbours of each class (default 100)")
    parser.add_argument(
        "--max-sim", type=float, help="skip classes with a higher cosine (default: skip none)"
    )
    parser.add_argument("--out", required=True, help="folder for the index")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=usable_device, default=default, help=f"torch device (default {default})"
    )
    try:
        options = parser.parse_args(argv)
        rows = Rows.open(options.rows)
        found = mine_into(
            options.out,
            rows,
            options.k,
            options.max_sim,
            device=options.device,
        )
    except KDHooksError as error:
        print(f"kdhooks: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.k} neighbours of {rows.total} classes in {options.out}; {found.passed_over} "
        "classes skipped others closer than --max-sim"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
