"""Writes the results of the demonstration: a table, the gains, and a picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from kdhooks.evaluation.tables import markdown
from kdhooks.verification import ROC, Verification

mpl.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first


@dataclass(frozen=True)
class Score:
    """The test of one student, on people whom it has never seen."""

    pairs: Verification  # the student's embeddings on both sides
    cross: Verification  # the teacher embeds the first image, the student the second
    tar: Mapping[float, float]  # FAR -> TAR, on all pairs of the test's images
    roc: ROC  # on these pairs
    seconds: float
    losses: Sequence[float] = ()
    cosines: Sequence[float] = ()


TEACHER = "teacher"
Scores: TypeAlias = Mapping[str, Sequence[Sequence[Score]]]
"""Row -> seed -> part of the people. A seed's figure is the mean over its parts."""


def table(scores: Scores) -> str:
    """A Markdown table with a line per row: the mean over the seeds, and their deviation."""
    fars = list(next(iter(scores.values()))[0][0].tar)
    lines = [["", "accuracy", "EER", *(f"TAR at FAR {far:g}" for far in fars), "cross", "seconds"]]
    for name, row in scores.items():
        cells = [_cell(_means(row, _accuracy)), _cell(_means(row, lambda score: score.pairs.eer))]
        cells += [_cell(_means(row, _tar(far))) for far in fars]
        cells.append(_cell(_means(row, lambda score: score.cross.accuracy)))
        trained = name != TEACHER
        cells.append(f"{np.mean(_means(row, lambda score: score.seconds)):.0f}" if trained else "")
        lines.append([name, *cells])
    return markdown(lines)


def gains(scores: Scores, baseline: str) -> list[str]:
    """A sentence for each taught row: its paired differences to the baseline.

    The students of a pair have the same initial weights, and see the images in the same order.
    """
    far = max(scores[baseline][0][0].tar)
    seeds, parts = len(scores[baseline]), len(scores[baseline][0])
    of = f"{parts} pairs of students" if parts > 1 else "one pair of students"
    over = f"mean ± deviation over {seeds} seeds, each with {of}" if seeds > 1 else of
    lines = []
    for name, row in scores.items():
        if name in (TEACHER, baseline):
            continue
        tar, accuracy = (
            _cell(_means(row, measure) - _means(scores[baseline], measure))
            for measure in (_tar(far), _accuracy)
        )
        lines.append(
            f"{name} adds {tar} points of TAR at FAR {far:g} and {accuracy} points of accuracy to "
            f"{baseline} ({over})"
        )
    return lines


def _accuracy(score: Score) -> float:
    return score.pairs.accuracy


def _tar(far: float) -> Callable[[Score], float]:
    return lambda score: score.tar[far]


def _means(
    row: Sequence[Sequence[Score]], measure: Callable[[Score], float]
) -> NDArray[np.float64]:
    """The mean over the parts, of each seed."""
    means = [float(np.mean([measure(score) for score in parts])) for parts in row]
    return np.array(means, dtype=np.float64)


def _cell(shares: NDArray[np.float64]) -> str:
    """In per cent."""
    mean = f"{100 * np.mean(shares):.1f}"
    return f"{mean} ± {100 * np.std(shares, ddof=1):.1f}" if len(shares) > 1 else mean


def picture(scores: Scores, path: Path) -> None:
    """ROC curves, training losses and closeness to the teacher, of one part of the first seed."""
    figure, (roc, loss, cosine) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for number, (name, ((first, *_), *_)) in enumerate(scores.items()):
        style = {"label": name, "color": f"C{number}"}
        positive = first.roc.far > 0
        roc.semilogx(first.roc.far[positive], first.roc.tar[positive], **style)
        if first.losses:
            loss.plot(_smooth(first.losses), **style)
            cosine.plot(_smooth(first.cosines), **style)
    roc.set(xlabel="FAR", ylabel="TAR", title="people never seen in training", xlim=(1e-4, 1))
    loss.set(xlabel="step", ylabel="loss, labels and method", title="training", yscale="log")
    cosine.set(xlabel="step", ylabel="cosine of student to teacher", title="training")
    for axes in (roc, loss, cosine):
        axes.grid(alpha=0.3)
    roc.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: Sequence[float], window: int = 15) -> NDArray[np.float64]:
    """Running means."""
    window = min(window, len(values))
    return np.convolve(values, np.full(window, 1 / window), mode="valid")
