"""Pair verification: are two faces the same person? Accuracy, EER and TAR at a fixed FAR.

A pair is accepted when its score is at or above a threshold. FAR is the share of different-person
pairs accepted, TAR the share of same-person pairs accepted. Axes: p pairs, n images, d dimensions,
t thresholds, k folds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdhooks.errors import KDHooksError

Floats: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]

PAIRS = 1024  # that are compared at once: their embeddings fit into the processor's cache


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; shares lie between 0 and 1."""

    accuracy: float  # mean over the folds
    accuracy_std: float  # population standard deviation over the folds
    eer: float
    tar: dict[float, float]  # FAR -> TAR; nan if there are too few pairs to measure that FAR
    threshold: float  # the most accurate one on all pairs: for deployment, not for reports


@dataclass(frozen=True)
class ROC:
    """Every operating point, from accepting no pair to accepting all: three arrays (t)."""

    far: Floats
    tar: Floats
    thresholds: Floats  # in descending order; the first is +inf


def verify(
    scores: ArrayLike,
    same: ArrayLike,
    folds: int | ArrayLike = 10,
    fars: Iterable[float] = (1e-2, 1e-3),
) -> Verification:
    """(p), (p) -> every measure of this module; `folds` as in `fold_accuracies`."""
    if not isinstance(fars, Iterable) or isinstance(fars, str):
        raise KDHooksError(f"fars must be several numbers, got {fars!r}; write ({fars!r},)")
    fars = tuple(fars)
    for far in fars:
        _check_far(far)
    accuracies = fold_accuracies(scores, same, folds)
    return Verification(
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        eer=equal_error_rate(scores, same),
        tar={far: tar_at_far(scores, same, far) for far in fars},
        threshold=best_threshold(scores, same),
    )


def fold_accuracies(scores: ArrayLike, same: ArrayLike, folds: int | ArrayLike = 10) -> Floats:
    """(p), (p) -> (k), the accuracy of each fold at the `best_threshold` of the other folds.

    `folds` is a fold id for every pair, or a number of folds. With a number, the pairs are cut into
    that many consecutive parts, as intended for the 6,000 pairs of LFW.
    """
    values, flags = _checked_pairs(scores, same)
    ids = _fold_ids(folds, len(values))
    accuracies = []
    for fold in np.unique(ids):
        here = ids == fold
        if flags[~here].all() or not flags[~here].any():
            kind = "the same person" if flags[~here].all() else "different people"
            raise KDHooksError(
                f"a threshold needs pairs of both kinds, but outside fold {fold} all "
                f"{np.sum(~here)} pairs are of {kind}; mix the pairs or give fold ids"
            )
        threshold = best_threshold(values[~here], flags[~here])
        accuracies.append(np.mean((values[here] >= threshold) == flags[here]))
    return np.array(accuracies)


def best_threshold(scores: ArrayLike, same: ArrayLike) -> float:
    """(p), (p) -> (), the threshold with the best accuracy; among equals, the strictest.

    It lies halfway between two neighbouring scores, so that new pairs have room on both sides.
    """
    thresholds, accepted_same, accepted_different = _accepted(*_checked_pairs(scores, same))
    best = int(np.argmax(accepted_same - accepted_different))
    above, below = np.append(thresholds, -np.inf)[best : best + 2]
    halfway = above / 2 + below / 2
    return float(halfway if halfway > below else above)  # adjacent floats have no number between


def equal_error_rate(scores: ArrayLike, same: ArrayLike) -> float:
    """(p), (p) -> (), the FAR that equals 1 - TAR, with the ROC interpolated linearly."""
    curve = roc(scores, same)
    return float(np.interp(0.0, curve.far + curve.tar - 1, curve.far))


def tar_at_far(scores: ArrayLike, same: ArrayLike, far: float) -> float:
    """(p), (p) -> (), the largest TAR of any threshold whose FAR is at most `far`.

    The result is nan if `far` is below one over the number of different-person pairs: one accepted
    pair is then too many, and no accepted pair says nothing about so small a rate.
    """
    _check_far(far)
    values, flags = _checked_pairs(scores, same)
    # A product would round otherwise than the division of the rates: 49 · (1 / 49) is below 1.
    if far < 1 / np.sum(~flags):
        return float("nan")
    curve = roc(values, flags)
    return float(curve.tar[curve.far <= far].max())


def roc(scores: ArrayLike, same: ArrayLike) -> ROC:
    """(p), (p) -> (t) each, one point for every distinct score and one above them all."""
    thresholds, accepted_same, accepted_different = _accepted(*_checked_pairs(scores, same))
    return ROC(
        far=accepted_different / accepted_different[-1],
        tar=accepted_same / accepted_same[-1],
        thresholds=thresholds,
    )


def unit(embeddings: ArrayLike) -> Floats:
    """(n d) -> (n d), rows of length one."""
    rows = _numbers("embeddings", embeddings)
    if rows.ndim != 2:
        raise KDHooksError(f"embeddings must be (n d), got {rows.shape}; stack one row per image")
    lengths: Floats = np.linalg.norm(rows, axis=1, keepdims=True)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        raise KDHooksError(
            f"an embedding must be finite and not zero, but row {wrong[0]} has length "
            f"{lengths[wrong[0], 0]}; look at the image or the model that made it"
        )
    return rows / lengths


