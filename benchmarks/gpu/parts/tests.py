"""kdhooks' own tests: those that need a GPU, or without a GPU those of the second device."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure

from benchmarks.gpu.part import Absent, Failed, Goal, Options, Result, Table

ABOUT = (
    "kdhooks' own tests with the marker `gpu`: every method trains on CUDA as on the CPU and never "
    "makes the host wait, and compiled teachers, streams, low memory, loss scaling and NCCL behave "
    "as documented. Without a GPU, the tests on a device that is written in Python run instead."
)
_ROOT = Path(__file__).parents[3]
_COUNTS = ("passed", "failed", "skipped", "errors")
_LONGEST = 2000  # characters of a failure's message
_PATIENCE = 570.0  # seconds, after which the tests are stopped


def cases(options: Options) -> Mapping[str, float]:
    return {"gpu": 150.0} if options.cuda else {"second device": 120.0}


def run(case: str, options: Options) -> Result:
    if not (_ROOT / "tests").is_dir():
        raise Absent(f"there is no folder {_ROOT / 'tests'}")
    if importlib.util.find_spec("pytest") is None:
        raise Absent("pytest is not installed")
    report = options.work / "tests.xml"
    report.unlink(missing_ok=True)
    start = time.perf_counter()
    ended = subprocess.run(
        [*_command(options), "--junitxml", str(report.resolve())],
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "4"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_PATIENCE,
    )
    seconds = time.perf_counter() - start
    if not report.is_file():
        raise RuntimeError(f"pytest wrote no report: {ended.stdout[-_LONGEST:]}")
    found = _read(report)
    if not found["passed"] + found["failed"]:
        raise RuntimeError(f"no test was executed: {ended.stdout[-_LONGEST:]}")
    result = {**found, "seconds": seconds}
    if bad := found["failed"] + found["errors"]:
        raise Failed(f"{bad} tests failed; the report names them", result)
    return result


def _command(options: Options) -> Sequence[str]:
    """Warnings are not errors here, since they depend on the versions of other packages."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-W", "default"]
    if options.cuda:  # a module that cannot be imported must not stop the others
        return [*pytest, "-m", "gpu", "--continue-on-collection-errors", "tests"]
    chosen = ["-k", "far and (race_is_noticed or sent_tensor_waits)"] if options.tiny else []
    return [*pytest, *chosen, "tests/test_second_device.py"]


def _read(report: Path) -> dict[str, Any]:
    """Return the counts and the failures of a JUnit file."""
    counts = dict.fromkeys(_COUNTS, 0)
    failures = []
    for test in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag: child for child in test}
        fault = outcomes.get("failure", outcomes.get("error"))
        if fault is not None:
            counts["failed" if fault.tag == "failure" else "errors"] += 1
            name = f"{test.get('classname')}::{test.get('name')}"
            failures.append({"name": name, "message": _shortened(fault)})
        else:
            counts["skipped" if "skipped" in outcomes else "passed"] += 1
    return {**counts, "failures": failures}


def _shortened(fault: ElementTree.Element) -> str:
    """Return the message and the end of the traceback, its most useful part."""
    message = (fault.get("message") or "").strip()[: _LONGEST // 2]
    rest = _LONGEST - len(message) - len("\n…\n")
    return f"{message}\n…\n{(fault.text or '').strip()[-rest:]}"


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    counts = [["tests", *_COUNTS, "seconds"]]
    for case, result in found.items():
        numbers = [str(result[count]) for count in _COUNTS]
        counts.append([case, *numbers, f"{result['seconds']:.0f}"])
    failures = [
        [failure["name"], (failure["message"].splitlines() or [""])[0][:200]]
        for result in found.values()
        for failure in result["failures"]
    ]
    return [counts, [["failed test", "message"], *failures]] if failures else [counts]


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    totals = {count: sum(result[count] for result in found.values()) for count in _COUNTS}
    met = totals["failed"] + totals["errors"] == 0
    text = ", ".join(f"{number} {count}" for count, number in totals.items())
    return [Goal("every test passes", text, met)]


def picture(found: Mapping[str, Result]) -> Figure | None:
    return None
