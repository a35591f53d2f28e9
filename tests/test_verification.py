"""Every measure agrees with loops written from its definition, and has its invariances."""

import itertools
import math
import re
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdhooks.errors import KDHooksError
from kdhooks.verification import (
    best_threshold,
    equal_error_rate,
    flip_summed,
    fold_accuracies,
    pair_scores,
    roc,
    tar_at_far,
    unit,
    verify,
)

Pairs = list[tuple[int, bool]]

# Few distinct scores, so that ties within and between the two kinds are frequent.
labelled_scores = st.lists(
    st.tuples(st.integers(-6, 6), st.booleans()), min_size=2, max_size=40
).filter(lambda drawn: len({same for _, same in drawn}) == 2)


def arrays(drawn: Pairs) -> tuple[np.ndarray, np.ndarray]:
    scores, same = zip(*drawn, strict=True)
    return np.array(scores) / 8, np.array(same)


def rates(scores: np.ndarray, same: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return FAR and TAR, counted one pair at a time."""
    wrong = sum(
        1 for s, is_same in zip(scores, same, strict=True) if not is_same and s >= threshold
    )
    right = sum(1 for s, is_same in zip(scores, same, strict=True) if is_same and s >= threshold)
    positives = sum(1 for is_same in same if is_same)
    return wrong / (len(same) - positives), right / positives


def operating_points(scores: np.ndarray, same: np.ndarray) -> list[tuple[float, float]]:
    return [rates(scores, same, t) for t in [math.inf, *sorted(set(scores.tolist()), reverse=True)]]


def correct(scores: np.ndarray, same: np.ndarray, threshold: float) -> int:
    return sum((s >= threshold) == is_same for s, is_same in zip(scores, same, strict=True))


@given(labelled_scores)
def test_roc_counts_pairs_at_every_distinct_score(drawn: Pairs) -> None:
    scores, same = arrays(drawn)
    curve = roc(scores, same)
    assert curve.thresholds.tolist() == [math.inf, *sorted(set(scores.tolist()), reverse=True)]
    np.testing.assert_allclose(
        np.stack([curve.far, curve.tar], axis=1), operating_points(scores, same), rtol=1e-15
    )


@given(labelled_scores, st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.5, 1.0]))
def test_tar_at_far_is_the_best_tar_within_the_far(drawn: Pairs, far: float) -> None:
    scores, same = arrays(drawn)
    if far * np.sum(~same) < 1:
        assert math.isnan(tar_at_far(scores, same, far))
    else:
        expected = max(t for f, t in operating_points(scores, same) if f <= far)
        assert tar_at_far(scores, same, far) == pytest.approx(expected, rel=1e-15)


@given(labelled_scores)
def test_eer_is_the_point_of_equal_errors_on_the_roc(drawn: Pairs) -> None:
    scores, same = arrays(drawn)
    eer = equal_error_rate(scores, same)
    points = operating_points(scores, same)
    for (far, tar), (next_far, next_tar) in itertools.pairwise(points):
        if far <= 1 - tar and next_far >= 1 - next_tar:
            # The segment from (far, frr) to (next_far, next_frr) crosses far = frr at this share.
            share = (1 - tar - far) / ((1 - tar - far) + (next_far - 1 + next_tar))
            assert eer == pytest.approx(far + share * (next_far - far), abs=1e-12)
            return
    raise AssertionError("the ROC runs from (0, 0) to (1, 1), so it meets the diagonal")


@given(labelled_scores)
def test_best_threshold_classifies_most_pairs_correctly(drawn: Pairs) -> None:
    scores, same = arrays(drawn)
    levels = [math.inf, *sorted(set(scores.tolist()), reverse=True)]
    most = max(correct(scores, same, level) for level in levels)
    threshold = best_threshold(scores, same)
    assert correct(scores, same, threshold) == most
    stricter = [level for level in levels if level > threshold]
    assert all(correct(scores, same, level) < most for level in stricter[:-1])


@given(labelled_scores)
def test_eer_and_tar_ignore_a_monotone_change_of_scores(drawn: Pairs) -> None:
    scores, same = arrays(drawn)
    changed = np.exp(3 * scores) - 7
    assert equal_error_rate(changed, same) == equal_error_rate(scores, same)
    assert tar_at_far(changed, same, 0.5) == pytest.approx(
        tar_at_far(scores, same, 0.5), nan_ok=True, rel=0
    )


@given(labelled_scores, st.integers(0, 2**32 - 1))
def test_order_of_pairs_does_not_matter(drawn: Pairs, seed: int) -> None:
    scores, same = arrays(drawn)
    order = np.random.default_rng(seed).permutation(len(drawn))
    assert equal_error_rate(scores[order], same[order]) == equal_error_rate(scores, same)
    assert best_threshold(scores[order], same[order]) == best_threshold(scores, same)
    assert tar_at_far(scores[order], same[order], 1.0) == tar_at_far(scores, same, 1.0)


def noisy_pairs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    same = random.permutation(np.arange(count) % 2 == 0)
    return random.normal(size=count) + 1.5 * same, same


@pytest.mark.parametrize("folds", [2, 7, 10])
def test_each_fold_uses_the_threshold_of_the_others(folds: int) -> None:
    scores, same = noisy_pairs(103)
    ids = np.random.default_rng(1).integers(0, folds, size=103) * 10 - 3
    expected = []
    for fold in sorted(set(ids.tolist())):
        others = [i for i in range(103) if ids[i] != fold]
        here = [i for i in range(103) if ids[i] == fold]
        levels = sorted((scores[i] for i in others), reverse=True)
        halfway = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        candidates = [math.inf, *halfway, -math.inf]
        counts = [correct(scores[others], same[others], c) for c in candidates]
        chosen = candidates[counts.index(max(counts))]
        expected.append(correct(scores[here], same[here], chosen) / len(here))
    np.testing.assert_allclose(fold_accuracies(scores, same, ids), expected, rtol=1e-15)


def test_a_number_of_folds_splits_the_pairs_into_runs() -> None:
    scores, same = noisy_pairs(60)
    ids = [fold for fold in range(4) for _ in range(15)]
    expected = fold_accuracies(scores, same, ids)
    np.testing.assert_array_equal(fold_accuracies(scores, same, 4), expected)


def test_fold_accuracy_ignores_the_order_of_pairs_with_their_ids() -> None:
    scores, same = noisy_pairs(50)
    ids = np.arange(50) % 5
    order = np.random.default_rng(2).permutation(50)
    np.testing.assert_array_equal(
        fold_accuracies(scores[order], same[order], ids[order]), fold_accuracies(scores, same, ids)
    )


def test_a_fold_does_not_influence_its_own_threshold() -> None:
    same = np.array([True, False] * 6)
    scores = np.where(same, 0.8, 0.2)
    ids = np.repeat([0, 1, 2], 4)
    scores[:4] -= 0.7  # the first fold would need another threshold, but gets 0.5
    assert fold_accuracies(scores, same, ids)[0] == 0.5


def test_embeddings_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(KDHooksError, match="embeddings must be real numbers, got object"):
        unit(np.array([[None, 1.0]]))
    with pytest.raises(KDHooksError, match="flipped must be real numbers, got <U1"):
        flip_summed([[1.0]], [["a"]])


def test_perfect_scores() -> None:
    same = np.tile([True, False], 100)
    result = verify(np.where(same, 0.9, 0.1), same, fars=(0.5, 0.01))
    assert (result.accuracy, result.accuracy_std, result.eer) == (1, 0, 0)
    assert result.tar == {0.5: 1, 0.01: 1}
    assert result.threshold == pytest.approx(0.5)


def test_inverted_scores() -> None:
    same = np.tile([True, False], 100)
    scores = np.where(same, 0.1, 0.9)
    assert equal_error_rate(scores, same) == 1
    assert tar_at_far(scores, same, 0.99) == 0
    assert verify(scores, same).accuracy == 0.5  # reject everything


def test_constant_scores() -> None:
    same = np.tile([True, False, False], 100)
    assert equal_error_rate(np.zeros(300), same) == 0.5
    assert tar_at_far(np.zeros(300), same, 0.99) == 0
    assert tar_at_far(np.zeros(300), same, 1.0) == 1
    assert verify(np.zeros(300), same).accuracy == pytest.approx(2 / 3)


def test_a_far_that_the_pairs_cannot_measure_is_nan() -> None:
    scores, same = noisy_pairs(1998)
    tar = verify(scores, same, fars=(1e-2, 1e-3)).tar
    assert 0 < tar[1e-2] < 1
    assert math.isnan(tar[1e-3])
    assert not math.isnan(tar_at_far(*noisy_pairs(2000), far=1e-3))


@pytest.mark.parametrize("negatives", [3, 7, 49, 98, 103, 1000, 3000])
def test_a_far_of_one_pair_can_be_measured(negatives: int) -> None:
    """49 · (1 / 49) is below 1 in floating point."""
    same = np.arange(2 * negatives) < negatives
    scores = np.where(same, 0.5, 0.1)
    scores[-1] = 0.9  # a pair of different people; if it is not accepted, every TAR is 0
    assert tar_at_far(scores, same, 1 / negatives) == 1
    assert math.isnan(tar_at_far(scores, same, np.nextafter(1 / negatives, 0)))


@pytest.mark.parametrize("low", [0.1, 1.0, 1e-300, -1.0, 1.7e308])
def test_a_threshold_is_above_the_next_score_however_close(low: float) -> None:
    high = np.nextafter(low, np.inf)
    for below, above in ((low, high), (high, np.nextafter(high, np.inf))):
        threshold = best_threshold([above, below], [True, False])
        assert below < threshold <= above


def test_verify_returns_all_single_measures() -> None:
    scores, same = noisy_pairs(400)
    result = verify(scores, same, folds=8, fars=(0.1,))
    accuracies = fold_accuracies(scores, same, 8)
    assert result.accuracy == accuracies.mean()
    assert result.accuracy_std == accuracies.std() > 0
    assert result.eer == equal_error_rate(scores, same)
    assert result.tar == {0.1: tar_at_far(scores, same, 0.1)}
    assert result.threshold == best_threshold(scores, same)


def embeddings(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32)


def test_pair_scores_are_cosines() -> None:
    rows = embeddings()
    pairs = [(0, 1), (4, 2), (3, 3)]
    expected: list[float] = []
    for left, right in [(rows[i].tolist(), rows[j].tolist()) for i, j in pairs]:
        product = sum(a * b for a, b in zip(left, right, strict=True))
        expected.append(product / math.hypot(*left) / math.hypot(*right))
    np.testing.assert_allclose(pair_scores(rows, pairs), expected, rtol=1e-6)


def test_many_pairs_need_little_memory_and_have_the_scores_of_few() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 128))
    pairs = np.stack(np.triu_indices(200, 1), axis=1)  # 19,900; their embeddings fill 41 MB
    tracemalloc.start()
    scores = pair_scores(rows, pairs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    few = [pair_scores(rows, some) for some in np.array_split(pairs, 7)]
    np.testing.assert_array_equal(scores, np.concatenate(few))


def test_cross_model_scores_take_the_second_image_from_the_other_model() -> None:
    student, teacher = embeddings(), embeddings(seed=1)
    scores = pair_scores(student, [(0, 4), (4, 0)], teacher)
    both = np.concatenate([student, teacher])
    np.testing.assert_allclose(scores, pair_scores(both, [(0, 9), (4, 5)]), rtol=1e-12)


def test_flip_sum_adds_before_it_normalises() -> None:
    straight, flipped = np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])
    np.testing.assert_allclose(flip_summed(straight, flipped), [[0.6, 0.8]])


def test_unit_rows_have_length_one() -> None:
    np.testing.assert_allclose(unit([[3, 4], [0, -2]]), [[0.6, 0.8], [0.0, -1.0]])


SCORES, SAME = noisy_pairs(20)


@pytest.mark.parametrize(
    ("scores", "same", "message"),
    [
        (SCORES, SAME[1:], "scores and same must both be (p), got (20,) and (19,)"),
        (SCORES[None], SAME[None], "scores and same must both be (p), got (1, 20) and (1, 20)"),
        (SCORES, SAME.astype(int), "same must be bool, got int64; write same == 1"),
        (np.full(20, np.nan), SAME, "scores must be finite, but 20 of 20 are not"),
        (SCORES, SAME | True, "are both needed, got 20 and 0; add the missing kind"),
        (SCORES.astype(str), SAME, "scores must be real numbers, got <U32; convert them first"),
        (SCORES * 1j, SAME, "scores must be real numbers, got complex128"),
        (SCORES > 0, SAME, "scores must be real numbers, got bool"),
        ([[1.0], [2.0, 3.0]], [True, False], "scores must be an array, but numpy can't make one"),
        (
            torch.ones(2, requires_grad=True),
            [True, False],
            "give rows of one length, or tensor.detach().float().cpu().numpy()",
        ),
        (
            torch.ones(2, dtype=torch.bfloat16),
            [True, False],
            "tensor.detach().float().cpu().numpy()",
        ),
        (SCORES, SAME & False, "are both needed, got 0 and 20; add the missing kind"),
    ],
)
def test_pairs_are_checked(scores: np.ndarray, same: np.ndarray, message: str) -> None:
    with pytest.raises(KDHooksError, match=re.escape(message)):
        verify(scores, same)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        (1, "folds must be from 2 to the number of pairs, 20, got 1"),
        (21, "folds must be from 2 to the number of pairs, 20, got 21"),
        (2.5, "folds must be integers, got float64"),
        ([0, 1], "fold ids must be (20,), got (2,); give one id per pair"),
        ([7] * 20, "at least two folds are needed, got only fold 7"),
        (~SAME, "folds must be integers, got bool; number the folds"),
        (SAME + 4, "outside fold 4 all 10 pairs are of the same person; mix the pairs"),
        (5 - SAME, "outside fold 4 all 10 pairs are of different people; mix the pairs"),
    ],
)
def test_folds_are_checked(folds: int | np.ndarray, message: str) -> None:
    with pytest.raises(KDHooksError, match=re.escape(message)):
        fold_accuracies(SCORES, SAME, folds)


@pytest.mark.parametrize("far", [0, -0.1, 1.1, math.nan, "1e-3", True, None])
def test_far_is_checked(far: float) -> None:
    with pytest.raises(KDHooksError, match=rf"far must lie in \(0, 1\], got {far}; one in a"):
        tar_at_far(SCORES, SAME, far)
    with pytest.raises(KDHooksError, match=rf"far must lie in \(0, 1\], got {far}; one in a"):
        verify(SCORES, SAME, fars=(0.5, far))


@pytest.mark.parametrize("fars", [1e-3, "1e-3", None])
def test_fars_must_be_several_numbers(fars: Any) -> None:
    with pytest.raises(KDHooksError, match=r"fars must be several numbers, got .*; write "):
        verify(SCORES, SAME, fars=fars)


def test_fars_may_be_an_iterator() -> None:
    assert list(verify(SCORES, SAME, fars=iter((0.5, 0.25))).tar) == [0.5, 0.25]


def test_embeddings_are_checked() -> None:
    with pytest.raises(KDHooksError, match=r"embeddings must be \(n d\), got \(3,\); stack one"):
        unit([1, 2, 3])
    with pytest.raises(KDHooksError, match=r"but row 1 has length 0\.0; look at the image"):
        unit([[1, 2], [0, 0]])
    with pytest.raises(KDHooksError, match="but row 0 has length nan"):
        unit([[math.nan, 2]])
    with pytest.raises(KDHooksError, match=r"of embeddings, \(5, 3\), got \(4, 3\); embed the"):
        flip_summed(embeddings(), embeddings()[1:])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1], "pairs must be integers (p 2), got int64 (2,)"),
        ([[0, 1, 2]], "pairs must be integers (p 2), got int64 (1, 3)"),
        ([[0.0, 1.0]], "pairs must be integers (p 2), got float64 (1, 2)"),
        ([[0, 5]], "pairs must name rows 0 to 4, got 0 to 5; count images from zero"),
        ([[-1, 4]], "pairs must name rows 0 to 4, got -1 to 4; count images from zero"),
    ],
)
def test_pair_rows_are_checked(rows: list[list[float]], message: str) -> None:
    with pytest.raises(KDHooksError, match=re.escape(message)):
        pair_scores(embeddings(), rows)


def test_cross_models_must_share_their_space() -> None:
    with pytest.raises(KDHooksError, match=r"of embeddings, \(5, 3\), got \(5, 2\); models are"):
        pair_scores(embeddings(), [(0, 1)], embeddings()[:, :2])
