"""A test set: images and pairs of them, from a verification file, or pictures and a pairs file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError
from kdhooks.evaluation.named_pictures import named_pictures
from kdhooks.evaluation.pairs import read_pairs_file
from kdhooks.evaluation.pickled_pairs import read_pickled_pairs
from kdhooks.picture_files import SUFFIXES, PictureFiles, check_sizes
from kdhooks.pictures import Pixels, decode, read_size
from kdhooks.tensor_files import user_path
from kdhooks.verification import fold_accuracies

FOLDS = 10
"""The folds of a verification file: runs of consecutive pairs, with both kinds in each."""


class PictureSource(Protocol):
    """Pictures by name; `PictureFiles` is one."""

    @property
    def source(self) -> Path: ...

    def check(self, names: Sequence[str], size: tuple[int, int]) -> None:
        """Raise if a picture's header cannot be read, or shows another width and height."""

    def pixels(self, name: str) -> Pixels:
        """(h w 3) RGB. Raises Unreadable if the picture cannot be decoded."""
        ...


@dataclass(frozen=True)
class PairSet:
    """n images and p pairs of them."""

    name: str
    files: PictureSource
    images: Sequence[str]  # (n), their names in `files`
    rows: NDArray[np.int64]  # (p 2): the positions of each pair's images in `images`
    same: NDArray[np.bool_]  # (p)
    folds: NDArray[np.int64]  # (p): the fold of each pair

    def one_kind(self) -> bool:
        """Whether a fold has only pairs of one person, or only pairs of two people."""
        found = [self.same[self.folds == fold] for fold in np.unique(self.folds)]
        return any(kinds.all() or not kinds.any() for kinds in found)


class EncodedPictures:
    """The pictures of a verification file, named by their positions in it."""

    def __init__(self, source: Path, subject: str, contents: Sequence[bytes]) -> None:
        self.source, self._subject, self._contents = source, subject, contents

    def check(self, names: Sequence[str], size: tuple[int, int]) -> None:
        def header(name: str) -> tuple[int, int]:
            return read_size(io.BytesIO(self._contents[int(name)]))

        check_sizes(self._subject, self.source, names, header, size)

    def pixels(self, name: str) -> Pixels:
        return decode(self._contents[int(name)])


def read_pair_sets(
    data: Sequence[str], pairs: Path | None, folds: int, subject: str
) -> list[PairSet]:
    """Read the sets that are specified by the options --data and --pairs of a command.

    data: verification files, or folders that contain them; if pairs is given, one folder or zip of
        pictures.
    folds: the number of folds into which each verification file is cut.
    subject: the start of each error message.
    """
    if pairs is not None:
        if len(data) != 1:
            raise KDHooksError(
                f"{subject} with --pairs must be one folder or zip of pictures; found {len(data)}"
            )
        pictures = PictureFiles(user_path(data[0], subject), subject)
        return [read_paired_pictures(pictures, pairs, subject)]
    files: list[Path] = []
    for source in data:
        place = user_path(source, subject)
        inside = sorted(place.glob("*.bin")) if place.is_dir() else [place]
        if not inside or place.suffix.lower() == ".zip":
            raise KDHooksError(
                f"{subject} without --pairs must be verification files such as lfw.bin, or "
                f"folders with some; found '{source}'; add --pairs FILE for a folder or zip of "
                "pictures"
            )
        files += inside
    sets = [read_pair_file(file, subject, folds) for file in files]
    names = [tested.name for tested in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise KDHooksError(f"{subject} has two sets called '{twice}'; rename one of them")
    return sets


def read_pair_file(path: Path, subject: str, folds: int = FOLDS) -> PairSet:
    """Read a verification file such as lfw.bin. subject: the start of each error message."""
    pictures, same = read_pickled_pairs(path, subject)
    if len(same) < folds:
        raise KDHooksError(
            f"{subject}: '{path}' must hold a pair for each of {folds} folds; found {len(same)}; "
            "use fewer folds, as in --folds 2, or more pairs"
        )
    fold_of = _runs(len(same), folds)
    try:
        fold_accuracies(np.zeros(len(same)), same, fold_of)
    except KDHooksError as error:
        raise KDHooksError(f"{subject}: '{path}' can't be evaluated: {error}") from error
    return PairSet(
        name=path.stem,
        files=EncodedPictures(path, subject, pictures),
        images=[str(place) for place in range(len(pictures))],
        rows=np.arange(len(pictures)).reshape(-1, 2),
        same=same,
        folds=fold_of,
    )


def _runs(pairs: int, folds: int) -> NDArray[np.int64]:
    """(p): the fold of each pair.

    If the sizes differ, the first folds are larger by one, as in scikit-learn's KFold.
    """
    sizes = [len(part) for part in np.array_split(np.arange(pairs), folds)]
    return np.repeat(np.arange(folds), sizes)


def read_paired_pictures(files: PictureFiles, pairs: str | Path, subject: str) -> PairSet:
    """Read pictures from one folder for each person, and pairs from a file like LFW's pairs.txt."""
    listed = read_pairs_file(pairs)
    paths = named_pictures(files, subject)
    if not paths:
        raise KDHooksError(
            f"{subject} must hold one folder for each person, with pictures ({' '.join(SUFFIXES)}) "
            f"in it; found none in '{files.source}'"
        )
    names = sorted({name for pair in listed.names for name in pair} & paths.keys())
    return PairSet(
        name=Path(pairs).stem,
        files=files,
        images=[paths[name] for name in names],
        rows=listed.rows(names or sorted(paths)),
        same=listed.same,
        folds=listed.folds,
    )
