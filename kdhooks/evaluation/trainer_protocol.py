"""Accuracy of pairs as InsightFace's arcface_torch computes it, for comparison with its log.

It differs from `kdhooks.verification` in two ways: a pair is accepted if its squared distance is
below a threshold, and thresholds lie on a grid. p pairs, n images, d dimensions, t thresholds.
"""

import numpy as np
from numpy.typing import NDArray

from kdhooks.verification import Counts, Floats

THRESHOLDS: Floats = np.arange(0, 4, 0.01)  # of squared distances between unit vectors


def trainer_accuracies(
    first: Floats, second: Floats, same: NDArray[np.bool_], folds: Counts
) -> Floats:
    """(p d), (p d), (p), (p) -> (k): unit embeddings of both images; accuracy of each fold.

    The threshold of a fold is the one with the highest accuracy on the other folds; if several are
    equal, the lowest.
    """
    distances = np.square(first - second).sum(axis=1)
    right = (distances < THRESHOLDS[:, None]) == same  # (t p)
    accuracies = []
    for fold in np.unique(folds):
        here = folds == fold
        best = np.argmax(right[:, ~here].sum(axis=1))
        accuracies.append(right[best, here].mean())
    return np.array(accuracies)


def mean_length(embeddings: Floats, flipped: Floats) -> float:
    """(n d), (n d) -> (): the mean length of embeddings, which the trainer logs as XNorm.

    The embeddings are those of images and of mirror images, before they are added.
    """
    return float(np.linalg.norm([embeddings, flipped], axis=2).mean())
