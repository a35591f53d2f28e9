"""A benchmark part that succeeds and counts its runs."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.gpu.part import Goal, Options, Result, Table

ABOUT = "One case that ends well."


def cases(options: Options) -> Mapping[str, float]:
    return {"only": 1.0}


def run(case: str, options: Options) -> Result:
    runs = options.out / "runs"
    before = int(runs.read_text()) if runs.is_file() else 0
    if (options.out / "no more").exists():
        raise ValueError("no more")
    runs.write_text(str(before + 1))
    return {"runs": before + 1}


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    return [[["case", "runs"], *([case, str(one["runs"])] for case, one in found.items())]]


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    return []


def picture(found: Mapping[str, Result]) -> Figure | None:
    figure = Figure(figsize=(2, 2))
    figure.subplots().bar(list(found), [one["runs"] for one in found.values()])
    return figure
