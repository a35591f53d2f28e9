"""Run all tests and benchmarks of kdhooks that need a GPU, within a time budget.

    python -m benchmarks.gpu --arcface-torch insightface/recognition/arcface_torch

Each result is written immediately, so an interrupted run continues with the missing ones. A part
that fails does not stop the others. benchmarks/gpu/README.md describes how to prepare a machine
without a package index.
"""

import argparse
import fcntl
import math
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.part import Options
from benchmarks.gpu.process import load, run_part
from benchmarks.gpu.records import Record, Unreadable
from kdhooks.errors import near_miss

PARTS = {
    name: f"benchmarks.gpu.parts.{name}"
    for name in (
        "tests",
        "trainer",
        "teacher",
        "cache",
        "classes",
        "overhead",
        "mmengine",
        "onnx",
        "faces",
    )
}
"""The module of each part, in the order in which the parts run."""


def main(argv: Sequence[str] | None = None, parts: Mapping[str, str] = PARTS) -> int:
    """Return 1 if a case failed, and 2 if the command cannot start."""
    started = time.time()
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(parts)
    given = parser.parse_args(argv)
    if given.list:
        print("\n".join(parts))
        return 0
    _check(parser, given, parts)
    with tempfile.TemporaryDirectory(prefix="kdhooks-gpu-") as work:
        command = shlex.join(["python", "-m", "benchmarks.gpu", *argv])
        options = _options(given, Path(work), command)
        with _alone(parser, options.out):
            try:
                for name in parts:
                    if not Record(name, options).made_like(options):
                        parser.error(
                            f"'{options.out}' holds results of another device or size; name "
                            "another folder by --out"
                        )
                return _run(given, parts, options, started)
            except Unreadable as error:
                parser.error(str(error))
            except KeyboardInterrupt:
                report.write(parts, options)
                print(f"\ninterrupted; the same command continues what is in {options.out}")
                return 130


def _run(
    given: argparse.Namespace, parts: Mapping[str, str], options: Options, started: float
) -> int:
    for name in given.parts:
        print(f"== {name}", flush=True)
        run_part(name, parts[name], options, started + given.budget, given.cases)
        report.write(parts, options)
    print(f"\n{options.out / 'gpu.md'} holds the report; {time.time() - started:.0f} s")
    entries = [entry for name in given.parts for entry in Record(name, options).cases.values()]
    return int(any(entry["status"] == "failed" for entry in entries))


@contextmanager
def _alone(parser: argparse.ArgumentParser, out: Path) -> Iterator[None]:
    """Refuse a second command on the same folder, and treat SIGTERM like Ctrl-C."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        parser.error(f"--out must be a folder that can be written; {error}")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"another run writes to '{out}'; wait for it, or name another --out")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            (out / ".lock").unlink()


def _parser(parts: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--list", action="store_true", help="print the names of the parts, one per line, and exit")
    add("--parts", nargs="+", choices=list(parts), default=list(parts), metavar="PART",
        help="run only these parts; default: all of them")  # fmt: skip
    add("--cases", nargs="+", metavar="CASE", help="run only these cases of the parts")
    add("--device", type=_device, default=device, help="cuda or cpu; default here: %(default)s")
    add("--budget", type=float, default=1500, metavar="SECONDS",
        help="time of the whole run in seconds; a case that needs more than the remaining time is "
        "skipped; default: %(default)s")  # fmt: skip
    add("--arcface-torch", type=Path, metavar="FOLDER",
        help="InsightFace's folder recognition/arcface_torch")  # fmt: skip
    add("--faces", type=Path, metavar="ZIP", help="LFW, aligned and 112x112: a zip or a folder")
    add("--pairs", type=Path, metavar="FILE",
        help="LFW's pairs.txt; default: pairs.txt or lfw_pairs.txt beside --faces")  # fmt: skip
    add("--tiny", action="store_true", help="use tiny sizes, to test the command itself")
    add("--again", action="store_true", help="also run the cases that are recorded as done")
    add("--out", type=Path, metavar="FOLDER",
        help="folder of the results; default: docs/results/gpu for a full-size run on a GPU, "
        "otherwise a folder in bench-out")  # fmt: skip
    return parser


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda; found '{name}'")
    return device


def _check(
    parser: argparse.ArgumentParser, given: argparse.Namespace, parts: Mapping[str, str]
) -> None:
    """Refuse options that would fail later, before anything runs."""
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none; take --device cpu")
    if not 0 < given.budget < math.inf:
        parser.error(f"--budget must be a number of seconds above 0; found {given.budget:g}")
    if given.arcface_torch and not (given.arcface_torch / "train_v2.py").is_file():
        parser.error(
            "--arcface-torch must name InsightFace's folder recognition/arcface_torch; "
            f"'{given.arcface_torch}' holds no train_v2.py"
        )
    for name in ("faces", "pairs"):
        path = getattr(given, name)
        if path and not path.exists():
            parser.error(f"--{name}: there is no '{path}'")
    if given.cases:
        options = _options(given, Path(), "")
        known = [case for name in given.parts for case in load(parts[name]).cases(options)]
        if unknown := [case for case in given.cases if case not in known]:
            parser.error(
                f"--cases: no part has '{unknown[0]}'; {near_miss(unknown[0], known)}"
                f"the cases are: {'; '.join(known)}"
            )


def _options(given: argparse.Namespace, work: Path, command: str) -> Options:
    kind: str = given.device.type
    if given.out:
        out = given.out
    elif kind == "cuda" and not given.tiny:
        out = Path("docs/results/gpu")
    else:
        out = Path("bench-out") / f"gpu-{kind}{'-tiny' if given.tiny else ''}"
    paths = {
        name: path.absolute() if (path := getattr(given, name)) else None
        for name in ("arcface_torch", "faces", "pairs")
    }
    return Options(
        given.device, given.tiny, out.absolute(), work, **paths, again=given.again, command=command
    )


if __name__ == "__main__":
    sys.exit(main())
