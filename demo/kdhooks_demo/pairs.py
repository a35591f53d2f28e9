"""Who trains, who is tested, and on which pairs: nobody tested is ever trained on."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError
from kdhooks.tensor_files import user_path
from kdhooks_demo.faces import Faces

FOLDS = 10
MOST = 3000  # pairs of a kind, as View 2 of LFW has


@dataclass(frozen=True)
class Pairs:
    """p pairs of images by name; the threshold of a fold is taken from the other folds."""

    names: tuple[tuple[str, str], ...]
    same: NDArray[np.bool_]  # (p)
    folds: NDArray[np.int64]  # (p)

    def rows(self, faces: Faces) -> NDArray[np.int64]:
        """(p 2): where the images lie in faces."""
        at = {name: row for row, name in enumerate(faces.names)}
        missing = [name for pair in self.names for name in pair if name not in at]
        if missing:
            raise KDHooksError(
                f"pairs: every image must be among the faces; {len(missing)} of "
                f"{2 * len(self.names)} are not, the first is '{missing[0]}'; the faces have "
                f"names like '{faces.names[0]}'"
            )
        return np.array([[at[name] for name in pair] for pair in self.names])


@dataclass(frozen=True)
class Split:
    """Two sets of people with nobody in common, and the pairs to test on."""

    train: Faces
    test: Faces
    pairs: Pairs


def split_by_pairs(faces: Faces, pairs: Pairs) -> Split:
    """Train on whoever is in none of the pairs."""
    paired = np.isin(np.arange(len(faces)), pairs.rows(faces))
    known = np.isin(faces.people, faces.people[paired])
    if len(set(faces.people[~known])) < 2:
        raise KDHooksError(
            f"pairs: two people at least must be in none of the pairs, to train on; all but "
            f"{len(set(faces.people[~known]))} of {len(set(faces.people))} are; give fewer pairs"
        )
    return Split(faces.where(~known), faces.where(paired), pairs)


def split_by_people(faces: Faces, share: float, seed: int) -> Split:
    """Hold out a share of the people who have two images or more, drawn by the seed."""
    if not 0 < share < 1:
        raise KDHooksError(
            f"faces: the share of people to test on must lie between 0 and 1; found {share}"
        )
    people, images = np.unique(faces.people, return_counts=True)
    able = people[images > 1]
    held = np.random.default_rng(seed).permutation(able)[: max(2, round(share * len(able)))]
    if len(people) - len(held) < 2 or len(held) < 2:
        raise KDHooksError(
            f"faces: two people with two images or more are held out, and two are trained on; "
            f"found {len(people)} people, {len(able)} of them with two images"
        )
    tested = np.isin(faces.people, held)
    test = faces.where(tested)
    return Split(faces.where(~tested), test, make_pairs(test, seed))


def make_pairs(faces: Faces, seed: int) -> Pairs:
    """All pairs of one person, at most MOST of them, and as many pairs of two people.

    Where fewer pairs of two people are drawn, there are fewer of one person too.
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
    """Pairs in the format of LFW's View 2, of a fifth of its folds, but two folds at least.

    The first line says how many folds, and how many pairs of a kind in each: "10 300". Then a
    line is "person 1 4", two images of one person, or "person 1 other 2".
    """
    path = user_path(path, "pairs")
    (_, header), *lines = _words(path)
    if not (len(header) == 2 and all(map(_is_number, header))):
        raise KDHooksError(
            f"pairs: '{path}' must begin with the number of folds and of pairs of a kind in each, "
            f'as "10 300"; found "{" ".join(header)}"'
        )
    folds, of_a_kind = (int(word) for word in header)
    if folds < 2 or not of_a_kind or len(lines) != 2 * folds * of_a_kind:
        raise KDHooksError(
            f"pairs: '{path}' must hold two folds or more, with as many pairs as its first line "
            f"says; it says {folds} folds of 2 x {of_a_kind}; found {len(lines)} pairs"
        )
    size = 2 * of_a_kind
    pairs = [_pair(line, number, path) for number, line in lines]
    kinds = np.array([len(line) == 3 for _, line in lines])
    for fold, same in enumerate(kinds.reshape(folds, size).sum(axis=1), 1):
        if same != of_a_kind:
            raise KDHooksError(
                f"pairs: each fold of '{path}' must hold as many pairs of one person as of two, "
                f"{of_a_kind}; found {same} of one person among the {size} of fold {fold}"
            )
    share = size * max(2, folds // 5)
    end = len(lines) - (5 - fifth) * share
    if end < share or fifth > 5:
        raise KDHooksError(
            f"pairs: '{path}' has no fifth number {fifth} of two folds; found {folds} folds"
        )
    tested = slice(end - share, end)
    return Pairs(
        names=tuple(pairs[tested]),
        same=kinds[tested],
        folds=np.arange(share, dtype=np.int64) // size,
    )


def _words(path: Path) -> list[tuple[int, list[str]]]:
    """The words of each line that has any, with the line's number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise KDHooksError(f"pairs: there is no file '{path}'") from None
    except OSError as error:
        raise KDHooksError(
            f"pairs: '{path}' can't be read ({error.strerror}); name a text file such as pairs.txt"
        ) from error
    except UnicodeDecodeError as error:
        raise KDHooksError(
            f"pairs: '{path}' must be text in UTF-8; found {error}; save it in UTF-8"
        ) from error
    lines = [(number, line.split()) for number, line in enumerate(text.split("\n"), 1)]
    if not any(words for _, words in lines):
        raise KDHooksError(f"pairs: '{path}' is empty; name a file such as LFW's pairs.txt")
    return [(number, words) for number, words in lines if words]


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) < 10


def _pair(line: list[str], number: int, path: Path) -> tuple[str, str]:
    match line:
        case [person, first, second] if _is_number(first) and _is_number(second):
            other, fault = person, int(first) == int(second)
        case [person, first, other, second] if _is_number(first) and _is_number(second):
            fault = person == other
        case _:
            raise KDHooksError(
                f'pairs: a line of \'{path}\' must be "person 1 4" or "person 1 other 2"; '
                f'found "{" ".join(line)}" in line {number}'
            )
    if fault:
        raise KDHooksError(
            f"pairs: a line of '{path}' with three words must name two images of a person, and one "
            f'with four two people; found "{" ".join(line)}" in line {number}'
        )
    return f"{person}/{person}_{int(first):04d}", f"{other}/{other}_{int(second):04d}"
