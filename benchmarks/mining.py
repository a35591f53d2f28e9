"""Measures mining the nearest classes, compared with the matrix products that it needs at least.

    python -m benchmarks.mining --threads 1 --out bench-out

The two take turns, on some rows of the index against all classes. Writes mining.json and
mining.png.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.command import command, start, write
from benchmarks.measuring import Work, in_turns, judged_by, peak_bytes, summaries, told
from kdhooks.arguments import at_least
from kdhooks.classes.rows import Rows
from kdhooks_plugins.neighbours import COLUMNS, ROWS, nearest_of


def products(unit: Tensor, own: slice) -> None:
    for others in unit.split(COLUMNS):
        torch.mm(unit[own], others.T)


def measure(options: argparse.Namespace, classes: int) -> dict[str, Any]:
    device = options.device
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(classes, options.dim, generator=generator, device=device)
    unit = torch.cat([part for _, part in Rows.open(rows).chunks()])
    own = slice(0, ROWS)
    works: dict[str, Work] = {
        "products": partial(products, unit, own),
        "mining": partial(nearest_of, unit, own, options.k),
        "mining, max_sim": partial(nearest_of, unit, own, options.k, 0.8),
    }
    for work in works.values():
        work()
    return {
        "classes": classes,
        "times": summaries(in_turns(works, options.turns, device)),
        "bytes": {name: peak_bytes(work, device) for name, work in works.items()},
    }


def picture(measured: Sequence[dict[str, Any]], kind: str) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    classes = [one["classes"] for one in measured]
    for axes, what in zip(panels, ("seconds", "ratio"), strict=True):
        for name in measured[0]["times"]:
            found = [one["times"][name][f"{kind}_{what}"]["median"] for one in measured]
            axes.plot(classes, found, marker=".", label=name)
        axes.set(xlabel="classes", xscale="log")
        axes.set_xticks(classes, [f"{one:,}" for one in classes])
        axes.set_xticks([], minor=True)
    panels[0].set(ylabel=f"{kind} seconds of {ROWS} rows", yscale="log")
    panels[1].set(ylabel="of the products", ylim=(0, None))
    panels[0].legend()
    return figure


def main() -> None:
    parser = command("mining", __doc__, turns=7)
    add = parser.add_argument
    add("--classes", type=at_least(1), nargs="+", default=[20_000, 100_000, 500_000])
    add("--dim", type=at_least(1), default=512)
    add("--k", type=at_least(1), default=100)
    options = start(parser)
    kind = judged_by(options.device)
    measured = []
    for classes in options.classes:
        measured.append(measure(options, classes))
        for name, found in measured[-1]["times"].items():
            seconds, ratio = found[f"{kind}_seconds"], found[f"{kind}_ratio"]
            print(f"{classes}, {name}: {told(seconds, 3)} s, {told(ratio, 2)} of the products")
    write(options, "mining", {"measured": measured}, picture(measured, kind))


if __name__ == "__main__":
    main()
