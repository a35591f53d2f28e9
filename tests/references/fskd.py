"""F-SKD from its equation: one sample and stage at a time."""

import numpy as np

from tests.references.at import Array, unit, values
from tests.references.fitnet import at_each_pixel, resized


def feature_similarity(
    student: list[Array],
    teacher: list[Array],
    connectors: list[Array | None],
    means: list[Array | None],
) -> list[float]:
    """[(b k h w)], [(b l h' w')], [(l k 1 1)], [(l h w)] -> the term 1 - cos of each stage."""
    terms = []
    for ours, theirs, connector, mean in zip(student, teacher, connectors, means, strict=True):
        height, width = (min(ours.shape[d], theirs.shape[d]) for d in (2, 3))
        ours, theirs = resized(ours, height, width), resized(theirs, height, width)
        if connector is not None:
            ours = at_each_pixel(ours, connector, None)
        total = 0.0
        for x, y in zip(ours, theirs, strict=True):
            s, t = unit(values(x)), unit(values(y if mean is None else y - mean))
            total += 1 - sum(a * b for a, b in zip(s, t, strict=True))
        terms.append(total / len(ours))
    return terms


def mean_of(batches: list[Array], momentum: float) -> Array:
    """[(b l h w)] -> (l h w): each batch's mean counts momentum times as much as the next one's."""
    total, weights = np.zeros(batches[0].shape[1:]), 0.0
    for batch in batches:
        total, weights = momentum * total + sum(batch) / len(batch), momentum * weights + 1
    return np.asarray(total / weights)
