"""Pairs of images by name, and the text files in the format of LFW's View 2 that hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError
from kdhooks.tensor_files import user_path


@dataclass(frozen=True)
class Pairs:
    """p pairs of images by name; the threshold of a fold is taken from the other folds."""

    names: tuple[tuple[str, str], ...]
    same: NDArray[np.bool_]  # (p)
    folds: NDArray[np.int64]  # (p)

    def rows(self, names: Sequence[str]) -> NDArray[np.int64]:
        """(p 2): the positions of each pair's images in `names`."""
        at = {name: row for row, name in enumerate(names)}
        missing = [name for pair in self.names for name in pair if name not in at]
        if missing:
            raise KDHooksError(
                f"pairs: every image must be among the faces; {len(missing)} of "
                f"{2 * len(self.names)} are not, the first is '{missing[0]}'; the faces have "
                f"names like '{names[0]}'"
            )
        return np.array([[at[name] for name in pair] for pair in self.names])


def read_pairs_file(path: str | Path) -> Pairs:
    """Read all pairs of a file.

    The first line holds the number of folds, and of pairs of each kind in a fold: "10 300". Each of
    the other lines is "person 1 4", two images of one person, or "person 1 other 2", of two people.
    """
    path = user_path(path, "pairs")
    (_, header), *lines = _words(path)
    if not (len(header) == 2 and all(map(_is_number, header))):
        raise KDHooksError(
            f"pairs: '{path}' must start with the number of folds and of pairs of each kind in a "
            f'fold, as "10 300"; found "{" ".join(header)}"'
        )
    folds, of_a_kind = (int(word) for word in header)
    if folds < 2 or not of_a_kind or len(lines) != 2 * folds * of_a_kind:
        raise KDHooksError(
            f"pairs: '{path}' must hold two folds or more, and as many pairs as its first line "
            f"specifies, {folds} folds of 2 x {of_a_kind}; found {len(lines)} pairs"
        )
    size = 2 * of_a_kind
    names = tuple(_pair(line, number, path) for number, line in lines)
    same = np.array([len(line) == 3 for _, line in lines])
    for fold, found in enumerate(same.reshape(folds, size).sum(axis=1), 1):
        if found != of_a_kind:
            raise KDHooksError(
                f"pairs: each fold of '{path}' must hold as many pairs of one person as of two, "
                f"{of_a_kind}; found {found} of one person among the {size} of fold {fold}"
            )
    return Pairs(names, same, np.arange(len(names), dtype=np.int64) // size)


def _words(path: Path) -> list[tuple[int, list[str]]]:
    """Return the words of each line that is not empty, with the line's number."""
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
            f"pairs: a line of '{path}' with three words must name two images of one person, and a "
            f'line with four words two people; found "{" ".join(line)}" in line {number}'
        )
    return f"{person}/{person}_{int(first):04d}", f"{other}/{other}_{int(second):04d}"
