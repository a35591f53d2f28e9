"""The table and the picture of what `results.jsonl` holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from benchmarks.methods.rows import LABELS

Record: TypeAlias = Mapping[str, Any]

MEASURES = {
    "accuracy": "accuracy",
    "eer": "EER",
    "tar2": "TAR at FAR 0.01",
    "tar3": "TAR at FAR 0.001",
    "cross": "cross",
}


def write(records: Sequence[Record], out: Path) -> None:
    """results.md and results.png."""
    rows = by_row(records)
    last = records[-1]
    text = f"{table(rows)}\n\nEach student sees {last['images_seen']} images. {last['versions']}.\n"
    (out / "results.md").write_text(text, encoding="utf-8")
    picture(rows, out / "results.png")
    print(text)


def by_row(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Row -> seed -> record; the last record of a row and seed counts."""
    rows: dict[str, dict[int, Record]] = {}
    for record in records:
        rows.setdefault(record["row"], {})[record["seed"]] = record
    return rows


def table(rows: Mapping[str, Mapping[int, Record]]) -> str:
    """`cells` in Markdown."""
    heads, *others = cells(rows)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(rows: Mapping[str, Mapping[int, Record]]) -> list[list[str]]:
    """In per cent: means and standard deviations over the seeds, and what a row adds to labels."""
    lines = [["", *MEASURES.values(), "accuracy added", "TAR at 0.01 added", "seeds", "seconds"]]
    for name, seeds in rows.items():
        shares = [_cell([record[key] for record in seeds.values()]) for key in MEASURES]
        shares += [_cell(added(rows, name, key)) for key in ("accuracy", "tar2")]
        seconds = np.mean([record["seconds"] for record in seeds.values()])
        lines.append([name, *shares, str(len(seeds)), f"{seconds:.0f}"])
    return lines


def added(rows: Mapping[str, Mapping[int, Record]], name: str, key: str) -> list[float]:
    """What a row has more than labels alone with the same seed."""
    labels = rows.get(LABELS, {})
    if name in (LABELS, "teacher"):
        return []
    return [
        record[key] - labels[seed][key] for seed, record in rows[name].items() if seed in labels
    ]


def _cell(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    mean = f"{100 * np.mean(shares):.1f}"
    return f"{mean} ± {100 * np.std(shares, ddof=1):.1f}" if len(shares) > 1 else mean


def picture(rows: Mapping[str, Mapping[int, Record]], path: Path) -> None:
    """What each row adds to labels alone, seed by seed, and its accuracy beside the teacher."""
    names = [name for name in rows if name not in (LABELS, "teacher")][::-1]
    figure = Figure(figsize=(14, 1.2 + 0.33 * len(names)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"accuracy": "accuracy", "tar2": "TAR at FAR 0.01", "cross": "accuracy, cross"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for height, name in enumerate(names):
            found = 100 * np.array(added(rows, name, key))
            axes.plot(found, np.full(len(found), height), "o", color="C0", alpha=0.5)
            if len(found):
                axes.plot(found.mean(), height, "|", color="C3", markersize=16, markeredgewidth=2)
        axes.axvline(0, color="k", linewidth=0.8)
        axes.set(title=f"{title}: points more than labels alone", yticks=range(len(names)))
        axes.grid(alpha=0.3)
    panels[0].set_yticklabels(names)
    figure.savefig(path, dpi=110)
