"""Faces that wear a mask, placed by the template to which ArcFace aligns faces."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdhooks.options import Options, option

_SIDE = 112  # pixels of the template
_MIDDLE = 56.1  # x of the nose and of the middle of the mouth
_EDGE = 36.0  # pixels from the middle to the side of the face
_WIDEST = 70.0  # y at which a mask starts to taper towards the chin
_SHIFT = 2.0  # the largest shift of a mask, in pixels, in each direction

# In tenths of a pixel of the template: the upper edge at the middle and at the side of the face,
# the power of its curve (10 is straight, 20 a parabola), half the width, and the decrease of that
# from _WIDEST to the chin. With every shift, each mask covers the nose (56.0, 71.7) and the corners
# of the mouth (41.5, 92.4) and (70.7, 92.2), and stays below the eyes, which are at y = 51.6.
_SHAPES = (
    (630, 700, 20, 380, 120),  # surgical
    (580, 760, 10, 360, 160),  # pointed at the nose, a respirator
    (650, 620, 20, 420, 80),  # cloth that rises towards the ears
    (670, 670, 10, 600, 0),  # a scarf across the whole picture
)
_COLOURS = (  # RGB
    (150, 195, 215), (235, 235, 235), (30, 30, 32), (120, 120, 125), (35, 45, 90), (120, 165, 140),
    (165, 60, 60), (200, 175, 150),
)  # fmt: skip


class Mask(Options, subject="student_view: mask"):
    """A mask over nose, mouth and chin, of one of 4 shapes and 8 colours."""

    numbers: ClassVar[int] = 6
    """Random numbers for each image: whether to apply the view, shape, colour, brightness and two
    shifts."""

    p: float = option(0.5, "The probability for each image.", least=0, most=1)

    def module(self) -> nn.Module:
        return CoverLowerFace()


class CoverLowerFace(nn.Module):
    """Draws a mask over the lower face; the template is scaled to the size of the images."""

    shapes: Tensor
    colours: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Integers, which stay exact if the module is converted to another precision.
        self.register_buffer("shapes", torch.tensor(_SHAPES), persistent=False)
        self.register_buffer("colours", torch.tensor(_COLOURS), persistent=False)

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """(b 3 h w), (b 5) -> (b 3 h w)."""
        shape, colour, brightness, aside, lower = draws.to(images.dtype).unbind(1)
        x = _template_places(images.shape[3], images)[None, None, :]
        y = _template_places(images.shape[2], images)[None, :, None]
        x = x - _MIDDLE - _shift(aside)
        y = y - _shift(lower)
        chosen = self.shapes[(shape * len(_SHAPES)).long()].to(images.dtype) / 10
        middle, side, power, half, taper = chosen[:, :, None, None].unbind(1)
        out = x.abs() / _EDGE
        top = middle + (side - middle) * out**power
        width = half - taper * ((y - _WIDEST) / (_SIDE - _WIDEST)).clamp(min=0)
        # Distance from the outline, positive inside. The edge is blended over one pixel.
        inside = torch.minimum(y - top, width - x.abs())
        cover = (inside + 0.5).clamp(0, 1)[:, None]
        cloth = self.colours[(colour * len(_COLOURS)).long()].to(images.dtype)[:, :, None, None]
        light = (0.8 + 0.3 * brightness)[:, None, None] * (1 - 0.25 * out.clamp(max=1) ** 2)
        cloth = (cloth * light[:, None]).clamp(0, 255) / 127.5 - 1
        return torch.lerp(images, cloth, cover)


def _template_places(length: int, like: Tensor) -> Tensor:
    """(l): the centres of the pixels, in pixels of the template."""
    place = torch.arange(length, dtype=like.dtype, device=like.device)
    return (place + 0.5) * (_SIDE / length) - 0.5


def _shift(draws: Tensor) -> Tensor:
    """(b) in [0, 1) -> (b 1 1) pixels."""
    return ((draws * 2 - 1) * _SHIFT)[:, None, None]
