"""Faces of few pixels, resampled to the student's input size."""

from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.options import Options, option

Down: TypeAlias = Literal["area", "bilinear", "bicubic"]
Up: TypeAlias = Literal["bilinear", "bicubic", "nearest"]


class LowResolution(Options, subject="student_view: low_resolution"):
    """Fewer pixels, then the input size again."""

    numbers: ClassVar[int] = 2
    """Random numbers for each image: whether, and which size."""

    sizes: tuple[int, ...] = option(
        (14, 28), "The shorter side of the small image; one is drawn for each image.", least=1,
        unit="pixels",
    )  # fmt: skip
    p: float = option(1.0, "The probability for each image.", least=0, most=1)
    down: Down = option(
        "area", "How it is made smaller; area is the mean over each region, the others antialias."
    )
    up: Up = option("bilinear", "How it is brought back to the input size.")

    def check(self) -> None:
        if not self.sizes:
            raise self.refused("sizes", "must be a list of at least one; found []")

    def module(self) -> nn.Module:
        return Resample(self.sizes, self.down, self.up)


class Resample(nn.Module):
    """Resampling is linear and separable: one matrix for the rows, and one for the columns."""

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
        """(n l l), one for each size: torch's own resampling of the unit vectors."""
        unit = torch.eye(length, dtype=like.dtype, device=like.device)[None, None]
        smooth = self.up != "nearest"
        found = []
        for size in self.sizes:
            small = max(1, round(length * size / shorter))
            few = F.interpolate(
                unit, (small, length), mode=self.down, antialias=self.down != "area"
            )
            found.append(
                F.interpolate(
                    few, (length, length), mode=self.up, align_corners=False if smooth else None
                )[0, 0]
            )
        return torch.stack(found)
