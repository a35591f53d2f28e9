"""The overhead of kdhooks in a step, and of a hand-written loop, torchdistill and modelopt."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from benchmarks.gpu.part import Goal, Options, Result, Table
from benchmarks.measuring import judged_by, told
from benchmarks.overhead.__main__ import Size, measure

ABOUT = """
The same training step, written in several ways that compute the same gradient: cross entropy, the
squared error of three maps, and 1 - cos of the embeddings; forward and backward, without optimizer.
Libraries that are not installed are listed below the table. "By hand" is a hand-written loop.
"""
SIZES = {
    "small": Size(4, 1, 32, 8),
    "realistic": Size(64, 2, 112, 128),
}


def cases(options: Options) -> Mapping[str, float]:
    return {"small": 5.0} if options.tiny else {"small": 40.0, "realistic": 60.0}


def run(case: str, options: Options) -> Result:
    size = Size(2, 1, 16, 4) if options.tiny else SIZES[case]
    if case == "realistic" and not options.cuda:
        size = Size(32, 2, 112, 16)  # the size for a CPU in docs/results/performance.md
    torch.backends.cudnn.benchmark = True
    turns = 2 if options.tiny else 24 if options.cuda else 15
    found = measure(size, turns, options.device)
    return {**found, "judged_by": judged_by(options.device)}


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    made: list[Table] = []
    for case, one in found.items():
        kind = one["judged_by"]
        size = "{batch} images of {pixels}, width {width}".format(**one["size"])
        rows = [[f"{case}: {size}", "Python calls added", "ms", "of by hand", "of student alone",
                 "peak, MB", "held, bytes"]]  # fmt: skip
        for name, row in one["rows"].items():
            rows.append(
                [
                    name,
                    f"{row['extra_python_calls']:+}",
                    told(row[f"{kind}_seconds"], 3, 1e3),
                    told(row[f"{kind}_of_by_hand"], 3),
                    told(row[f"{kind}_of_student_alone"], 3),
                    f"{row.get('allocator_peak_bytes', row['peak_bytes']) / 1e6:.1f}",
                    f"{row['held_bytes']}",
                ]
            )
        made.append(rows)
        if one["left_out"]:
            absent = [[name, why.splitlines()[0][:200]] for name, why in one["left_out"].items()]
            made.append([["left out", "because"], *absent])
    return made


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    one = found.get("realistic")
    if one is None:
        return []
    ratio = one["rows"]["kdhooks"][f"{one['judged_by']}_of_by_hand"]
    text = "at most 1.02 times the loop by hand at a realistic size"
    return [Goal(text, told(ratio, 3), ratio["median"] <= 1.02)]


def picture(found: Mapping[str, Result]) -> Figure | None:
    figure = Figure(figsize=(6 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (case, one) in zip(panels, found.items(), strict=True):
        for height, (name, row) in enumerate(one["rows"].items()):
            ratio = row[f"{one['judged_by']}_of_by_hand"]
            axes.plot(ratio["quartiles"], [height, height], color="C0", linewidth=3, alpha=0.5)
            axes.plot(ratio["median"], height, "o", color="C3" if name == "kdhooks" else "C0")
        axes.axvline(1, color="k", linewidth=0.8)
        axes.set_yticks(range(len(one["rows"])), list(one["rows"]))
        axes.invert_yaxis()
        axes.set(title=case, xlabel="time, of the loop by hand")
    return figure
