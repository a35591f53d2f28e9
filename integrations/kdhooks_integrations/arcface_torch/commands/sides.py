"""Draws the teacher's images, and below them the student's."""

from pathlib import Path

import torch
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.pictures import encode

_MOST = 8  # images side by side


def write_sides(file: Path, given: Tensor, seen: Tensor) -> str:
    """Write a picture of both sides' images; return a sentence that says how much they differ.

    given, seen: (b 3 h w) in [-1, 1], the images of the teacher and of the student.
    """
    content = encode(_pixels(torch.cat([_in_a_row(given), _in_a_row(seen)], dim=1)).numpy())
    try:
        file.write_bytes(content)
    except OSError as error:
        raise KDHooksError(
            f"--picture '{file}' can't be written: {error.strerror}; name another file"
        ) from error
    levels = (seen.float() - given.float()).abs().mean((1, 2, 3)) * 127.5
    changed = int((levels > 0).sum())
    return (
        f"'{file}' shows the teacher's images above and the student's below; the view changes "
        f"{changed} of {len(given)} images, by {float(levels.mean()):.2g} of 255 levels on average"
    )


def _in_a_row(images: Tensor) -> Tensor:
    """(b 3 h w) -> (3 h l): the first images side by side."""
    return torch.cat(list(images[:_MOST].float().cpu()), dim=2)


def _pixels(image: Tensor) -> Tensor:
    """(3 h w) in [-1, 1] -> (h w 3) in 8 bits."""
    return (image * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
