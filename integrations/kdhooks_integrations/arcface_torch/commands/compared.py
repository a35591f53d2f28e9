"""Computes verification figures of each model, and of each pair of different models.

Of two models, one embeds the first image of each image pair, and the other the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pair_sets import PairSet
from kdhooks.evaluation.trainer_protocol import mean_length, trainer_accuracies
from kdhooks.verification import (
    ROC,
    Floats,
    Verification,
    flip_summed,
    pair_scores,
    roc,
    unit,
    verify,
)
from kdhooks_integrations.arcface_torch.commands.embedding import Embedded, Embedder, Progress
from kdhooks_integrations.arcface_torch.commands.models import Model


@dataclass(frozen=True)
class Result:
    """The figures of one set for the models of the first and of the second image of each pair."""

    first: str
    second: str
    figures: Verification
    curve: ROC
    length: float | None = None  # the trainer's XNorm, if both images have the same model


@dataclass(frozen=True)
class Refused:
    """Two models that cannot be compared, and the reason."""

    first: str
    second: str
    reason: str


@dataclass(frozen=True)
class Compared:
    tested: PairSet
    results: list[Result]  # first each model by itself, in their order, then the crosses
    refused: list[Refused]


def compare(
    models: Sequence[Model],
    tested: PairSet,
    embedder: Embedder,
    fars: Sequence[float],
    trainers: bool,
    progress: Progress,
) -> Compared:
    """trainers: whether accuracy is computed as arcface_torch does."""
    looks, embedded = embedder.embed(models, tested, progress)
    units = {
        model.name: _unit(model.name, one) for model, one in zip(models, embedded, strict=True)
    }

    def result(first: str, second: str, length: float | None = None) -> Result:
        scores = pair_scores(units[first], looks.rows, units[second])
        figures = verify(scores, tested.same, tested.folds, fars)
        if trainers:
            left, right = (
                units[one][rows] for one, rows in zip((first, second), looks.rows.T, strict=True)
            )
            figures = _as_trainer(
                figures, trainer_accuracies(left, right, tested.same, tested.folds)
            )
        return Result(first, second, figures, roc(scores, tested.same), length)

    results = [
        result(model.name, model.name, _length(one) if trainers else None)
        for model, one in zip(models, embedded, strict=True)
    ]
    refused = []
    for first, second in permutations(units, 2):
        widths = [units[one].shape[1] for one in (first, second)]
        if widths[0] == widths[1]:
            results.append(result(first, second))
        else:
            reason = (
                f"their embeddings have {widths[0]} and {widths[1]} numbers, and only embeddings "
                "of the same length can be compared"
            )
            refused.append(Refused(first, second, reason))
    return Compared(tested, results, refused)


def _unit(name: str, embedded: Embedded) -> Floats:
    """(m d): unit embeddings of the images, summed with those of their mirror images, if any."""
    upright = np.concatenate(embedded.upright)
    try:
        if embedded.flipped:
            return flip_summed(upright, np.concatenate(embedded.flipped))
        return unit(upright)
    except KDHooksError as error:
        raise KDHooksError(f"evaluate: model '{name}': {error}") from error


def _length(embedded: Embedded) -> float:
    return mean_length(np.concatenate(embedded.upright), np.concatenate(embedded.flipped))


def _as_trainer(figures: Verification, accuracies: NDArray[np.float64]) -> Verification:
    return replace(figures, accuracy=float(accuracies.mean()), accuracy_std=float(accuracies.std()))
