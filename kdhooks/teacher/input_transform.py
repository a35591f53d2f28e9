"""Converts the trainer's images to the images that the teacher expects."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.pixel_range import check_pixels


@dataclass(frozen=True)
class InputTransform:
    """Converts the trainer's images to the images that the teacher expects.

    The trainer's images are RGB, (pixel - 127.5) / 127.5. The teacher's have their channels in
    `order`, the size `size` (height, width), and the scale (pixel - mean) / std with pixels in
    0..255. mean and std are one number each, or one for each of the channels, in that order.
    """

    size: tuple[int, int] | None = None
    order: str = "rgb"
    mean: float | Sequence[float] = 127.5
    std: float | Sequence[float] = 127.5

    def __post_init__(self) -> None:
        if self.size is not None and not _is_size(self.size):
            raise KDHooksError(f"teacher input: size must be height and width; found {self.size!r}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, channels(getattr(self, name), f"teacher input: {name}"))
        if self.order not in ("rgb", "bgr"):
            raise KDHooksError(f"teacher input: order must be 'rgb' or 'bgr'; found '{self.order}'")
        if min(_three(self.std)) <= 0:
            raise KDHooksError(f"teacher input: std must be positive; found {self.std}")
        if min(_three(self.std)) < 1:
            raise KDHooksError(
                "teacher input: mean and std must be those of pixels in 0..255, and std at least "
                f"1; found mean {self.mean}, std {self.std}; if they are those of pixels in 0..1, "
                "multiply them by 255"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b 3 h w)."""
        if self.size is not None and tuple(images.shape[-2:]) != tuple(self.size):
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        if self.order == "bgr":
            images = images.flip(1)
        if (self.mean, self.std) == (127.5, 127.5):
            return images
        if isinstance(self.mean, int | float) and isinstance(self.std, int | float):
            return images * (127.5 / self.std) + (127.5 - self.mean) / self.std
        of_each = zip(images.unbind(dim=1), _three(self.mean), _three(self.std), strict=True)
        return torch.stack(
            [x * (127.5 / std) + (127.5 - mean) / std for x, mean, std in of_each], 1
        )


def check_input(transform: object, images: Tensor, who: str) -> None:
    """Check the range of the images (b 3 h w) if an `InputTransform` converts them.

    The default one changes nothing, so student and teacher may then share any other scale.
    """
    if isinstance(transform, InputTransform) and transform != InputTransform():
        check_pixels(
            images,
            f"{who}: images that its input transform converts",
            "scale the images, pass such images as teacher_images, or give Teacher a function of "
            "your own as transform",
        )


def channels(value: object, what: str) -> float | tuple[float, ...]:
    """Return a number, or a tuple of three; a list of one becomes that number."""
    given: Any = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    numbers: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    known = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    finite = known and all(abs(n) <= sys.float_info.max for n in numbers)  # not nan, nor 10**400
    if not finite or len(numbers) not in (1, 3):
        raise KDHooksError(f"{what} must be a number, or a list of three; found {value!r}")
    single: float = numbers[0]
    return single if len(numbers) == 1 else tuple(map(float, numbers))


def _three(value: float | Sequence[float]) -> Sequence[float]:
    return [value] * 3 if isinstance(value, int | float) else value


def _is_size(size: object) -> bool:
    if not isinstance(size, Sequence) or len(size) != 2:
        return False
    return all(type(n) is int and n > 0 for n in size)
