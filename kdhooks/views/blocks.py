"""Faces with the artifacts of strong JPEG compression."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.options import Options, option

_SIDE = 8
# Annex K of ITU-T T.81, row by row.
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, *[99] * 38,
)  # fmt: skip


class Blocks(Options, subject="student_view: blocks"):
    """Compression in blocks of 8x8 pixels."""

    numbers: ClassVar[int] = 2
    """Random numbers for each image: whether to apply the view, and the quality."""

    p: float = option(0.5, "The probability for each image.", least=0, most=1)
    quality: tuple[int, int] = option(
        (10, 50), "The lowest and the highest JPEG quality.", least=1, most=100
    )

    def check(self) -> None:
        if self.quality[0] > self.quality[1]:
            raise self.refused(
                "quality", f"must be the lowest and the highest; found {list(self.quality)}"
            )

    def module(self) -> nn.Module:
        return Compress(*self.quality)


class Compress(nn.Module):
    """Quantises the cosine transform of each block as JPEG does, with all colour samples kept."""

    tables: Tensor

    def __init__(self, least: int, greatest: int) -> None:
        super().__init__()
        self.least, self.greatest = least, greatest
        tables = torch.tensor([_LUMA, _CHROMA, _CHROMA]).reshape(3, _SIDE, _SIDE)
        # Integers, which stay exact if the module is converted to another precision.
        self.register_buffer("tables", tables, persistent=False)

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """(b 3 h w), (b 1) -> (b 3 h w)."""
        count = self.greatest - self.least + 1
        steps = self._steps(self.least + (draws[:, 0] * count).floor()).to(images.dtype)
        transform = _cosines(images)
        blocks = _split(_to_luma_and_chroma((images + 1) * 127.5) - 128)
        coefficients = transform @ blocks @ transform.mT
        kept = (coefficients / steps).round() * steps
        pixels = _to_rgb(_joined(transform.mT @ kept @ transform, images) + 128)
        return pixels / 127.5 - 1

    def _steps(self, quality: Tensor) -> Tensor:
        """(b) -> (b 3 1 1 8 8): the quantisation tables, scaled as libjpeg does."""
        scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
        scaled = (self.tables * scale[:, None, None, None] + 50).div(100).floor()
        steps: Tensor = scaled.clamp(1, 255)[:, :, None, None]
        return steps


def _cosines(like: Tensor) -> Tensor:
    """(8 8), orthonormal; row i is the cosine of frequency i."""
    place = torch.arange(_SIDE, dtype=like.dtype, device=like.device)
    cosines = torch.cos((2 * place + 1) * place[:, None] * (math.pi / (2 * _SIDE)))
    squares: Tensor = (2 - (place == 0).to(like.dtype)) / _SIDE  # of the rows' scales
    return cosines * squares.sqrt()[:, None]


def _split(images: Tensor) -> Tensor:
    """(b 3 h w) -> (b 3 rows columns 8 8); the last rows and columns are repeated if needed."""
    h, w = images.shape[2:]
    padded = F.pad(images, (0, -w % _SIDE, 0, -h % _SIDE), mode="replicate")
    blocks: Tensor = padded.unflatten(3, (-1, _SIDE)).unflatten(2, (-1, _SIDE))
    return blocks.transpose(3, 4)


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_split`, cut to the size of `like`."""
    h, w = like.shape[2:]
    return blocks.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :h, :w]


def _to_luma_and_chroma(pixels: Tensor) -> Tensor:
    """RGB -> YCbCr as JFIF defines it, (b 3 h w) in 0..255."""
    red, green, blue = pixels.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luma, (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128], dim=1)


def _to_rgb(pixels: Tensor) -> Tensor:
    """The inverse of `_to_luma_and_chroma`, clamped to 0..255."""
    luma, of_blue, of_red = pixels.unbind(1)
    blue = luma + 1.772 * (of_blue - 128)
    red = luma + 1.402 * (of_red - 128)
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack([red, green, blue], dim=1).clamp(0, 255)
