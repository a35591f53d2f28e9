"""The fixed training images of a table: each face in several views, drawn once with a seed.

The teacher's outputs of fixed views are computed once, and every student sees the same images.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks_demo.align import SIZE
from kdhooks_demo.faces import Faces
from kdhooks_demo.material import STRONG, View, mild, plain, random_view, viewed

GREY = 0.15  # share of the strong views that lose their colours
BLURRED = 0.12  # share of those sampled down to each of SMALL, and up again
SMALL = (28, 56)  # pixels
COVERED = 0.25  # share of those with a grey rectangle
SIDES = (16, 48)  # of that rectangle, in pixels


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


_VIEWS: dict[str, View] = {"plain": plain, "mirror": plain, "mild": mild, "strong": _strong}
KINDS = tuple(_VIEWS)


def drawn(faces: Faces, kinds: Sequence[str]) -> Faces:
    """(n) -> (n v): the views of each face one after another; a person keeps their name.

    kinds: of KINDS. A mild view is turned, scaled, shifted and lit; a strong one is so by more, and
    some are also grey, blurred or covered. Every second view, if random, is of the mirror image.
    """
    mirrored = [
        kind == "mirror" or (kind != "plain" and number % 2 == 1)
        for number, kind in enumerate(kinds)
    ]
    made = [(_VIEWS[kind], flag) for kind, flag in zip(kinds, mirrored, strict=True)]
    return viewed(faces, made, seed=0)
