"""The counts of benchmarks.scale on two ranks, against counts by hand."""

from typing import Any

import pytest

from benchmarks.scale_counts import BATCH, DIM, Run, count, count_on_maps
from tests.ranks import Results, on_two_ranks

CLASSES = (301, 600)
METHODS = ("thkd", "coupleface, bank")
FLOAT = 4  # bytes


def scenarios() -> dict[str, Results]:
    runs = [Run(method, classes) for method in METHODS for classes in CLASSES]
    found = {f"{run.method} {run.classes}": dict(count(run)) for run in runs}
    found["rkd"] = dict(count(Run("rkd", BATCH)))
    return {**found, "fitnet": dict(count_on_maps(Run("fitnet", 0)))}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(scenarios, tmp_path_factory.mktemp("scale"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("classes", CLASSES)
def test_a_method_on_class_rows_is_counted(ranks: Any, rank: int, classes: int) -> None:
    found, own = ranks[rank][f"thkd {classes}"], (classes + 1 - rank) // 2
    assert found["held"] == FLOAT * DIM * own
    assert found["saved"] < 100
    # Scores of two embeddings, and the gradients by two sums of scores.
    assert found["multiplications"] == 4 * (2 * BATCH) * DIM * own


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("classes", CLASSES)
def test_a_method_with_banks_is_counted(ranks: Any, rank: int, classes: int) -> None:
    found, own = ranks[rank][f"coupleface, bank {classes}"], (classes + 1 - rank) // 2
    banks = (2 * FLOAT * DIM + 1) * own  # and one byte for each class that has been met
    assert found["held"] == banks + FLOAT * 100 * own  # neighbours
    assert banks < found["saved"] < banks + 100


@pytest.mark.parametrize("method", METHODS)
def test_the_traffic_does_not_depend_on_the_classes(ranks: Any, method: str) -> None:
    few, many = (ranks[0][f"{method} {classes}"]["sent"] for classes in CLASSES)
    # At least the embeddings of both sides, and a gradient, travel once.
    assert few == many > 3 * FLOAT * BATCH * DIM


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_computes_the_angles_at_its_own_samples(ranks: Any, rank: int) -> None:
    """For both sides, in forward and again in backward; and the gradients of both factors."""
    angles = BATCH * (2 * BATCH) * (2 * BATCH)
    assert ranks[rank]["rkd"]["multiplications"] == (4 + 2) * angles * DIM


def test_a_method_on_feature_maps_is_counted(ranks: Any) -> None:
    """The connector, a convolution of 1x1 pixels and its normalisation, on the last stage."""
    found, weights, normalised = ranks[0]["fitnet"], 512 * 512, 4 * 512 + 2
    assert found["held"] == FLOAT * (weights + normalised)
    # Forward, and the gradients of the map and of the weights.
    assert found["multiplications"] == 3 * (BATCH * 7 * 7) * weights
    # Each parameter's gradient goes round a ring of two ranks once.
    assert found["sent"] >= FLOAT * weights
