"""The accuracy by the trainer's protocol agrees with a naive loop and with known values."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kdhooks.evaluation.trainer_protocol import mean_length, trainer_accuracies
from kdhooks.verification import Floats, fold_accuracies, pair_scores, unit


def naive(first: Floats, second: Floats, same: NDArray[np.bool_], folds: int = 10) -> list[float]:
    """Compute one pair and one threshold at a time; the first folds are larger by one."""
    distances = [float(((a - b) ** 2).sum()) for a, b in zip(first, second, strict=True)]
    sizes = [len(same) // folds + (fold < len(same) % folds) for fold in range(folds)]
    found, start = [], 0
    for size in sizes:
        tested = range(start, start + size)
        others = [place for place in range(len(same)) if place not in tested]
        start += size

        def right(threshold: float, places: "list[int] | range") -> int:
            return sum((distances[place] < threshold) == same[place] for place in places)

        best, most = 0.0, -1
        for step in range(400):
            if (count := right(0.01 * step, others)) > most:
                best, most = 0.01 * step, count
        found.append(right(best, tested) / size)
    return found


def pairs(count: int, seed: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return unit vectors; the distances of equal and of different people overlap."""
    generator = np.random.default_rng(seed)
    same = generator.random(count) < 0.5
    first = generator.normal(size=(count, 4))
    noise = generator.normal(size=(count, 4))
    return unit(first), unit(np.where(same[:, None], first + 1.2 * noise, noise)), same


def runs(count: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(10), [count // 10 + (fold < count % 10) for fold in range(10)])


@pytest.mark.parametrize("count", [10, 37, 60])
def test_the_accuracy_of_each_fold_is_that_of_a_naive_loop(count: int) -> None:
    given = pairs(count, seed=count)
    found = trainer_accuracies(*given, runs(count))
    np.testing.assert_allclose(found, naive(*given), rtol=1e-12)
    assert 0.5 < found.mean() < 1


def test_thresholds_lie_on_a_grid() -> None:
    """Distances of 0.001 and 0.009 lie between two thresholds, and so cannot be separated."""
    same = np.arange(20) % 2 == 0
    angles = np.sqrt(np.where(same, 0.001, 0.009))
    first = np.tile([1.0, 0.0], (20, 1))
    second = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert trainer_accuracies(first, second, same, runs(20)).tolist() == [0.5] * 10
    cosines = pair_scores(
        np.concatenate([first, second]), np.stack([np.arange(20), np.arange(20) + 20], axis=1)
    )
    assert fold_accuracies(cosines, same).tolist() == [1.0] * 10


def test_the_mean_length_is_of_images_and_mirror_images() -> None:
    upright, flipped = np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([[6.0, 8.0], [0.0, 0.0]])
    assert mean_length(upright, flipped) == pytest.approx((5 + 1 + 10 + 0) / 4)
