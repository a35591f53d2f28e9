"""Reads the pictures of a data set: a folder, a zip, or the trainer's own records."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pair_sets import PictureSource
from kdhooks.picture_files import SUFFIXES, PictureFiles, read_all, refuse, wrong_size
from kdhooks.pictures import Pixels, Unreadable
from kdhooks_integrations.arcface_torch.commands.recordio import Records


def open_pictures(source: str) -> PictureFiles | Records:
    """Open a folder of pictures at any depth, a folder with train.rec and train.idx, or a zip."""
    folder = Path(os.path.expanduser(source))
    found = [name for name in ("train.rec", "train.idx") if (folder / name).is_file()]
    if source and len(found) == 1:
        raise KDHooksError(
            f"--data: train.rec and train.idx must both exist; found only {found[0]} in '{source}'"
        )
    if source and found:
        return Records(folder)
    return PictureFiles(source, "--data", turn=False)


class Pictures:
    """The pictures of a data set, by name in a fixed order."""

    def __init__(self, source: str) -> None:
        """source: as for `open_pictures`."""
        self._files = open_pictures(source)
        self.names = self._files.names
        if not self.names:
            raise KDHooksError(
                f"--data must be a folder or a zip with pictures ({' '.join(SUFFIXES)}), or a "
                f"folder with train.rec and train.idx; found none in '{source}'"
            )

    def batches(
        self, names: Sequence[str], size: int, shape: tuple[int, int, int]
    ) -> Iterator[Tensor]:
        """(b 3 h w) in [-1, 1], scaled from 8 bits as in the trainers, all of this shape."""
        return map(as_input, read_batches(self._files, names, size, shape))


def read_batches(
    files: PictureSource,
    names: Sequence[str],
    size: int,
    shape: tuple[int, int, int],
    subject: str = "--data",
) -> Iterator[list[Pixels]]:
    """Yield batches of pictures [(h w 3)] of the given shape. size: the size of a batch.

    subject: the option, for errors.

    All headers are checked first. A picture that cannot be decoded later is skipped, and reported
    after the last batch.
    """
    files.check(names, size_of(shape))
    faults: dict[str, str] = {}
    found = read_all(names, lambda name: fitting(files.pixels(name), shape), faults)
    while batch := list(islice(found, size)):
        yield [picture for _, picture in batch]
    refuse(subject, files.source, faults, len(names))


def size_of(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return the width and height that pictures must have for a network's input (3 h w)."""
    channels, height, width = shape
    if channels != 3:
        raise KDHooksError(
            f"--data: pictures have 3 channels; input_shape of the recipe has {channels}"
        )
    return width, height


def fitting(pixels: Pixels, shape: tuple[int, int, int]) -> Pixels:
    """(h w 3), unchanged; raises Unreadable if the network's input has another size."""
    height, width, _ = pixels.shape
    if (width, height) != size_of(shape):
        raise Unreadable(wrong_size((width, height), size_of(shape)))
    return pixels


def as_input(pictures: Sequence[Pixels]) -> Tensor:
    """[(h w 3)] -> (b 3 h w) in [-1, 1]."""
    return (_stacked(pictures) - 127.5) / 127.5


def as_verified(pictures: Sequence[Pixels]) -> Tensor:
    """[(h w 3)] -> (b 3 h w) in [-1, 1], rounded as in the trainer's verification."""
    return (_stacked(pictures) / 255 - 0.5) / 0.5


def _stacked(pictures: Sequence[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().contiguous()
