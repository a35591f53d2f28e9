"""Bytes and multiplications of each method with millions of classes.

    python -m benchmarks.scale --out docs/results
    python -m benchmarks.scale --check --out docs/results

One step of each method runs in real gloo processes, and four numbers are counted: the bytes that a
rank holds for the method, the bytes of its part of a checkpoint, the bytes that it sends in the
step, and the multiplications of matrix products in the step, forward and backward. All four grow
linearly with the number of classes. Runs with two small numbers of classes therefore give a line,
and the tables show its value at the numbers of classes that are asked for. --check also counts
20,000 and 200,000 classes on 1, 2 and 4 ranks, and compares these counts with their lines.
Writes scale.json and scale.md.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from benchmarks.command import command, start, write
from benchmarks.scale_counts import (
    BATCH,
    COUNTED,
    DIM,
    HALF,
    LINE,
    METHODS,
    ON_MAPS,
    Counts,
    Line,
    Run,
    count_on_maps,
    difference,
    lines,
    on_ranks,
    starts,
)
from kdhooks.arguments import at_least
from kdhooks.evaluation.tables import markdown

ROUNDED = ("coupleface", "margindistillation", "proxylesskd", "thkd", "kd", "gkd")
WHOLE = {"sharded": False}
UNITS: dict[str, str] = dict(zip(COUNTED, ("MB", "MB", "MB", "10⁹"), strict=True))
CHECKED, CHECKED_RANKS = (20_000, 200_000), (1, 2, 4)


def shown(what: str, value: float) -> str:
    value /= 1e6 if UNITS[what] == "MB" else 1e9
    return "0" if value == 0 else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def table(of_ranks: Mapping[int, Mapping[str, Counts]]) -> str:
    rows = [_head(UNITS, of_ranks)]
    for method in next(iter(of_ranks.values())):
        cells = [shown(what, of_ranks[size][method][what]) for what in UNITS for size in of_ranks]
        rows.append([method, *cells])
    return markdown(rows, texts=1)


def _head(units: Mapping[str, str], sizes: Iterable[int]) -> list[str]:
    columns = product(units.items(), sizes)
    return ["method", *(f"{what}, {unit}, {n} rank{'s' * (n > 1)}" for (what, unit), n in columns)]


def with_classes(
    of_ranks: Mapping[int, Mapping[str, Mapping[str, Line]]], classes: int
) -> dict[int, dict[str, Counts]]:
    """The values of the lines at a number of classes."""
    return {
        size: {
            method: {what: line.at(classes) for what, line in lines.items()}
            for method, lines in methods.items()
        }
        for size, methods in of_ranks.items()
    }


def slopes(of_ranks: Mapping[int, Mapping[str, Mapping[str, Line]]]) -> str:
    """The growth with the number of classes, for the methods that grow."""
    units = {"held": "bytes", "saved": "bytes", "multiplications": "10³"}
    scales = {"bytes": 1, "10³": 1e3}
    rows = [_head(units, of_ranks)]
    for method in next(iter(of_ranks.values())):
        values = [
            of_ranks[size][method][what].slope / scales[unit]
            for what, unit in units.items()
            for size in of_ranks
        ]
        if any(values):
            rows.append([method, *(f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in values)])
    return markdown(rows, texts=1)


def main() -> None:
    parser = command("scale", __doc__, turns=1)
    add = parser.add_argument
    add("--classes", type=at_least(100), nargs="+", default=[2_000_000, 10_000_000])
    add("--ranks", type=at_least(1), nargs="+", default=[1, 8])
    add("--check", action="store_true", help="compare real runs with the lines")
    options = start(parser)
    found = {size: forms(size) for size in options.ranks}
    on_maps = {size: counts_on_maps(size) for size in options.ranks}
    runs = [Run(method, CHECKED[0]) for method in ROUNDED]
    errors: dict[str, Counts] = dict(zip(ROUNDED, on_ranks(1, runs, difference), strict=True))
    started = starts(CHECKED[1], CHECKED_RANKS)
    checks = check() if options.check else []
    record = {
        "lines": found,
        "on_maps": on_maps,
        "float16": errors,
        "starts": started,
        "checks": checks,
    }
    write(options, "scale", record)
    text = page(options, found, on_maps, errors, started, checks)
    (options.out / "scale.md").write_text(text, encoding="utf-8")


def forms(size: int) -> dict[str, dict[str, Line]]:
    """The lines of each method; and of some with whole tables, and with tables in float16."""
    asked: list[tuple[str, tuple[tuple[str, Any], ...]]] = [(name, ()) for name in METHODS]
    names = list(METHODS)
    for form, option in (("whole tables", WHOLE), ("float16", HALF)):
        for method in ("coupleface", "coupleface, bank", "icdface", "proxylesskd"):
            if form == "float16" and method in ("coupleface, bank", "icdface"):
                continue  # training changes their tables, which stay in float32
            asked.append((method, tuple(option.items())))
            names.append(f"{method}, {form}")
    return dict(zip(names, lines(size, asked), strict=True))


def counts_on_maps(size: int) -> dict[str, Counts]:
    runs = [Run(method, 0) for method in ON_MAPS]
    return dict(zip(ON_MAPS, on_ranks(size, runs, count_on_maps), strict=True))


def check() -> list[dict[str, Any]]:
    """The counts of real runs, divided by those of their lines."""
    found = []
    for size in CHECKED_RANKS:
        expected = lines(size, [(method, ()) for method in METHODS])
        for classes in CHECKED:
            real = on_ranks(size, [Run(method, classes) for method in METHODS])
            for method, line, counts in zip(METHODS, expected, real, strict=True):
                ratios = {
                    what: counts[what] / line[what].at(classes) if counts[what] else 1.0
                    for what in UNITS
                }
                found.append({"ranks": size, "classes": classes, "method": method, **ratios})
    return found


def page(
    options: argparse.Namespace,
    found: Mapping[int, Mapping[str, Mapping[str, Line]]],
    on_maps: Mapping[int, Mapping[str, Counts]],
    errors: Mapping[str, Counts],
    started: Mapping[int, Counts],
    checks: Sequence[Mapping[str, Any]],
) -> str:
    parts = [
        "# Bytes and multiplications at scale",
        f"`python -m benchmarks.scale{' --check' if checks else ''}`; {DIM} dimensions, {BATCH} "
        "images on each rank. *Held* is the memory of a rank's device that a method occupies. "
        "*Saved* is the size of the rank's part of a checkpoint. *Sent* is the traffic from one "
        "rank in a step, if every collective runs as a ring. *Multiplications* are those of the "
        "matrix products in a step. The student's own classifier, which kd and gkd compare, "
        "belongs to the trainer, so its bytes are not included.",
        "gkd sends histograms of the scores, twice 4,096 bins for each image of all ranks in two "
        "rounds. eckd is counted without its term on the student's filters.",
    ]
    for classes in options.classes:
        parts += [f"## {classes:,} classes", table(with_classes(found, classes))]
    parts += [
        "## One more class",
        "The slope of the lines: the number of bytes and of thousands of multiplications that one "
        "more class adds on a rank. The traffic does not depend on the number of classes.",
        slopes(found),
    ]
    parts += [
        "## Methods on feature maps",
        "These methods keep nothing of classes, so their numbers hold for any number of classes. "
        "Both sides have the maps of the four stages of an IResNet, with 64 to 512 channels of "
        "56x56 to 7x7 pixels.",
        table(on_maps),
    ]
    lines = [[name, f"{one['loss']:.1e}", f"{one['gradient']:.1e}"] for name, one in errors.items()]
    parts += [
        "## Class rows in float16",
        f"The relative change of the loss, and of the gradient of the student's only parameter, by "
        f'`table_dtype = "float16"` in a step with {CHECKED[0]:,} classes.',
        markdown([["method", "loss", "gradient"], *lines], texts=1),
        "## The start",
        f"A run with `coupleface` and `proxylesskd` reads {CHECKED[1]:,} class rows and their "
        "neighbours from files and takes its first step. All ranks share the processors of one "
        "machine. The table shows the seconds, and the peak memory of a rank divided by the size "
        "of the tables that it keeps.",
        markdown(
            [
                ["ranks", "seconds", "peak / tables"],
                *(
                    [str(size), f"{one['seconds']:.1f}", f"{one['peak']:.2f}"]
                    for size, one in started.items()
                ),
            ],
            texts=0,
        ),
    ]
    if checks:
        worst = {what: max(abs(one[what] - 1) for one in checks) for what in UNITS}
        said = ", ".join(f"{what} {gap:.1e}" for what, gap in worst.items())
        unchecked = METHODS.keys() - {one["method"] for one in checks}
        but = f" but {' and '.join(sorted(unchecked))}" if unchecked else ""
        parts.append(
            f"The numbers lie on straight lines through the counts with {LINE[0]:,} and "
            f"{LINE[1]:,} classes. The counts of every method{but} with {CHECKED[0]:,} and "
            f"{CHECKED[1]:,} classes on 1, 2 and 4 ranks differ from these lines by at most: "
            f"{said} (relative)."
        )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
