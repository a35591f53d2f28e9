"""Losses over all classes, and the mining of neighbours, at up to two million classes."""

import argparse
import os
from collections.abc import Mapping, Sequence
from unittest.mock import patch

from matplotlib.figure import Figure

from benchmarks import class_losses, mining
from benchmarks.gpu.part import Absent, Goal, Options, Result, Table
from benchmarks.measuring import judged_by, told
from kdhooks.classes import chunked_sums

ABOUT = """
Forward and backward of each loss over all classes, with batch 128 and 512 dimensions, compared with
the plain form of the paper, which holds all scores in memory; the two take turns. "Extra" is the
allocator's peak minus the resulting gradients. `kd` and `gkd` train rows of their own. "Chunks"
shows `kd` with several sizes of chunks, not only the one that kdhooks uses. "Mining" is the search
for the 100 neighbours of 1,024 classes among all, compared with only the matrix products.
"""
SIZES = (200_000, 2_000_000)
MINING, CHUNKS = "mining", "chunks"
POWERS = (21, 22, 23, 24, 25, 26, 27, 28)  # of two: numbers in a chunk's rows


def cases(options: Options) -> Mapping[str, float]:
    sizes = (12_000,) if options.tiny else SIZES  # gkd needs more classes than its group has
    losses = {f"{name}, {c} classes": 20.0 for c in sizes for name in class_losses.METHODS}
    last = sizes[-1]
    return {**losses, f"{MINING}, {last} classes": 20.0, f"{CHUNKS}, {last} classes": 30.0}


def run(case: str, options: Options) -> Result:
    name, _, rest = case.partition(", ")
    given = argparse.Namespace(
        device=options.device,
        turns=2 if options.tiny else 11 if options.cuda else 3,
        batch_size=4 if options.tiny else 128,
        dim=8 if options.tiny else 512,
        forms=list(class_losses.STYLES),
        k=5 if options.tiny else 100,
    )
    kind = judged_by(options.device)
    classes = int(rest.split()[0])
    if name == MINING:
        return {**mining.measure(given, max(classes, 1024)), "judged_by": kind}
    if name == CHUNKS:
        return {"sizes": _chunks(given, classes, options.tiny), "judged_by": kind}
    _check_memory(name, classes, given)
    return {**class_losses.measure(given, name, classes), "judged_by": kind}


def _check_memory(name: str, classes: int, given: argparse.Namespace) -> None:
    """Raise Absent if the plain form does not fit: on a CPU, exhausted memory kills the process."""
    if given.device.type == "cuda":
        return
    tables = 5 if name in class_losses.COMPARE else 2  # rows, at unit length too, and gradients
    scores = 8 if name in class_losses.COMPARE else 6
    needed = 4 * classes * (tables * given.dim + scores * given.batch_size)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * there:
        raise Absent(
            f"the plain form needs about {needed / 1e9:.0f} GB, and this machine has "
            f"{there / 1e9:.0f} GB"
        )


def _chunks(given: argparse.Namespace, classes: int, tiny: bool) -> Mapping[str, Result]:
    """Measure kd with chunks of several sizes, without the plain form."""
    given = argparse.Namespace(**{**vars(given), "forms": ["kdhooks"]})
    kind = "cpu" if given.device.type == "cpu" else "cuda, trained"
    found = {}
    for power in POWERS[:2] if tiny else POWERS:
        with patch.dict(chunked_sums.NUMBERS, {kind: 1 << power}):
            found[f"2^{power}"] = class_losses.measure(given, "kd", classes)
    return found


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    losses = [["loss", "plain, ms", "kdhooks, ms", "of plain", "plain, MB extra",
               "kdhooks, MB extra", "largest difference"]]  # fmt: skip
    other = []
    for case, one in found.items():
        kind = one["judged_by"]
        if case.startswith(MINING):
            rows = [[case, "ms", "of the products"]]
            for name, times in one["times"].items():
                seconds, ratio = times[f"{kind}_seconds"], times[f"{kind}_ratio"]
                rows.append([name, told(seconds, 2, 1e3), told(ratio, 2)])
            other.append(rows)
        elif case.startswith(CHUNKS):
            rows = [[case, "ms", "MB extra"]]
            for name, size in one["sizes"].items():
                seconds = size["times"]["kdhooks"][f"{kind}_seconds"]
                rows.append([name, told(seconds, 2, 1e3), f"{_extra(size, 'kdhooks') / 1e6:.0f}"])
            other.append(rows)
        else:
            times = one["times"]
            losses.append(
                [
                    case,
                    told(times["plain"][f"{kind}_seconds"], 2, 1e3),
                    told(times["kdhooks"][f"{kind}_seconds"], 2, 1e3),
                    told(times["kdhooks"][f"{kind}_ratio"], 3),
                    f"{_extra(one, 'plain') / 1e6:.0f}",
                    f"{_extra(one, 'kdhooks') / 1e6:.0f}",
                    f"{one['difference']:.1g}",
                ]
            )
    return [losses, *other] if len(losses) > 1 else other


def _extra(one: Result, form: str) -> float:
    found: float = max(one["bytes"][form] - one["gradient_bytes"], 0)
    return found


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    goals = []
    for case, one in found.items():
        kind = one["judged_by"]
        if case.startswith(MINING):
            ratio = one["times"]["mining"][f"{kind}_ratio"]["median"]
            text = f"{case}: at most 5 times the bare matrix products"
            goals.append(Goal(text, f"{ratio:.2f}", ratio <= 5))
        elif not case.startswith(CHUNKS) and one["classes"] == SIZES[-1]:
            memory = _extra(one, "kdhooks") / _extra(one, "plain")
            ratio = one["times"]["kdhooks"][f"{kind}_ratio"]["median"]
            goals += [
                Goal(f"{case}: at most 1/8 of the plain form's extra memory", f"1/{1 / memory:.0f}",
                     memory <= 1 / 8),
                Goal(f"{case}: no slower than the plain form", f"{ratio:.3f}", ratio <= 1),
            ]  # fmt: skip
    return goals


def picture(found: Mapping[str, Result]) -> Figure | None:
    losses = {case: one for case, one in found.items() if not case.startswith((MINING, CHUNKS))}
    if not losses:
        return None
    figure = Figure(figsize=(10, 1.5 + 0.3 * len(losses)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for shift, form in ((-0.2, "plain"), (0.2, "kdhooks")):
        places = [number + shift for number in range(len(losses))]
        seconds = [
            one["times"][form][f"{one['judged_by']}_seconds"]["median"] for one in losses.values()
        ]
        panels[0].barh(places, seconds, 0.4, label=form)
        panels[1].barh(places, [_extra(one, form) / 1e9 for one in losses.values()], 0.4)
    panels[0].set_yticks(range(len(losses)), list(losses))
    panels[0].invert_yaxis()
    panels[0].set(xlabel="seconds", xscale="log")
    panels[1].set(xlabel="extra memory, GB", xscale="log")
    panels[0].legend()
    return figure
