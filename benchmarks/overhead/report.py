"""The table and the picture of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.measuring import spread

mpl.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

Seconds = Mapping[str, Sequence[tuple[float, float]]]
"""Of each way, turn by turn: of the clock, and of the processor."""


def summary(seconds: Seconds, name: str) -> dict[str, Any]:
    """Medians and quartiles of the seconds, and of the turns' ratios to two other ways."""
    found: dict[str, Any] = {}
    for index, kind in enumerate(("clock", "processor")):
        own = [pair[index] for pair in seconds[name]]
        found[f"{kind}_seconds"] = spread(own)
        for other in ("student alone", "by hand"):
            theirs = [pair[index] for pair in seconds[other]]
            ratios = [mine / yours for mine, yours in zip(own, theirs, strict=True)]
            found[f"{kind}_of_{other.replace(' ', '_')}"] = spread(ratios)
    return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown, one line a way."""
    size = found["size"]
    heads = ["", "Python calls", "C calls", "ms", "of the loop by hand", "of the student alone"]
    heads += ["peak, MB", "held, bytes", "after an evaluation"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, row in found["rows"].items():
        lines.append(
            [
                name,
                f"{row['extra_python_calls']:+}",
                f"{row['extra_c_calls']:+}",
                _cell(row["processor_seconds"], 1e3, 2),
                _cell(row["processor_of_by_hand"], 1, 3),
                _cell(row["processor_of_student_alone"], 1, 3),
                f"{row.get('allocator_peak_bytes', row['peak_bytes']) / 1e6:.2f}",
                f"{row['held_bytes']}",
                f"{row['held_bytes_after_evaluation']}",
            ]
        )
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{size}\n\n{rows}"


def _cell(spread: Mapping[str, Any], factor: float, digits: int) -> str:
    values = [spread["median"], *spread["quartiles"]]
    middle, low, high = (f"{factor * value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def picture(sizes: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Calls that each way adds, and for each size its time in that of the loop by hand."""
    names = [name for name in sizes[0]["rows"] if name not in ("student alone", "without hooks")]
    names.reverse()
    figure, panels = plt.subplots(
        1,
        1 + len(sizes),
        figsize=(5 * (1 + len(sizes)), 1.5 + 0.4 * len(names)),
        layout="constrained",
        sharey=True,
    )
    extra = [sizes[0]["rows"][name]["extra_python_calls"] for name in names]
    panels[0].barh(names, extra, color=["C3" if name == "kdhooks" else "C0" for name in names])
    panels[0].set_title("Python calls added to a step")
    for axes, size in zip(panels[1:], sizes, strict=True):
        for height, name in enumerate(names):
            spread = size["rows"][name]["processor_of_by_hand"]
            low, high = spread["quartiles"]
            axes.plot([low, high], [height, height], color="C0", linewidth=3, alpha=0.5)
            axes.plot(spread["median"], height, "o", color="C3" if name == "kdhooks" else "C0")
        axes.axvline(1, color="k", linewidth=0.8)
        shape = "{batch} images of {pixels}, width {width}".format(**size["size"])
        axes.set_title(f"processor time, of the loop by hand\n{shape}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
