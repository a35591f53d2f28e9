"""Tables and pictures of the results, from the file of results only."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.rows import LABELS, TEACHER
from benchmarks.papers.settings import SETTINGS, SHORT

Record: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Mapping[str, Mapping[int, Record]]
"""Row -> seed -> record."""

MEASURES = {
    "accuracy": "accuracy",
    "eer": "EER",
    "tar2": "TAR at FAR 0.01",
    "tar3": "TAR at FAR 0.001",
    "cross": "cross",
}
MORE = {
    "mixed": "clean gallery",
    "mixed2": "clean gallery, TAR at FAR 0.01",
    "adapted2": "adapted, TAR at FAR 0.01",
}
"""Of settings whose probes are poorer than the images; see `probes`."""
MAIN = "tar2"
"""The measure by which a row is judged: its gains are larger, compared with their standard errors,
than those of the accuracy."""

START, END = "<!-- tables -->", "<!-- end of the tables -->"

LEGEND = """\
Shares are in per cent, as the mean of the seeds and its standard error. **Bold**: the mean of at
least three seeds is more than two standard errors above 0.

- *Added*: the paired difference to labels alone, that is, to the student of the same seed, with the
  same initial weights and the same order of the images.
- *Gap*: the share of the distance in TAR at FAR 0.01 between labels alone and the teacher that the
  row closes.
- *Cross*: the accuracy if the teacher embeds the first image of a pair and the student the second.
- *Strength*: the length of the gradient of the row's methods in the student's parameters, divided
  by that of the labels' loss. *Agreement*: the cosine of the two gradients. Both are shown for the
  first point of the curve and for the end.
- *Clean gallery*: the student embeds the first image as it is, and the probe of the second.
- *Adapted*: the student embeds two probes, with batch norms that know the test's images."""


def write(records: Sequence[Record], results: Path) -> None:
    """Write the tables of all settings as Markdown beside the results, and a picture of each.

    In a page that exists already, only the text between START and END is replaced.
    """
    settings: dict[str, list[Record]] = {}
    for record in records:
        settings.setdefault(record.get("setting", SHORT), []).append(record)
    parts = [_section(name, settings[name], results) for name in SETTINGS if name in settings]
    text = "\n\n".join([START, *parts, LEGEND, END])
    page = results.with_suffix(".md")
    before, after = "", "\n"
    if page.is_file():
        before, found, rest = page.read_text(encoding="utf-8").partition(START)
        before, after = (before, rest.partition(END)[2]) if found else (f"{before}\n", "\n")
    page.write_text(f"{before}{text}{after}", encoding="utf-8")
    print(text)


def _section(name: str, records: Sequence[Record], results: Path) -> str:
    rows = by_row(records)
    last = records[-1]
    image = results.with_name(f"{results.stem}-{name}.png")
    draw(rows).savefig(image, dpi=110)
    seen = f"Each student sees {last['images_seen']:,} images. {last['versions']}."
    if "teacher_file" in last:
        seen += f" `{last['teacher_file']}` replaces SFace."
    parts = [f"## {name}: {SETTINGS[name].title}", table(rows), seen, flatness(rows)]
    if curve(rows.get(LABELS, {}))[1]:
        parts.append(course_table(rows))
    return "\n\n".join([part for part in parts if part] + [f"![Setting {name}]({image.name})"])


