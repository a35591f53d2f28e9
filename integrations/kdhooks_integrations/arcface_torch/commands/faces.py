"""Creates a batch for a trial: random images, or images from the training data."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.errors import KDHooksError, listed
from kdhooks.picture_files import PictureFiles, read_all, refuse
from kdhooks.pictures import Pixels
from kdhooks_integrations.arcface_torch.commands.pictures import (
    as_input,
    fitting,
    open_pictures,
    size_of,
)
from kdhooks_integrations.arcface_torch.commands.recordio import Records

log = logging.getLogger("kdhooks")


def made_up(count: int, shape: tuple[int, int, int]) -> Tensor:
    """(b 3 h w) in [-1, 1]: a different smooth pattern for each image, with noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(count, shape[0], 8, 8, generator=generator) * 2 - 1
    images = F.interpolate(patterns, shape[1:], mode="bilinear")
    return (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def read_batch(
    folder: str, count: int, classes: int | None, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, int]:
    """Return images (b 3 h w) in [-1, 1], labels (b), and the number of classes.

    The labels are those of the trainer: from train.rec, or the position of the person's folder in
    the sorted list. The images are spread evenly over the folder. If train.rec does not determine
    the number of classes, and `classes` is None, it is the highest label of the batch plus one.
    """
    files = open_pictures(folder)
    people = {} if isinstance(files, Records) else _people(files)
    found = len(people) or None
    if found is not None and classes not in (None, found):
        raise KDHooksError(
            f"--data '{folder}' has {found} classes, but the training has {classes}; correct "
            "--data, or num_classes"
        )
    names = [name for name in files.names if "/" in name or not people]
    chosen = [names[index * len(names) // count] for index in range(count)]
    if len(names) < count:
        log.warning(
            "--data '%s' has %d pictures for a batch of %d; the batch repeats some of them",
            folder,
            len(names),
            count,
        )
    files.check(chosen, size_of(shape))

    def sample(name: str) -> tuple[Pixels, int]:
        label = files.label(name) if isinstance(files, Records) else people[name.split("/")[0]]
        return fitting(files.pixels(name), shape), label

    faults: dict[str, str] = {}
    samples = [one for _, one in read_all(chosen, sample, faults)]
    refuse("--data", files.source, faults, count)
    images, labels = zip(*samples, strict=True)
    return as_input(images), torch.tensor(labels), found or classes or max(labels) + 1


def _people(files: PictureFiles) -> dict[str, int]:
    """Return each person's label; as in torchvision's ImageFolder, every folder is a person."""
    root = files.source
    entries = root.iterdir() if root.is_dir() else ()
    people = sorted(entry.name for entry in entries if entry.is_dir())
    if not people:
        raise KDHooksError(
            f"--data must be training data: train.rec with train.idx, or one folder for each "
            f"person; found neither in '{root}'"
        )
    if empty := sorted({*people} - {name.split("/")[0] for name in files.names if "/" in name}):
        raise KDHooksError(
            f"--data: for the trainer, each folder in '{root}' is a person and must have pictures; "
            f"found none in {listed(map(repr, empty[:5]))}, {len(empty)} of {len(people)} folders; "
            "remove these folders"
        )
    return {name: label for label, name in enumerate(people)}
