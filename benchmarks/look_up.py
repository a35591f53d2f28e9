"""Measures opening a teacher cache with many views, and looking up views in it.

    python -m benchmarks.look_up --out bench-out

Fills a folder with random keys and rows, in the files that a training writes: 10.4 GB for ten
million views of 512 numbers. Writes look_up.json and look_up.png.
"""

import argparse
import tempfile
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.command import command, start, write
from benchmarks.measuring import in_turns, summaries, timed, told
from kdhooks.arguments import at_least
from kdhooks.teacher.cache import CacheOptions, TeacherCache
from kdhooks.teacher.cache_files import Keys, Parts
from kdhooks.teacher.fingerprints import IDENTITY

AT_ONCE = 1 << 16  # records to write
CPU = torch.device("cpu")


def filled(folder: Path, views: int, dim: int) -> Keys:
    """Fill the folder, and return its keys."""
    random = np.random.default_rng(0)
    keys = random.integers(-(1 << 63), (1 << 63) - 1, views, np.int64)
    rows = random.standard_normal((AT_ONCE, dim)).astype(np.float16)
    parts = Parts(folder, dim)
    for some in np.split(keys, range(AT_ONCE, len(keys), AT_ONCE)):
        parts.append(some, rows[: len(some)])
    return keys


def batches(keys: Keys, size: int) -> Iterator[Keys]:
    random = np.random.default_rng(1)
    while True:
        yield random.choice(keys, size)


def measure(options: argparse.Namespace, views: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        opened = partial(
            TeacherCache,
            CacheOptions(path=Path(place)),
            dict.fromkeys(IDENTITY),
            torch.zeros(2, options.dim),
        )
        opened()  # creates the folder
        batch = batches(filled(Path(place), views, options.dim), options.batch_size)
        opening, _ = timed(opened, CPU)
        tracemalloc.start()
        cache = opened()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        seconds = in_turns({"look-up": lambda: cache.look_up(next(batch))}, options.turns, CPU)
        found, _ = cache.look_up(next(batch))
        assert found.all()
    return {
        "views": views,
        "opening_seconds": opening,
        "bytes_held": held,
        **summaries(seconds)["look-up"],
    }


def picture(measured: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    views = [one["views"] for one in measured]
    axes.plot(views, [one["opening_seconds"] for one in measured], ".-", label="opening")
    look_ups = [one["clock_seconds"]["median"] for one in measured]
    axes.plot(views, look_ups, ".-", label="a look-up")
    axes.set(xlabel="views", ylabel="seconds", xscale="log", yscale="log")
    axes.legend()
    return figure


def main() -> None:
    parser = command("look_up", __doc__, turns=200)
    add = parser.add_argument
    add("--views", type=at_least(1), nargs="+", default=[100_000, 1_000_000, 10_000_000])
    add("--dim", type=at_least(1), default=512)
    add("--batch-size", type=at_least(1), default=128)
    options = start(parser)
    measured = []
    for views in options.views:
        one = measure(options, views)
        measured.append(one)
        print(
            f"{views} views: {told(one['clock_seconds'], 3, 1e3)} ms for {options.batch_size}, "
            f"{one['opening_seconds']:.2f} s to open, {one['bytes_held'] / 1e6:.0f} MB held"
        )
    write(options, "look_up", {"measured": measured}, picture(measured))


if __name__ == "__main__":
    main()
