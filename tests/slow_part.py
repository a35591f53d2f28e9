"""A benchmark part whose second case runs until the file `not endless` exists."""

import os
import time
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.gpu.part import Goal, Options, Result, Table

ABOUT = "A case that ends, and one that does not."


def cases(options: Options) -> Mapping[str, float]:
    return {"quick": 1.0, "endless": 1.0}


def run(case: str, options: Options) -> Result:
    if case == "endless":
        (options.out / "endless.pid").write_text(str(os.getpid()))
        while not (options.out / "not endless").exists():
            time.sleep(0.05)
    return {}


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    return []


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    return []


def picture(found: Mapping[str, Result]) -> Figure | None:
    return None
