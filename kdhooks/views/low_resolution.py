"""Faces with few pixels, resampled to the student's input size."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.options import Options, option

Down: TypeAlias = Literal["area", "bilinear", "bicubic"]
Up: TypeAlias = Literal["bilinear", "bicubic", "nearest"]


class LowResolution(Options, subject="student_view: low_resolution"):
    """Images with fewer pixels, resampled to the input size again."""

    numbers: ClassVar[int] = 2
    """Random numbers for each image: whether to apply the view, and the size."""

    sizes: tuple[int, ...] = option(
        (14, 28), "The shorter side of the small image; one is drawn for each image.", least=1,
        unit="pixels",
    )  # fmt: skip
    p: float = option(1.0, "The probability for each image.", least=0, most=1)
    down: Down = option(
        "area",
        "How the image is made smaller; area is the mean over each region, with fractions of "
        "pixels at its edges; bilinear and bicubic antialias.",
    )
    up: Up = option("bilinear", "How the image is resampled to the input size again.")

    rules: ClassVar[Mapping[str, Any]] = {"allOf": [{"properties": {"sizes": {"minItems": 1}}}]}

    def check(self) -> None:
        if not self.sizes:
            raise self.refused("sizes", "must be a list of at least one; found []")

    def module(self) -> nn.Module:
        return Resample(self.sizes, self.down, self.up)


class Resample(nn.Module):
    """Resamples each image by one matrix for the rows and one for the columns."""

    def __init__(self, sizes: tuple[int, ...], down: Down, up: Up) -> None:
        super().__init__()
        self.sizes, self.down, self.up = sizes, down, up

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """(b 3 h w), (b 1) -> (b 3 h w)."""
        h, w = images.shape[2:]
        if max(self.sizes) > min(h, w):
            raise KDHooksError(
                "student_view: low_resolution.sizes must be at most the shorter side of the "
                f"images, {min(h, w)} pixels; found {max(self.sizes)}; leave it out, or set "
                "input_shape to the shape of the training images"
            )
        which = (draws[:, 0] * len(self.sizes)).long()
        rows = self._matrices(h, min(h, w), images)
        columns = rows if w == h else self._matrices(w, min(h, w), images)
        rows, columns = rows[which, None], columns[which, None]
        changed = rows @ images @ columns.mT
        overshoots = "bicubic" in (self.down, self.up)
        return changed.clamp(-1, 1) if overshoots else changed

    def _matrices(self, length: int, shorter: int, like: Tensor) -> Tensor:
        """(n l l): for each size, the matrix that samples down to it and up again.

        It is found by resampling the identity matrix.
        """
        # Torch's "nearest" takes the pixel to the upper left, which shifts the face.
        mode, smooth = ("nearest-exact", None) if self.up == "nearest" else (self.up, False)
        found = []
        for size in self.sizes:
            few = self._smaller(length, max(1, round(length * size / shorter)), like)
            found.append(
                F.interpolate(few[None, None], (length, length), mode=mode, align_corners=smooth)
            )
        return torch.cat(found).squeeze(1)

    def _smaller(self, length: int, small: int, like: Tensor) -> Tensor:
        """(s l): row i holds the weights of the pixels for small pixel i; each sums to 1."""
        if self.down == "area":  # with fractions of pixels; torch's "area" takes whole ones
            edges = torch.arange(small + 1, device=like.device)[:, None] * length
            pixels = torch.arange(length, device=like.device) * small
            ends = torch.minimum(edges[1:], pixels + small)
            starts = torch.maximum(edges[:-1], pixels)
            return (ends - starts).clamp(min=0).to(like.dtype) / length
        unit = torch.eye(length, dtype=like.dtype, device=like.device)[None, None]
        return F.interpolate(unit, (small, length), mode=self.down, antialias=True)[0, 0]
