"""Makes more training images before the training starts: views of a face, and blends of two people.

The teacher embeds a fixed set of images once, however long the students train, and every student
sees the same images. This follows "Knowledge distillation: a good teacher is patient and
consistent", Beyer et al., CVPR 2022: both networks see the same view, the training is long, and
blends of images (mixup) show the student the teacher's embeddings between the photographs. A blend
of two people counts as a new person with a label, so training on labels alone uses the same images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdhooks_demo.align import SIZE, warp
from kdhooks_demo.faces import Faces

CHUNK = 256


@dataclass(frozen=True)
class Range:
    """The largest changes of a random view, in either direction."""

    angle: float  # radians
    zoom: float
    shift: float  # pixels
    light: float  # the change of contrast, and of brightness as a share of half its range


MILD = Range(math.radians(10), 0.1, 4.0, 0.25)
STRONG = Range(math.radians(15), 0.15, 7.0, 0.35)


View: TypeAlias = Callable[[Tensor, np.random.Generator], Tensor]
"""(n 3 112 112), generator -> (n 3 112 112), both uint8."""


def views(faces: Faces, count: int, seed: int) -> Faces:
    """(n) -> (n count): each face, its mirror image, then random views of both in turn."""
    kinds = [plain, plain, *[mild] * count]
    return viewed(faces, [(kinds[number], number % 2 == 1) for number in range(count)], seed)


def viewed(faces: Faces, kinds: Sequence[tuple[View, bool]], seed: int) -> Faces:
    """(n) -> (n v): the views of each face one after another; a person keeps their name.

    kinds: the views, and whether each one is of the mirror image.
    """
    generator = np.random.default_rng(seed)
    made = [
        kind(faces.images.flip(-1) if mirrored else faces.images, generator)
        for kind, mirrored in kinds
    ]
    names = tuple(f"{name}#{number}" for name in faces.names for number in range(len(kinds)))
    return Faces(torch.stack(made, dim=1).flatten(0, 1), names)


def plain(images: Tensor, generator: np.random.Generator) -> Tensor:
    """The unchanged images."""
    return images


def mild(images: Tensor, generator: np.random.Generator) -> Tensor:
    """The images rotated, scaled, shifted and lit a little."""
    return random_view(images, generator, MILD)


def blends(faces: Faces, couples: int, seed: int) -> tuple[Faces, NDArray[np.str_]]:
    """New people: for each of the couples, random views of the means of two people's images.

    Each image of one person is paired with another image of the other, while there are any left.
    Also returns the couple of each image, (m 2).
    """
    generator = np.random.default_rng(seed)
    people = np.unique(faces.people)
    drawn = _couples(len(people), couples, generator)
    rows = {person: np.flatnonzero(faces.people == person) for person in people[np.unique(drawn)]}
    images, names, blended = [], [], []
    for one, other in people[drawn]:
        ours, theirs = generator.permutation(rows[one]), generator.permutation(rows[other])
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            images.append((faces.images[a].float() + faces.images[b].float()) / 2)
            names.append(f"{one}+{other}/{number}")
            blended.append((one, other))
    of = np.array(blended, dtype=people.dtype).reshape(-1, 2)
    if not images:
        return Faces(faces.images[:0], ()), of
    mean = torch.stack(images)
    mirrored = torch.from_numpy(generator.random(len(mean)) < 0.5)
    mean = torch.where(mirrored[:, None, None, None], mean.flip(-1), mean)
    return Faces(random_view(mean, generator, MILD), tuple(names)), of


def together(faces: Faces, others: Faces) -> Faces:
    return Faces(torch.cat([faces.images, others.images]), faces.names + others.names)


def _couples(people: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """(<=count 2), each couple once."""
    if people <= 100:
        every = np.array(list(combinations(range(people), 2)), dtype=np.int64)
        return generator.permutation(every)[:count]
    drawn = np.sort(generator.integers(people, size=(4 * count, 2)), axis=1)
    drawn = np.unique(drawn[drawn[:, 0] < drawn[:, 1]], axis=0)
    return generator.permutation(drawn)[:count]


def random_view(images: Tensor, generator: np.random.Generator, most: Range) -> Tensor:
    """(n 3 h w) -> (n 3 112 112) uint8: each image rotated, scaled, shifted and lit at random."""
    count = len(images)
    back = torch.from_numpy(_random_similarities(count, generator, most)).float()
    drawn = generator.uniform(-most.light, most.light, (2, count, 1, 1, 1))
    light = torch.from_numpy(drawn).float()
    made = []
    for some, where, (contrast, shift) in zip(
        images.split(CHUNK), back.split(CHUNK), light.split(CHUNK, dim=1), strict=True
    ):
        turned = warp(some.float(), where)
        lit = (turned - 127.5) * (1 + contrast) + 127.5 * (1 + shift)
        made.append(lit.clamp(0, 255).round().to(torch.uint8))
    return torch.cat(made)


def _random_similarities(
    count: int, generator: np.random.Generator, most: Range
) -> NDArray[np.float64]:
    """(n 2 3): maps from pixels of the view to pixels of the face, around the centre."""
    angle = generator.uniform(-most.angle, most.angle, count)
    zoom = 1 + generator.uniform(-most.zoom, most.zoom, count)
    shift = generator.uniform(-most.shift, most.shift, (count, 2))
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1)
    linear = (zoom[:, None] * turn).reshape(count, 2, 2)
    centre = np.full(2, (SIZE - 1) / 2)
    offset = centre + shift - linear @ centre
    return np.concatenate([linear, offset[:, :, None]], axis=2)
