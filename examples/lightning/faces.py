"""Reads the faces of a folder or a zip, for training and for verification. Copy what you need.

Each picture is a face, aligned to ArcFace's template, with 112x112 pixels. With labels, each person
has a folder of pictures; without labels, pictures may be in any folder.
"""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdhooks import KDHooksError
from kdhooks.evaluation.pair_sets import PairSet, read_paired_pictures
from kdhooks.picture_files import PictureFiles


class Faces(Dataset[tuple[Tensor, int]]):
    """Pictures of a folder or a zip, each decoded when it is requested.

    An item is an image (3 112 112), RGB, scaled as (pixel - 127.5) / 127.5, and the number of its
    person, or -1 without labels.
    """

    def __init__(
        self, files: PictureFiles, names: Sequence[str], labelled: bool, mirrored: bool
    ) -> None:
        """names: the pictures to use. mirrored: whether to mirror a random half of them."""
        self._files, self._process = files, os.getpid()
        self.names, self._mirrored = list(names), mirrored
        numbers = {
            person: number for number, person in enumerate(sorted(set(map(person_of, names))))
        }
        self._labels = [numbers[person_of(name)] if labelled else -1 for name in names]
        self.classes = len(numbers) if labelled else 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if self._process != os.getpid():  # the workers of a DataLoader must not share an open zip
            self._files, self._process = PictureFiles(self._files.source, "faces"), os.getpid()
        pixels = torch.from_numpy(self._files.pixels(self.names[row]))
        image = (pixels.permute(2, 0, 1).float() - 127.5) / 127.5
        if self._mirrored and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, self._labels[row]


def person_of(name: str) -> str:
    """Return the name of the folder that contains a picture."""
    return PurePosixPath(name).parent.name


def open_faces(source: str | Path) -> PictureFiles:
    """Open a folder or a zip, all of whose pictures must have 112x112 pixels."""
    files = PictureFiles(source, "faces")
    files.check(files.names, (112, 112))
    return files


def training_faces(files: PictureFiles, labelled: bool, tested: set[str]) -> Faces:
    """Return all faces except those of the people who are tested."""
    names = [name for name in files.names if person_of(name) not in tested]
    alone = [name for name in names if not person_of(name)]
    if labelled and (alone or len(set(map(person_of, names))) < 2):
        raise KDHooksError(
            f"faces: '{files.source}' must have a folder for each person, and at least two people; "
            f"found {len(alone)} of {len(names)} pictures in no folder; without labels, set "
            "labels = false in the recipe"
        )
    return Faces(files, names, labelled, mirrored=True)


def tested_faces(files: PictureFiles, pairs: str | Path) -> tuple[Faces, PairSet]:
    """Return the faces that are in a file of pairs, and these pairs."""
    tested = read_paired_pictures(files, pairs, "faces")
    return Faces(files, tested.images, labelled=False, mirrored=False), tested
