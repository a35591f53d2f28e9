"""Faces out of focus."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdhooks.options import Options, option

_TEMPLATE = 112  # height and width in pixels of the face that sigma refers to


class Blur(Options, subject="student_view: blur"):
    """A Gaussian blur."""

    numbers: ClassVar[int] = 2
    """Random numbers for each image: whether to apply the view, and sigma."""

    p: float = option(0.5, "The probability for each image.", least=0, most=1)
    sigma: tuple[float, float] = option(
        (0.5, 2.0),
        "The smallest and the largest standard deviation, for a face of 112x112 pixels.",
        above=0,
        unit="pixels",
    )

    def check(self) -> None:
        if self.sigma[0] > self.sigma[1]:
            raise self.refused(
                "sigma", f"must be the smallest and the largest; found {list(self.sigma)}"
            )

    def module(self) -> nn.Module:
        return GaussianBlur(*self.sigma)


class GaussianBlur(nn.Module):
    """Blurs each image with its own standard deviation."""

    def __init__(self, least: float, greatest: float) -> None:
        super().__init__()
        self.least, self.greatest = least, greatest

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """(b 3 h w), (b 1) -> (b 3 h w)."""
        sigma = self.least + (self.greatest - self.least) * draws[:, 0].to(images.dtype)
        h, w = images.shape[2:]
        rows = _band(h, sigma * (h / _TEMPLATE))
        columns = rows if w == h else _band(w, sigma * (w / _TEMPLATE))
        return rows[:, None] @ images @ columns[:, None].mT


def _band(length: int, sigma: Tensor) -> Tensor:
    """(b) -> (b l l): row i holds the weights of the pixels for pixel i; each sums to 1."""
    place = torch.arange(length, dtype=sigma.dtype, device=sigma.device)
    distance = (place[:, None] - place) / sigma[:, None, None]
    return (distance.square() * -0.5).softmax(dim=2)
