"""A benchmark part with one case for each way in which a case can end."""

import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.gpu.part import Absent, Failed, Goal, Options, Result, Table

ABOUT = "Cases that end in every way."


def cases(options: Options) -> Mapping[str, float]:
    return dict.fromkeys(("good", "failing", "half", "crashing", "absent", "last"), 1.0)


def run(case: str, options: Options) -> Result:
    if case == "failing":
        raise ZeroDivisionError("division by zero")
    if case == "half":
        raise Failed("2 of 3 failed", {"pid": 0})
    if case == "crashing":
        os.abort()
    if case == "absent":
        raise Absent("no odd hardware")
    return {"pid": os.getpid()}


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    return [[["case"], *([case] for case in found)]]


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    return [Goal("it ends well", f"{len(found)} of 6", met=False)]


def picture(found: Mapping[str, Result]) -> Figure | None:
    return None
