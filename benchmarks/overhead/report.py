"""The table and the picture of the measurements."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measuring import Spread, Times, spreads, told
from kdhooks.evaluation.tables import markdown


def summary(seconds: Mapping[str, Times], name: str) -> dict[str, Spread]:
    """Return medians and quartiles of the seconds, and of their ratios to two other ways."""
    own = seconds[name]
    return {
        **spreads("seconds", own),
        **spreads("of_student_alone", own / seconds["student alone"]),
        **spreads("of_by_hand", own / seconds["by hand"]),
    }


def table(found: Mapping[str, Any]) -> str:
    """Format a Markdown table with a line for each way."""
    size = found["size"]
    heads = ["", "Python calls", "C calls", "ms", "of the loop by hand", "of the student alone"]
    heads += ["peak, MB", "held, bytes", "after an evaluation"]
    lines = [heads]
    for name, row in found["rows"].items():
        lines.append(
            [
                name,
                f"{row['extra_python_calls']:+}",
                f"{row['extra_c_calls']:+}",
                told(row["processor_seconds"], 2, 1e3),
                told(row["processor_of_by_hand"], 3),
                told(row["processor_of_student_alone"], 3),
                f"{row.get('allocator_peak_bytes', row['peak_bytes']) / 1e6:.2f}",
                f"{row['held_bytes']}",
                f"{row['held_bytes_after_evaluation']}",
            ]
        )
    return f"{size}\n\n{markdown(lines)}"


def picture(sizes: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the calls that each way adds, and its time relative to the hand-written loop."""
    names = [name for name in sizes[0]["rows"] if name not in ("student alone", "without hooks")]
    names.reverse()
    figure = Figure((5 * (1 + len(sizes)), 1.5 + 0.4 * len(names)), layout="constrained")
    panels = figure.subplots(1, 1 + len(sizes), sharey=True)
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
    return figure
