"""Writes the results of the demonstration: a table, the gains, and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def table(scores: Mapping[str, Sequence[Score]]) -> str:
    """A Markdown table with a line per row: the mean over the students, and their deviation."""
    fars = list(next(iter(scores.values()))[0].tar)
    lines = [["", "accuracy", "EER", *(f"TAR at FAR {far:g}" for far in fars), "cross", "seconds"]]
    for name, row in scores.items():
        cells = [_cell([score.pairs.accuracy for score in row])]
        cells.append(_cell([score.pairs.eer for score in row]))
        cells += [_cell([score.tar[far] for score in row]) for far in fars]
        cells.append(_cell([score.cross.accuracy for score in row]))
        cells.append(f"{np.mean([score.seconds for score in row]):.0f}")
        lines.append([name, *cells])
    return markdown(lines)


def gains(scores: Mapping[str, Sequence[Score]], baseline: str) -> list[str]:
    """A sentence for each taught row: its paired differences to the baseline.

    The students of a pair have the same initial weights, and see the images in the same order.
    """
    far = max(scores[baseline][0].tar)
    lines = []
    for name, row in scores.items():
        if name in ("teacher", baseline):
            continue
        pairs = list(zip(row, scores[baseline], strict=True))
        accuracy = _cell([ours.pairs.accuracy - theirs.pairs.accuracy for ours, theirs in pairs])
        tar = _cell([ours.tar[far] - theirs.tar[far] for ours, theirs in pairs])
        of = f"mean ± deviation over {len(pairs)} pairs of students"
        lines.append(
            f"{name} adds {tar} points of TAR at FAR {far:g} and {accuracy} points of accuracy to "
            f"{baseline} ({of if len(pairs) > 1 else 'one pair of students'})"
        )
    return lines


def _cell(shares: Sequence[float]) -> str:
    """In per cent."""
    mean = f"{100 * np.mean(shares):.1f}"
    return f"{mean} ± {100 * np.std(shares, ddof=1):.1f}" if len(shares) > 1 else mean


def picture(scores: Mapping[str, Sequence[Score]], path: Path) -> None:
    """ROC curves, training losses and closeness to the teacher, of the first seed, as PNG."""
    figure, (roc, loss, cosine) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for number, (name, (first, *_)) in enumerate(scores.items()):
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
