"""The fixed images of a table: each face in several views, drawn once by a seed.

The teacher's outputs of fixed views are computed once, and every student sees the same images.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks_demo.align import SIZE
from kdhooks_demo.faces import Faces
from kdhooks_demo.material import MILD, STRONG, random_view

KINDS = ("plain", "mirror", "mild", "strong")
GREY = 0.15  # share of the strong views that lose their colours
BLURRED = 0.12  # of those that are sampled down to each of SMALL, and up again
SMALL = (28, 56)  # pixels
COVERED = 0.25  # of those with a rectangle of one grey
SIDES = (16, 48)  # of that rectangle, in pixels


def drawn(faces: Faces, kinds: tuple[str, ...], seed: int = 0) -> Faces:
    """(n) -> (n v): the views of each face one after another; a person keeps their name.

    kinds: of KINDS. A mild view is turned, scaled, shifted and lit; a strong one is so by more, and
    some are also grey, blurred or covered. Every second random view is of the mirror image.
    """
    generator = np.random.default_rng(seed)
    made = []
    for number, kind in enumerate(kinds):
        source = faces.images.flip(-1) if kind == "mirror" or number % 2 else faces.images
        if kind == "mild":
            source = random_view(source, generator, MILD)
        elif kind == "strong":
            source = _strong(source, generator)
        made.append(source)
    names = tuple(f"{name}#{number}" for name in faces.names for number in range(len(kinds)))
    return Faces(torch.stack(made, dim=1).flatten(0, 1), names)


def _strong(images: Tensor, generator: np.random.Generator) -> Tensor:
    """(n 3 112 112) -> (n 3 112 112) uint8."""
    made = random_view(images, generator, STRONG)
    grey = torch.from_numpy(generator.random(len(made)) < GREY)
    made[grey] = made[grey].float().mean(dim=1, keepdim=True).round().to(torch.uint8)
    for size in SMALL:
        blurred = torch.from_numpy(generator.random(len(made)) < BLURRED)
        made[blurred] = _sampled(made[blurred], size)
    for number in np.flatnonzero(generator.random(len(made)) < COVERED):
        high, wide = generator.integers(*SIDES, 2)
        top, left = generator.integers(0, SIZE - high), generator.integers(0, SIZE - wide)
        made[number, :, top : top + high, left : left + wide] = int(generator.integers(256))
    return made


def _sampled(images: Tensor, size: int) -> Tensor:
    """(n 3 h w) -> (n 3 h w): down to size x size, and up again."""
    if not len(images):
        return images
    small = F.interpolate(images.float(), size, mode="area")
    return F.interpolate(small, SIZE, mode="bilinear").round().clamp(0, 255).to(torch.uint8)
