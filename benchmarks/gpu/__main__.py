"""Run on a GPU everything of kdhooks that needs one, within a budget of time.

    python -m benchmarks.gpu --arcface-torch insightface/recognition/arcface_torch

Each part writes its results as soon as it has some, so that an interrupted run continues with what
is missing, and a part that fails does not stop the others. benchmarks/gpu/README.md says what to
bring to a machine without a package index.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.part import Options
from benchmarks.gpu.process import run_part
from benchmarks.gpu.records import Record

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
"""Each part's module, in the order in which they are run."""


def main(argv: Sequence[str] | None = None, parts: Mapping[str, str] = PARTS) -> int:
    """Return 1 if a case failed, and 2 if the command cannot start."""
    started = time.time()
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(parts)
    given = parser.parse_args(argv)
    if given.list:
        print("\n".join(parts))
        return 0
    _check(parser, given)
    with tempfile.TemporaryDirectory(prefix="kdhooks-gpu-") as work:
        command = shlex.join(["python", "-m", "benchmarks.gpu", *argv])
        options = _options(given, Path(work), command)
        options.out.mkdir(parents=True, exist_ok=True)
        for name in parts:
            if not Record(name, options).made_like(options):
                parser.error(
                    f"'{options.out}' holds results of another device or size; name another "
                    "folder by --out"
                )
        for name in given.parts:
            print(f"== {name}", flush=True)
            deadline = started + given.budget
            run_part(name, parts[name], options, deadline, given.again, given.cases)
            report.write(parts, options)
    print(f"\n{options.out / 'gpu.md'} holds the report; {time.time() - started:.0f} s")
    entries = [entry for name in given.parts for entry in Record(name, options).cases.values()]
    return int(any(entry["status"] == "failed" for entry in entries))


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
        help="run only these parts; by default all of them")  # fmt: skip
    add("--cases", nargs="+", metavar="CASE", help="run only these cases of the parts")
    add("--device", type=torch.device, default=device, help="cuda or cpu; default: %(default)s")
    add("--budget", type=float, default=1500, metavar="SECONDS",
        help="a case that needs more than is left is skipped; default: %(default)s")  # fmt: skip
    add("--arcface-torch", type=Path, metavar="FOLDER",
        help="InsightFace's folder recognition/arcface_torch")  # fmt: skip
    add("--faces", type=Path, metavar="ZIP", help="LFW, aligned and 112x112: a zip or a folder")
    add("--pairs", type=Path, metavar="FILE",
        help="LFW's pairs.txt; default: pairs.txt or lfw_pairs.txt beside --faces")  # fmt: skip
    add("--tiny", action="store_true", help="tiny sizes, to try the command itself")
    add("--again", action="store_true", help="also run the cases that are recorded already")
    add("--out", type=Path, metavar="FOLDER",
        help="folder of the results; default: docs/results/gpu for a whole run on a GPU, else a "
        "folder in bench-out")  # fmt: skip
    return parser


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse before anything runs what could only fail later."""
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none; take --device cpu")
    if not given.budget > 0:
        parser.error(f"--budget must be more than 0 seconds; found {given.budget:g}")
    if given.arcface_torch and not (given.arcface_torch / "train_v2.py").is_file():
        parser.error(
            "--arcface-torch must name InsightFace's folder recognition/arcface_torch; "
            f"'{given.arcface_torch}' holds no train_v2.py"
        )
    for name in ("faces", "pairs"):
        path = getattr(given, name)
        if path and not path.exists():
            parser.error(f"--{name}: there is no '{path}'")


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
    return Options(given.device, given.tiny, out.absolute(), work, **paths, command=command)


if __name__ == "__main__":
    sys.exit(main())
