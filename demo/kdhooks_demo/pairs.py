"""Splits people into those to train on and those to test on, and makes the pairs of the test."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pairs import Pairs, read_pairs_file
from kdhooks_demo.faces import Faces

FOLDS = 10
MOST = 3000  # pairs of a kind, as View 2 of LFW has


@dataclass(frozen=True)
class Split:
    """Two sets of people with nobody in common, and the pairs to test on."""

    train: Faces
    test: Faces
    pairs: Pairs


def split_by_pairs(faces: Faces, pairs: Pairs) -> Split:
    """Train on everybody who is in none of the pairs."""
    paired = np.isin(np.arange(len(faces)), pairs.rows(faces.names))
    known = np.isin(faces.people, faces.people[paired])
    if len(set(faces.people[~known])) < 2:
        raise KDHooksError(
            f"pairs: at least two people must be in none of the pairs, to train on; all but "
            f"{len(set(faces.people[~known]))} of {len(set(faces.people))} are; give fewer pairs"
        )
    return Split(faces.where(~known), faces.where(paired), pairs)


def split_by_people(faces: Faces, share: float, seed: int) -> Split:
    """Test on a share of the people who have two images or more, chosen by the seed."""
    if not 0 < share < 1:
        raise KDHooksError(
            f"faces: the share of people to test on must lie between 0 and 1; found {share}"
        )
    able = _with_two_images(faces)
    held = np.random.default_rng(seed).permutation(able)[: max(2, round(share * len(able)))]
    return _split(faces, held, seed)


def splits_by_people(faces: Faces, parts: int, seed: int) -> list[Split]:
    """Divide the people with two images or more into parts by the seed; test on each part in turn.

    Everybody else is trained on.
    """
    able = np.random.default_rng(seed).permutation(_with_two_images(faces))
    return [_split(faces, held, seed) for held in np.array_split(able, parts)]


def _with_two_images(faces: Faces) -> NDArray[np.str_]:
    people, images = np.unique(faces.people, return_counts=True)
    return people[images > 1]


def _split(faces: Faces, held: NDArray[np.str_], seed: int) -> Split:
    """Test on the people in `held`, train on all others."""
    people = len(set(faces.people))
    if people - len(held) < 2 or len(held) < 2:
        raise KDHooksError(
            "faces: there must be two people with two images or more to test on, and two people to "
            f"train on; found {len(held)} and {people - len(held)} of {people} people; add faces, "
            "or test on another share of the people"
        )
    tested = np.isin(faces.people, held)
    test = faces.where(tested)
    return Split(faces.where(~tested), test, make_pairs(test, seed))


def make_pairs(faces: Faces, seed: int) -> Pairs:
    """All pairs of one person, at most MOST of them, and as many pairs of two people.

    If fewer pairs of two people can be drawn, the number of pairs of one person is reduced to
    theirs.
    """
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero(faces.people == person) for person in np.unique(faces.people)]
    same = np.array([pair for rows in groups for pair in combinations(rows, 2)])
    same = generator.permutation(same)[:MOST]
    different = _different(faces, len(same), generator)
    same = same[: len(different)]
    rows = np.concatenate([same, different])
    order = generator.permutation(len(rows))
    return Pairs(
        names=tuple((faces.names[a], faces.names[b]) for a, b in rows[order]),
        same=(np.arange(len(rows)) < len(same))[order],
        folds=np.arange(len(rows)) * FOLDS // len(rows),
    )


def _different(faces: Faces, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """(<=count 2), each pair once."""
    drawn = generator.integers(len(faces), size=(40 * count, 2))
    drawn = drawn[faces.people[drawn[:, 0]] != faces.people[drawn[:, 1]]]
    first_seen = np.unique(np.sort(drawn, axis=1), axis=0, return_index=True)[1]
    pairs: NDArray[np.int64] = drawn[np.sort(first_seen)[:count]]
    return pairs


def read_pairs(path: str | Path, fifth: int = 5) -> Pairs:
    """The pairs of a fifth of the folds of such a file, but of two folds at least."""
    every = read_pairs_file(path)
    folds = int(every.folds[-1]) + 1
    share = max(2, folds // 5)
    end = folds - (5 - fifth) * share
    if end < share or fifth > 5:
        raise KDHooksError(
            f"pairs: '{path}' has no fifth number {fifth} of two folds; found {folds} folds"
        )
    tested = (every.folds >= end - share) & (every.folds < end)
    return Pairs(
        names=tuple(every.names[row] for row in np.flatnonzero(tested)),
        same=every.same[tested],
        folds=every.folds[tested] - (end - share),
    )