def flip_summed(embeddings: ArrayLike, flipped: ArrayLike) -> Floats:
    """(n d), (n d) -> (n d), the sum over an image and its mirror image, then unit length."""
    straight, mirrored = _numbers("embeddings", embeddings), _numbers("flipped", flipped)
    if straight.shape != mirrored.shape:
        raise KDHooksError(
            f"flipped must have the shape of embeddings, {straight.shape}, got {mirrored.shape}; "
            f"embed the same images twice"
        )
    return unit(straight + mirrored)


def pair_scores(embeddings: ArrayLike, pairs: ArrayLike, other: ArrayLike | None = None) -> Floats:
    """(n d), (p 2) -> (p), cosines of the images that each pair names by row number.

    `other` holds another model's embeddings of the same images. The second image of each pair is
    then taken from there, which measures whether the student can search the teacher's gallery.
    """
    first = unit(embeddings)
    second = first if other is None else unit(other)
    if first.shape != second.shape:
        raise KDHooksError(
            f"other must have the shape of embeddings, {first.shape}, got {second.shape}; "
            f"models are comparable only on the same images and in one embedding space"
        )
    rows = _array("pairs", pairs)
    if rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype.kind not in "iu":
        raise KDHooksError(
            f"pairs must be integers (p 2), got {rows.dtype} {rows.shape}; name two rows per pair"
        )
    if rows.size and not 0 <= rows.min() <= rows.max() < len(first):
        raise KDHooksError(
            f"pairs must name rows 0 to {len(first) - 1}, got {rows.min()} to {rows.max()}; "
            f"count images from zero"
        )
    scores = np.empty(len(rows))
    for start in range(0, len(rows), PAIRS):
        some = slice(start, start + PAIRS)
        one, two = rows[some].T
        scores[some] = np.einsum("pd,pd->p", first[one], second[two])
    return scores


def _accepted(values: Floats, same: Flags) -> tuple[Floats, Counts, Counts]:
    """(p), (p) -> (t) each: thresholds, and accepted pairs of the same and of different people."""
    order = np.argsort(-values)
    values, same = values[order], same[order]
    last_of_equals = np.append(values[1:] != values[:-1], True)
    return (
        np.append(np.inf, values[last_of_equals]),
        np.append(0, np.cumsum(same)[last_of_equals]),
        np.append(0, np.cumsum(~same)[last_of_equals]),
    )


def _array(name: str, values: object) -> NDArray[Any]:
    """Convert values to an array; explain why numpy cannot convert some tensors and ragged rows."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise KDHooksError(
            f"{name} must be an array, but numpy can't make one ({error}); give rows of one "
            "length, or tensor.detach().float().cpu().numpy()"
        ) from error


def _numbers(name: str, values: ArrayLike) -> Floats:
    found = _array(name, values)
    if found.dtype.kind not in "iuf":
        raise KDHooksError(f"{name} must be real numbers, got {found.dtype}; convert them first")
    return found.astype(np.float64)


def _check_far(far: float) -> None:
    number = isinstance(far, int | float | np.floating) and not isinstance(far, bool)
    if not number or not 0 < far <= 1:
        raise KDHooksError(f"far must lie in (0, 1], got {far}; one in a thousand is 1e-3")


def _checked_pairs(scores: ArrayLike, same: ArrayLike) -> tuple[Floats, Flags]:
    values, flags = _numbers("scores", scores), _array("same", same)
    if values.ndim != 1 or flags.shape != values.shape:
        raise KDHooksError(
            f"scores and same must both be (p), got {values.shape} and {flags.shape}; "
            f"give one score and one flag per pair"
        )
    if flags.dtype != np.bool_:
        raise KDHooksError(f"same must be bool, got {flags.dtype}; write same == 1")
    if not np.isfinite(values).all():
        raise KDHooksError(
            f"scores must be finite, but {np.sum(~np.isfinite(values))} of {len(values)} are not; "
            f"look at the embeddings they come from"
        )
    if flags.all() or not flags.any():
        raise KDHooksError(
            f"pairs of the same person and of different people are both needed, got "
            f"{flags.sum()} and {(~flags).sum()}; add the missing kind"
        )
    return values, flags


def _fold_ids(folds: int | ArrayLike, pairs: int) -> Counts:
    """A number of folds, or fold ids (p) -> fold ids (p)."""
    given = _array("folds", folds)
    if given.dtype.kind not in "iu":
        raise KDHooksError(f"folds must be integers, got {given.dtype}; number the folds")
    if given.ndim == 0:
        if not 2 <= given <= pairs:
            raise KDHooksError(
                f"folds must be from 2 to the number of pairs, {pairs}, got {given}; "
                f"the threshold of one fold comes from the others"
            )
        return np.arange(pairs) * int(given) // pairs
    if given.shape != (pairs,):
        raise KDHooksError(f"fold ids must be ({pairs},), got {given.shape}; give one id per pair")
    if len(np.unique(given)) < 2:
        raise KDHooksError(
            f"at least two folds are needed, got only fold {given[0]}; "
            f"the threshold of one fold comes from the others"
        )
    return given.astype(np.int64)
