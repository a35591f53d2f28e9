"""Writes the output of `kdhooks evaluate`: a table, sentences, JSON, and a picture of the ROC."""

import math
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kdhooks.errors import KDHooksError
from kdhooks.evaluation.tables import markdown
from kdhooks_integrations.arcface_torch.commands.compared import Compared, Result


def as_table(compared: Sequence[Compared], fars: Sequence[float], trainers: bool) -> str:
    """Return a table in per cent; with trainers, accuracy and XNorm as the trainer prints them."""
    head = ["set", "first image by", "second image by", "accuracy", "EER"]
    head += [f"TAR at FAR {far}" for far in fars]
    if trainers:
        head[3] = "Accuracy-Flip"
        head.append("XNorm")
    lines = [head]
    for one in compared:
        lines += [[one.tested.name, *_cells(result, trainers)] for result in one.results]
    return markdown(lines, texts=3)


def _cells(result: Result, trainers: bool) -> list[str]:
    figures = result.figures
    mean, deviation = figures.accuracy, figures.accuracy_std
    shown = f"{100 * mean:.2f} ± {100 * deviation:.2f}"
    cells = [result.first, result.second, f"{mean:1.5f}+-{deviation:1.5f}" if trainers else shown]
    cells += [_percent(share) for share in (figures.eer, *figures.tar.values())]
    if trainers:
        cells.append("" if result.length is None else f"{result.length:f}")
    return cells


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def as_sentences(compared: Sequence[Compared], flip: bool, view: str | None) -> Iterator[str]:
    """Yield the sentences below the table that explain it."""
    for one in compared:
        tested = one.tested
        folds = len(np.unique(tested.folds))
        yield (
            f"{tested.name}: {len(tested.same)} pairs, {int(tested.same.sum())} of one person, of "
            f"{len(tested.images)} images, in {folds} folds"
        )
        if tested.one_kind():
            yield (
                f"{tested.name}: a fold has pairs of one kind only, so accuracy and deviation mean "
                "little; mix the pairs, or set fewer folds with --folds"
            )
    faces = "an image and its mirror image, summed" if flip else "an image only"
    yield f"embeddings are of {faces}; rates are in per cent"
    if view is not None:
        yield f"the student_view is applied to the second image of each pair: {view}"
    if any(
        math.isnan(share)
        for one in compared
        for result in one.results
        for share in result.figures.tar.values()
    ):
        yield "-: too few pairs of different people to measure that FAR"
    for first, second, reason in dict.fromkeys(
        (no.first, no.second, no.reason) for one in compared for no in one.refused
    ):
        yield f"{first} and {second} can't be compared: {reason}"


def as_content(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return the sets with their results for JSON; rates are from 0 to 1."""
    return [
        {
            "set": one.tested.name,
            "source": str(one.tested.files.source),
            "pairs": len(one.tested.same),
            "same": int(one.tested.same.sum()),
            "images": len(one.tested.images),
            "folds": len(np.unique(one.tested.folds)),
            "results": [_numbers(result) for result in one.results],
            "refused": [
                {"first": no.first, "second": no.second, "reason": no.reason} for no in one.refused
            ],
        }
        for one in compared
    ]


def _numbers(result: Result) -> dict[str, Any]:
    figures = result.figures
    return {
        "first": result.first,
        "second": result.second,
        "accuracy": figures.accuracy,
        "accuracy_std": figures.accuracy_std,
        "eer": figures.eer,
        "tar": {str(far): share for far, share in figures.tar.items()},
        "threshold": figures.threshold,
        "xnorm": result.length,
    }


# --- files ---------------------------------------------------------------------------------------


def check_picture(file: Path) -> None:
    if file.suffix.lower() != ".png":
        raise KDHooksError(
            f"evaluate: --picture must be a PNG file, with a name such as roc.png; found '{file}'"
        )


def check_output(file: Path, option: str, inputs: Sequence[str]) -> None:
    """Refuse an output file that cannot be written or would replace an input, before a long run."""
    if file.is_dir() or not file.parent.is_dir():
        raise KDHooksError(
            f"evaluate: {option} must be a file in a folder that exists; found '{file}'"
        )
    if any(Path(one).exists() and file.exists() and file.samefile(one) for one in inputs):
        raise KDHooksError(
            f"evaluate: {option} '{file}' is also an input, and would be replaced; name another "
            "file"
        )


def write_text(text: str, file: Path, option: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise KDHooksError(
            f"evaluate: {option} '{file}' can't be written ({error.strerror}); name another file"
        ) from error


def can_draw() -> bool:
    """Return whether matplotlib is installed; if not, print a message."""
    found = find_spec("matplotlib") is not None
    if not found:
        print(
            "evaluate: --picture is omitted, since it needs matplotlib, which is not installed; "
            "pip install matplotlib",
            file=sys.stderr,
        )
    return found


def draw(compared: Sequence[Compared], file: Path) -> None:
    """Write a PNG file with the ROC of all sets side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(compared), 5), layout="constrained")
    axes = figure.subplots(1, len(compared), squeeze=False)[0]
    for one, axis in zip(compared, axes, strict=True):
        for result in one.results:
            own = result.first == result.second
            label = result.first if own else f"{result.first}, {result.second}"
            seen = result.curve.far > 0
            axis.semilogx(
                result.curve.far[seen], result.curve.tar[seen], "-" if own else "--", label=label
            )
        axis.set(xlabel="FAR", ylabel="TAR", title=one.tested.name)
        axis.grid(alpha=0.3)
        axis.legend()
    try:
        figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        raise KDHooksError(
            f"evaluate: --picture '{file}' can't be written ({error.strerror}); name another file"
        ) from error
