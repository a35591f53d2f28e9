"""Aligned faces in memory: those of ORL, or of any folder or zip with one directory a person."""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks_demo.align import SIZE, align
from kdhooks_demo.packages import orl_files

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp")


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
        name: align(_pixels(path.read_bytes(), name).float(), landmarks[name])
        for name, path in orl_files().items()
    }
    names = tuple(name.removesuffix(".pgm") for name in images)
    return Faces(torch.stack(list(images.values())).round().to(torch.uint8), names)


def read_faces(source: str | Path) -> Faces:
    """The images …/person/image.jpg of a folder or a zip, aligned and 112x112 already."""
    source = Path(source).expanduser()
    images = {}
    for path, content in sorted(_entries(source)):
        name = f"{path.parent.name}/{path.stem}"
        if name in images:
            raise KDHooksError(f"faces: '{source}' holds two images '{name}'; rename one")
        images[name] = _aligned(content, f"{source}/{path}")
    if len({name.split("/")[0] for name in images}) < 2:
        raise KDHooksError(
            f"faces: '{source}' must hold images …/person/image ({' '.join(SUFFIXES)}) of two "
            f"people at least; found {len(images)} images; one directory per person"
        )
    names = sorted(images)
    return Faces(torch.stack([images[name] for name in names]), tuple(names))


def _entries(source: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Every image file with a directory to name its person, and its content."""
    if source.is_dir():
        for path in source.glob("**/*"):
            inside = PurePosixPath(path.relative_to(source).as_posix())
            if _is_face(inside):
                yield inside, path.read_bytes()
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for inside in map(PurePosixPath, archive.namelist()):
                if _is_face(inside):
                    yield inside, archive.read(str(inside))
    else:
        raise KDHooksError(f"faces: '{source}' is neither a folder nor a zip file; name either")


def _is_face(path: PurePosixPath) -> bool:
    return path.suffix.lower() in SUFFIXES and bool(path.parent.name)


def _aligned(content: bytes, name: str) -> Tensor:
    pixels = _pixels(content, name)
    if pixels.shape[1:] != (SIZE, SIZE):
        height, width = pixels.shape[1:]
        raise KDHooksError(
            f"faces: images must be faces aligned to ArcFace's template, {SIZE}x{SIZE}; '{name}' "
            f"is {width}x{height}; insightface.utils.face_align.norm_crop makes them"
        )
    return pixels


def _pixels(content: bytes, name: str) -> Tensor:
    """(3 h w) uint8; grey becomes three equal channels."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise KDHooksError(f"faces: '{name}' can't be read as an image ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
