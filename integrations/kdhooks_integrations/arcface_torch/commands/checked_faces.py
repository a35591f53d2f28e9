"""Selects the faces with which `kdhooks export` calibrates and checks int8 and float16 files."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pair_sets import PairSet, read_paired_pictures
from kdhooks.picture_files import SUFFIXES, PictureFiles
from kdhooks_integrations.arcface_torch.commands.pictures import as_input, read_batches

CALIBRATING = 256
"""The default number of faces for calibration, if there are as many."""

CHECKED = 256
"""The number of faces for the check if there are no pairs, and if there are as many faces."""

_SHAPE = (3, 112, 112)
_BATCH = 32


@dataclass(frozen=True)
class Faces:
    """Pictures of one folder or zip."""

    files: PictureFiles
    names: tuple[str, ...]  # names of the pictures
    subject: str  # the option that named the folder

    def only(self, names: tuple[str, ...]) -> "Faces":
        return Faces(self.files, names, self.subject)

    def batches(self) -> Iterator[Tensor]:
        """[(b 3 112 112)] in [-1, 1]."""
        return map(as_input, read_batches(self.files, self.names, _BATCH, _SHAPE, self.subject))


@dataclass(frozen=True)
class Chosen:
    """The faces for calibration, if any, and different faces on which all files are checked."""

    calibrating: Faces | None
    checked: Faces
    pairs: PairSet | None  # of the checked faces


def choose_faces(options: argparse.Namespace) -> Chosen:
    """Select faces, after reading the pairs and the headers of the pictures.

    options: those of `kdhooks export`, with --int8 or --float16 and a source of faces.
    """
    calibrating = _opened(options.calibrate, "--calibrate") if options.int8 else None
    checked, shared = calibrating, True
    if options.data is not None and not _same(options.calibrate, options.data):
        checked, shared = _opened(options.data, "--data"), calibrating is None
    assert checked is not None, "check_precision requires --calibrate or --data"
    most, pairs = options.calibration_images or CALIBRATING, None
    if options.pairs is not None:
        pairs = read_paired_pictures(checked.files, options.pairs, checked.subject)
        tested = tuple(pairs.images)
        if calibrating is not None and shared:
            calibrating = _strangers(calibrating, tested)
        calibrating = calibrating and calibrating.only(_spread(calibrating.names, most))
    else:
        if calibrating is not None:
            most = min(most, len(calibrating.names) // 2) if shared else most
            calibrating = calibrating.only(_spread(calibrating.names, most))
        taken = {*calibrating.names} if calibrating is not None and shared else set()
        tested = _spread([name for name in checked.names if name not in taken], CHECKED)
    checked = checked.only(tested)
    for faces in (calibrating, checked):
        if faces is not None:
            faces.files.check(faces.names, (_SHAPE[2], _SHAPE[1]))
    return Chosen(calibrating, checked, pairs)


def _opened(source: Path, subject: str) -> Faces:
    files = PictureFiles(source, subject, turn=False)
    if len(files.names) < 2:
        raise KDHooksError(
            f"{subject} must hold at least two pictures ({' '.join(SUFFIXES)}); found "
            f"{len(files.names)} in '{source}'"
        )
    return Faces(files, tuple(files.names), subject)


def _same(one: Path | None, other: Path) -> bool:
    return one is not None and one.exists() and other.exists() and one.samefile(other)


def _spread(names: Sequence[str], most: int) -> tuple[str, ...]:
    """Select at most this many names, evenly spread from the first to the last."""
    count = min(most, len(names))
    return tuple(names[index * len(names) // count] for index in range(count))


def _strangers(faces: Faces, tested: Sequence[str]) -> Faces:
    """Select the faces of people who are not tested."""
    known = {name.rpartition("/")[0] for name in tested}
    names = tuple(name for name in faces.names if name.rpartition("/")[0] not in known)
    if not names:
        raise KDHooksError(
            "export: the faces for calibration must show people who are in no pair; found all "
            f"people of '{faces.files.source}' in the pairs; pass other faces to --calibrate, and "
            "the faces of the pairs to --data"
        )
    return faces.only(names)
