"""A batch of images for a trial: made up, or read from the folder that the trainer trains on."""

from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks_integrations.arcface_torch.commands.recordio import MXIndexedRecordIO, imdecode, unpack

Sample: TypeAlias = tuple[NDArray[Any], int]  # (h w 3) RGB, label
Item = TypeVar("Item")


def made_up(count: int, shape: tuple[int, int, int]) -> Tensor:
    """(b 3 h w) in [-1, 1]: a smooth pattern each, under noise, so that they differ as faces do."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(count, shape[0], 8, 8, generator=generator) * 2 - 1
    images = F.interpolate(patterns, shape[1:], mode="bilinear")
    return (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def read_batch(folder: str, count: int, classes: int | None) -> tuple[Tensor, Tensor, int]:
    """(b 3 h w) in [-1, 1], (b), and how many classes there are, as far as the folder says.

    The labels are the trainer's: what train.rec says, or the place of a person's folder in the
    sorted list. The images are spread over all of it.
    """
    path = Path(folder).expanduser()
    if (path / "train.rec").is_file() and (path / "train.idx").is_file():
        samples, found = _records(path, count), None
    else:
        samples, found = _files(path, count)
    if found is not None and classes not in (None, found):
        raise KDHooksError(
            f"--data '{folder}' has {found} classes, --num-classes says {classes}; they must be "
            "the same"
        )
    images, labels = zip(*samples, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous()
    return (pixels - 127.5) / 127.5, torch.tensor(labels), found or classes or max(labels) + 1


def _records(path: Path, count: int) -> list[Sample]:
    records = MXIndexedRecordIO(str(path / "train.idx"), str(path / "train.rec"), "r")
    header, _ = unpack(records.read_idx(records.keys[0]))
    keys = records.keys
    if not isinstance(header.label, float):  # the first record says where the images end
        keys = list(range(1, int(header.label[0])))
    samples = []
    for key in _spread(keys, count):
        header, content = unpack(records.read_idx(key))
        label = header.label if isinstance(header.label, float) else header.label[0]
        samples.append((np.asarray(imdecode(content)), int(label)))
    return samples


def _files(path: Path, count: int) -> tuple[list[Sample], int]:
    people = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    if not people:
        raise KDHooksError(
            f"--data must be the trainer's: train.rec with train.idx, or one folder a person; "
            f"found neither in '{path}'"
        )
    files = [(file, label) for label, one in enumerate(people) for file in sorted(one.iterdir())]
    chosen = _spread(files, count)
    return [(np.asarray(imdecode(file.read_bytes())), label) for file, label in chosen], len(people)


def _spread(items: list[Item], count: int) -> list[Item]:
    """So many of them, at even distances; the same ones again where they are fewer."""
    return [items[index * len(items) // count] for index in range(count)]
