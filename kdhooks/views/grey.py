"""Faces without colour."""

from typing import ClassVar

from torch import Tensor, nn

from kdhooks.options import Options, option


class Grey(Options, subject="student_view: grey"):
    """Images without colour."""

    numbers: ClassVar[int] = 1
    """Random numbers for each image: whether to apply the view."""

    p: float = option(0.2, "The probability for each image.", least=0, most=1)

    def module(self) -> nn.Module:
        return Desaturate()


class Desaturate(nn.Module):
    """Replaces each channel by the luma of ITU-R BT.601."""

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """(b 3 h w), (b 0) -> (b 3 h w)."""
        red, green, blue = images.unbind(1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        return luma[:, None].expand_as(images)
