"""Reads aligned faces: those of ORL, or of a folder or zip with one directory per person."""

import json
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.evaluation.named_pictures import named_pictures
from kdhooks.picture_files import SUFFIXES, PictureFiles, read_all, refuse
from kdhooks.pictures import Pixels, decode
from kdhooks_demo.align import SIZE, align
from kdhooks_demo.packages import orl_files


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
    """400 faces of 40 people, aligned to ArcFace's template by our own landmarks."""
    text = resources.files("kdhooks_demo").joinpath("orl_landmarks5.json").read_text()
    landmarks = {name: np.array(flat).reshape(5, 2) for name, flat in json.loads(text).items()}
    images = {
        name: align(_tensor(decode(path.read_bytes())).float(), landmarks[name])
        for name, path in orl_files().items()
    }
    names = tuple(name.removesuffix(".pgm") for name in images)
    return Faces(torch.stack(list(images.values())).round().to(torch.uint8), names)


def read_faces(source: str | Path) -> Faces:
    """The images …/person/image.jpg of a folder or zip, which are aligned and 112x112."""
    files = PictureFiles(source, "faces")
    found = dict(sorted(named_pictures(files, "faces").items()))
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


def _tensor(pixels: Pixels) -> Tensor:
    """(h w 3) -> (3 h w)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
