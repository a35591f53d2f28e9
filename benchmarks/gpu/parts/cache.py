"""A step with a filled teacher cache, compared with a step of the student alone."""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

from benchmarks.command import bars
from benchmarks.gpu.part import Absent, Goal, Options, Result, Table
from benchmarks.measuring import judged_by, told
from benchmarks.profiling import STEP, Trace
from benchmarks.teacher_cache import WAYS, Measurement

ABOUT = (
    "A training step of the student alone, with a live teacher, and with a teacher whose "
    "embeddings are all in the cache. The three take turns on the same batches; the ratios are to "
    "the student alone, with the quartiles in brackets. The second table shows the host's time in "
    "each phase of a cached step, and the third, on a GPU, the calls in which the host waits for "
    "the GPU. 'hash' computes the keys of the images."
)

SECONDS = 60.0
TRACED = 3  # steps
CACHED = WAYS[-1]
SLOWDOWN, SHARE = 1.03, 0.01  # the most that the goals allow

_SIZES: Mapping[str, int] = {  # images in a batch
    "stand-in, 128 images": 128,
    "r50 -> mbf, 128 images": 128,
    "r50 -> mbf, 1024 images": 1024,
}


def cases(options: Options) -> Mapping[str, float]:
    return dict.fromkeys(_SIZES, SECONDS)


def run(case: str, options: Options) -> Result:
    settings = argparse.Namespace(
        device=options.device,
        batch_size=2 if options.tiny else _SIZES[case],
        batches=2 if options.tiny else 4,
        student=2 if options.tiny else 48,
        teacher=4 if options.tiny else 96,
    )
    networks = None if case.startswith("stand-in") else _networks(options)
    name = case.replace(" -> ", "_").replace(", ", "_").replace(" ", "_")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        measurement = Measurement(settings, Path(folder) / "cache", networks)
        times = measurement.times(2 if options.tiny else 24)
        steps = 2 if options.tiny else 10
        parts = measurement.parts(Path(folder) / "trace.json", steps)
        trace = measurement.trace(options.out / f"cache_{name}_trace.json.gz", TRACED)
    return {
        "batch_size": settings.batch_size,
        "judged_by": judged_by(options.device),
        "times": times,
        "cached_step_host_ms": parts,
        **_hashing(trace, options),
        "host_waits_a_step": trace.waits(),
    }


def _networks(options: Options) -> tuple[nn.Module, nn.Module]:
    """Return student and teacher."""
    if options.arcface_torch is None:
        raise Absent("it needs the networks of arcface_torch; name the folder by --arcface-torch")
    sys.path.insert(0, str(options.arcface_torch))
    try:
        get_model = importlib.import_module("backbones").get_model
    finally:
        sys.path.remove(str(options.arcface_torch))
    sizes = {"fp16": options.cuda, "num_features": 512}
    return get_model("mbf", **sizes), get_model("r50", **sizes)


def _hashing(trace: Trace, options: Options) -> dict[str, float]:
    """Return the hash's share of a cached step, in GPU time, or in host time without a GPU."""
    ms = trace.gpu_ms if options.cuda else trace.host_ms
    hashing, step = ms("hash"), ms(STEP)
    return {"hash_ms": hashing, "step_ms": step, "hash_share": hashing / step}


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    return [_ratios(found), _parts(found), *_waits(found)]


def _ratios(found: Mapping[str, Result]) -> Table:
    rows = [["", *(f"{way}, ms" for way in WAYS), *WAYS[1:], "share of the hash"]]
    for case, one in found.items():
        kind = one["judged_by"]
        seconds = [told(one["times"][way][f"{kind}_seconds"], 2, 1000) for way in WAYS]
        ratios = [told(one["times"][way][f"{kind}_ratio"], 3) for way in WAYS[1:]]
        rows.append([case, *seconds, *ratios, f"{one['hash_share']:.2%}"])
    return rows


def _parts(found: Mapping[str, Result]) -> Table:
    names = list(next(iter(found.values()))["cached_step_host_ms"])
    rows = [["host ms of a cached step", *found]]
    for name in names:
        times = [one["cached_step_host_ms"][name] for one in found.values()]
        # A part that is computed as a remainder is negative, and so omitted, if another one waits.
        rows.append([name, *(f"{time:.3f}" if time >= 0 else "" for time in times)])
    return rows


def _waits(found: Mapping[str, Result]) -> Sequence[Table]:
    """Return a table of the waits, if there are any."""
    rows = [
        [case, wait["call"], wait["in"], f"{wait['count']:.1f}", f"{wait['ms']:.3f}"]
        for case, one in found.items()
        for wait in one["host_waits_a_step"]
    ]
    return [[["", "the host waits by", "in", "times a step", "ms a step"], *rows]] if rows else []


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    reached = []
    for case, one in found.items():
        ratio = one["times"][CACHED][f"{one['judged_by']}_ratio"]
        text = f"{case}: a cached step takes at most {SLOWDOWN} times the student alone"
        reached.append(Goal(text, told(ratio, 3), ratio["median"] <= SLOWDOWN))
        text = f"{case}: the hash takes at most {SHARE:.0%} of the step"
        reached.append(Goal(text, f"{one['hash_share']:.2%}", one["hash_share"] <= SHARE))
    return reached


def picture(found: Mapping[str, Result]) -> Figure | None:
    figure = Figure(figsize=(8, 2.5), layout="constrained")
    axes = figure.subplots()
    kind = next(iter(found.values()))["judged_by"]
    ratios = {
        case: {way: one["times"][way][f"{kind}_ratio"] for way in WAYS}
        for case, one in found.items()
    }
    bars(axes, ratios)
    axes.axvline(SLOWDOWN, color="k", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"{kind} time of a step, of the student alone")
    axes.legend()
    return figure
