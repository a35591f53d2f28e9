"""A live teacher in a hand-written loop, and in every way in which a recipe can run it."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import teacher_run
from benchmarks.gpu.part import Absent, Goal, Options, Result, Table
from benchmarks.measuring import judged_by, told

ABOUT = """
A training step of `mbf` with a teacher and `fcd`: forward of both, backward, optimizer. "By hand"
is a hand-written loop with the teacher in float32 under `no_grad` after the student; all ways take
turns on the same images. On CUDA, the networks are built with arcface_torch's `fp16` option: their
forward sets its own autocast, to float16 or to none, so bfloat16 is shown only with the stand-in
networks. cuDNN may use TF32 in float32 convolutions, which is torch's default. "Of both alone" is
the ratio of a step to the student alone plus the teacher alone, run in the same way; "of the best
alone", to the student alone plus the teacher in its fastest way. Cosine is the least one between
the teacher's embeddings and those in float32.
"""
TEACHERS = ("r50", "r100")
BATCHES = (128, 1024)


def cases(options: Options) -> Mapping[str, float]:
    if options.tiny:
        return {"stand-in, 2 images": 5.0}
    sizes = {f"{name}, {batch} images": 70.0 for batch in BATCHES for name in TEACHERS}
    return {**sizes, "stand-in, 128 images": 60.0}


def run(case: str, options: Options) -> Result:
    name, _, rest = case.partition(", ")
    if name != teacher_run.STAND_IN:
        if options.arcface_torch is None:
            raise Absent("no --arcface-torch names InsightFace's folder recognition/arcface_torch")
        sys.path.insert(0, str(options.arcface_torch))
    torch.backends.cudnn.benchmark = True  # as in train_v2.py
    given = argparse.Namespace(
        device=options.device,
        student="mbf",
        runs=None,
        turns=2 if options.tiny else 8 if options.cuda else 3,
    )
    found = teacher_run.measure(given, name, int(rest.split()[0]))
    return {**found, "judged_by": judged_by(options.device)}


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    return [_table(case, one) for case, one in found.items()]


def _table(case: str, one: Result) -> Table:
    kind = one["judged_by"]
    heads = [case, "of by hand", "of both alone", "of the best alone", "images/s", "peak, MB"]
    rows = [[*heads, "cosine"]]
    for way, row in one["ways"].items():
        both = row.get(f"{kind}_of_both_alone")
        cosine = one["agreement"].get(way.removeprefix("kdhooks, "), {}).get("least_cosine")
        rows.append(
            [
                way,
                told(row[f"{kind}_ratio"], 3),
                told(both, 3) if both else "",
                f"{_of_the_best(one, way):.3f}" if both else "",
                f"{row[f'{kind}_images_a_second']['median']:.0f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                f"{cosine:.5f}" if cosine is not None and both else "",
            ]
        )
    return rows


def _seconds(one: Result, way: str) -> float:
    found: float = one["ways"][way][f"{one['judged_by']}_seconds"]["median"]
    return found


def _of_the_best(one: Result, way: str) -> float:
    best = min(_seconds(one, other) for other in one["ways"] if other.startswith("teacher alone"))
    return _seconds(one, way) / (_seconds(one, "student alone") + best)


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    """Return the goals for the fastest way of each case."""
    goals = []
    for case, one in found.items():
        ours = [way for way in one["ways"] if way.startswith("kdhooks, ")]
        best = min(ours, key=lambda way: _seconds(one, way))
        gain = _seconds(one, "by hand") / _seconds(one, best)
        ratio = _of_the_best(one, best)
        name = best.removeprefix("kdhooks, ")
        goals += [
            Goal(
                f"{case}: at least 1.5 times the throughput of the float32 loop by hand",
                f"{gain:.2f} ({name})",
                gain >= 1.5,
            ),
            Goal(
                f"{case}: at most 1.1 times (student alone + teacher alone at its best)",
                f"{ratio:.2f} ({name})",
                ratio <= 1.1,
            ),
        ]
    return goals


def picture(found: Mapping[str, Any]) -> Figure | None:
    kind = next(iter(found.values()))["judged_by"]
    figure = Figure(figsize=(6 * len(found), 7), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (case, one) in zip(panels, found.items(), strict=True):
        ways = [way for way in one["ways"] if not way.startswith("teacher alone")]
        ratios = [one["ways"][way][f"{kind}_ratio"]["median"] for way in ways]
        axes.barh(ways, ratios, color=["C0" if way.startswith("kdhooks") else "C7" for way in ways])
        axes.axvline(1, color="k", linewidth=0.8)
        axes.invert_yaxis()
        axes.set(title=case, xlabel=f"{kind} time, of the loop by hand")
    return figure
