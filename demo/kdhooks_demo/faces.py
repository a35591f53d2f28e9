"""Aligned faces in memory: those of ORL, or of any folder or zip with one directory a person."""

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.picture_files import SUFFIXES, PictureFiles, first, read_all, refuse
from kdhooks.pictures import Pixels, decode
from kdhooks_demo.align import SIZE, align
from kdhooks_demo.packages import orl_files

log = logging.getLogger("kdhooks")


@dataclass(frozen=True)
class Faces:
    """n images with their names, "person/image", in order of name."""

    images: Tensor  # (n 3 112 112) uint8, RGB
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def people(self) -> NDArray[np.str_]:
        """(n): who is in each image."""
        return np.array([name.split("/")[0] for name in self.names])

    @cached_property
    def labels(self) -> Tensor:
        """(n): people numbered from 0, in order of name."""
        return torch.from_numpy(np.unique(self.people, return_inverse=True)[1])

    def where(self, chosen: NDArray[np.bool_]) -> "Faces":
        """The images whose flag (n) is set."""
        names = (self.names[row] for row in np.flatnonzero(chosen))
        return Faces(self.images[torch.from_numpy(chosen)], tuple(names))


def read_orl() -> Faces:
    """400 faces of 40 people, brought to ArcFace's template by landmarks of our own."""
    text = resources.files("kdhooks_demo").joinpath("orl_landmarks5.json").read_text()
    landmarks = {name: np.array(flat).reshape(5, 2) for name, flat in json.loads(text).items()}
    images = {
        name: align(_tensor(decode(path.read_bytes())).float(), landmarks[name])
        for name, path in orl_files().items()
    }
    names = tuple(name.removesuffix(".pgm") for name in images)
    return Faces(torch.stack(list(images.values())).round().to(torch.uint8), names)


def read_faces(source: str | Path) -> Faces:
    """The images …/person/image.jpg of a folder or a zip, aligned and 112x112 already."""
    files = PictureFiles(source, "faces")
    found = dict(sorted(_named(files).items()))
    if len({name.split("/")[0] for name in found}) < 2:
        raise KDHooksError(
            f"faces: '{files.source}' must hold images …/person/image ({' '.join(SUFFIXES)}) of "
            f"two people at least; found {len(found)} images; one directory per person"
        )
    paths, faults = list(found.values()), dict[str, str]()
    files.check(paths, (SIZE, SIZE))
    images = [_tensor(pixels) for _, pixels in read_all(paths, files.pixels, faults)]
    refuse("faces", files.source, faults, len(paths))
    return Faces(torch.stack(images), tuple(found))


def _named(files: PictureFiles) -> dict[str, str]:
    """The path of each image by its name, "person/image". A folder with images is a person."""
    found: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in (path for path in files.names if "/" in path):
        folder, _, file = path.rpartition("/")
        person = folder.rpartition("/")[2]
        if folders.setdefault(person, folder) != folder:
            raise KDHooksError(
                f"faces: '{files.source}' must have one folder per person; found "
                f"'{folders[person]}' and '{folder}'; rename one, or move its images to the other"
            )
        name = f"{person}/{PurePosixPath(file).stem}"
        if name in found:
            raise KDHooksError(f"faces: '{files.source}' holds two images '{name}'; rename one")
        found[name] = path
    known = set(folders.values())
    for folder in sorted(known):
        if outer := known & set(map(str, PurePosixPath(folder).parents)):
            raise KDHooksError(
                f"faces: a person's folder must hold no other person's; found '{folder}' in "
                f"'{min(outer)}' of '{files.source}'; move its images up, or the folder out"
            )
    if len(found) < len(files.names):
        beside = [path for path in files.names if "/" not in path]
        log.warning(
            "faces: skipped %d images in no person's folder: %s", len(beside), first(beside)
        )
    return found


def _tensor(pixels: Pixels) -> Tensor:
    """(h w 3) -> (3 h w)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