def by_row(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Return the last record of each row and seed."""
    rows: dict[str, dict[int, Record]] = {}
    for record in records:
        rows.setdefault(record["row"], {})[record["seed"]] = record
    return rows


def table(rows: Rows) -> str:
    """Return `cells` in Markdown."""
    heads, *others = cells(rows)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(rows: Rows) -> list[list[str]]:
    """Return the head of the table, and a line for each row."""
    records = [record for seeds in rows.values() for record in seeds.values()]
    shown = {**MEASURES}
    shown |= {key: head for key, head in MORE.items() if any(key in one for one in records)}
    lines = [["", *shown.values(), "accuracy added", "TAR added", "gap", "seeds", "seconds"]]
    for name, seeds in rows.items():
        shares = [
            _spread([record[key] for record in seeds.values() if key in record]) for key in shown
        ]
        more = [_difference(added(rows, name, key)) for key in ("accuracy", MAIN)]
        closed = gap(rows, name)
        seconds = np.mean([record["seconds"] for record in seeds.values()])
        share = "" if closed is None else f"{100 * closed:.0f}"
        lines.append([name, *shares, *more, share, str(len(seeds)), f"{seconds:.0f}"])
    return lines


def added(rows: Rows, name: str, key: str) -> list[float]:
    """Return the differences from labels alone with the same seed."""
    labels = rows.get(LABELS, {})
    if name in (LABELS, TEACHER):
        return []
    return [
        record[key] - labels[seed][key] for seed, record in rows[name].items() if seed in labels
    ]


def gap(rows: Rows, name: str) -> float | None:
    """Return the share of the distance from labels alone to the teacher that a row closes."""
    found, labels = added(rows, name, MAIN), rows.get(LABELS, {})
    if not found or TEACHER not in rows:
        return None
    seeds = [seed for seed in rows[name] if seed in labels]
    (teacher,) = {record[MAIN] for record in rows[TEACHER].values()}
    distance = teacher - np.mean([labels[seed][MAIN] for seed in seeds])
    return float(np.mean(found) / distance) if distance > 0 else None


def teaches(differences: Sequence[float]) -> bool:
    """Whether the mean of at least three seeds is more than two standard errors above 0."""
    return len(differences) > 2 and float(np.mean(differences)) > 2 * error(differences)


def error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def _spread(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    mean = f"{100 * np.mean(shares):.1f}"
    return f"{mean} ± {100 * error(shares):.1f}" if len(shares) > 1 else mean


def _difference(differences: Sequence[float]) -> str:
    if not differences:
        return ""
    text = f"{100 * np.mean(differences):+.1f}"
    if len(differences) > 1:
        text += f" ± {100 * error(differences):.1f}"
    return f"**{text}**" if teaches(differences) else text


def curve(seeds: Mapping[int, Record]) -> tuple[list[int], list[float]]:
    """Return the images seen at each point, and the seeds' mean TAR; empty without curves."""
    curves = [record["curve"] for record in seeds.values() if record.get("curve")]
    if not curves:
        return [], []
    images = [point["images_seen"] for point in curves[0]]
    return images, np.mean([[point[MAIN] for point in c] for c in curves], axis=0).tolist()


def needed(rows: Rows, name: str) -> int | None:
    """Return the images after which a row's mean TAR stays above the final TAR of labels alone.

    Both means are those of the seeds that they share.
    """
    seeds = rows[name].keys() & rows.get(LABELS, {}).keys()
    images, found = curve({seed: rows[name][seed] for seed in seeds})
    _, labels = curve({seed: rows[LABELS][seed] for seed in seeds})
    if not found or not labels:
        return None
    above = np.array(found) >= labels[-1]
    first = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
    return images[first] if first < len(images) else None


def course_table(rows: Rows) -> str:
    """Return a table of the curves of each row, in Markdown.

    It shows how many images a row needs to reach the final TAR of labels alone, and how strong its
    methods are compared with the labels, at the first and last point of the curve.
    """
    lines = [
        "| row | images to the final TAR of labels alone | strength | agreement |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, seeds in rows.items():
        if name not in (LABELS, TEACHER) and curve(seeds)[1]:
            images = needed(rows, name)
            reached = "not reached" if images is None else f"{images:,}"
            beside = [_first_and_last(seeds, key) for key in ("strength", "agreement")]
            lines.append(f"| {' | '.join([name, reached, *beside])} |")
    return "\n".join(lines)


def _first_and_last(seeds: Mapping[int, Record], key: str) -> str:
    """Return the seeds' mean at both ends of the curve; empty for rows without the labels' loss."""
    curves = [record["curve"] for record in seeds.values() if record.get("curve")]
    if not all(key in point for points in curves for point in points):
        return ""
    return " to ".join(f"{np.mean([points[end][key] for points in curves]):.2f}" for end in (0, -1))


def flatness(rows: Rows) -> str:
    """Return a sentence on what labels alone gain in the last fifth of their training."""
    images, found = curve(rows.get(LABELS, {}))
    if len(found) < 5:
        return ""
    before = len(found) - 1 - len(found) // 5
    return (
        f"From {images[before]:,} to {images[-1]:,} images, labels alone gain "
        f"{100 * (found[-1] - found[before]):.1f} points of TAR at FAR 0.01."
    )


def draw(rows: Rows) -> Figure:
    """Draw the TAR that each row adds, seed by seed, beside the curves of all rows."""
    names = [name for name in rows if name not in (LABELS, TEACHER)][::-1]
    figure = Figure(figsize=(13, 1.6 + 0.33 * max(8, len(names))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for height, name in enumerate(names):
        found = 100 * np.array(added(rows, name, MAIN))
        left.plot(found, np.full(len(found), height), "o", color="C0", alpha=0.5)
        if len(found):
            left.plot(found.mean(), height, "|", color="C3", markersize=16, markeredgewidth=2)
    left.axvline(0, color="k", linewidth=0.8)
    left.set_yticks(range(len(names)), names)
    left.set(title="TAR at FAR 0.01: points more than labels alone")
    left.grid(alpha=0.3)
    _draw_curves(right, rows)
    return figure


def _draw_curves(axes: Axes, rows: Rows) -> None:
    for number, name in enumerate(name for name in rows if name != TEACHER):
        images, found = curve(rows[name])
        if found:
            (line,) = axes.plot(images, 100 * np.array(found), label=name, markersize=4)
            line.set_marker("os^v<>D"[number // 10 % 7])
            if name == LABELS:
                line.set(color="k", linewidth=2.5)
    if TEACHER in rows:
        (teacher,) = {record[MAIN] for record in rows[TEACHER].values()}
        axes.axhline(100 * teacher, color="k", linestyle="--", linewidth=0.8)
    axes.set(title="TAR at FAR 0.01, without mirror images", xlabel="images seen")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, ncols=2)
