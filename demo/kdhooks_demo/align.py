"""Similarity transforms of images, among them the alignment to ArcFace's five points."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum
from numpy.typing import NDArray
from torch import Tensor

SIZE = 112

Points = NDArray[np.float64]

TEMPLATE: Points = np.array(  # insightface, utils/face_align.py: eyes, nose, corners of the mouth
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def similarity(source: Points, target: Points) -> Tensor:
    """(n 2), (n 2) -> (2 3): rotation, scale and shift from source to target, by least squares.

    In complex numbers it is the line z -> a z + b through the points.
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    centred = z - z.mean()
    a = np.vdot(centred, w - w.mean()) / np.vdot(centred, centred)
    return affine(a, w.mean() - a * z.mean())


def affine(a: complex, b: complex) -> Tensor:
    """(2 3): the map z -> a z + b on points x + iy."""
    rows = [[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]]
    return torch.tensor(rows, dtype=torch.float64)


def align(image: Tensor, landmarks: Points) -> Tensor:
    """(k h w) and its landmarks (5 2) in pixels -> (k 112 112), aligned to the template."""
    return warp(image[None], similarity(TEMPLATE, landmarks)[None])[0]


def warp(images: Tensor, back: Tensor) -> Tensor:
    """(b k h w), (b 2 3) -> (b k 112 112); `back` maps a pixel of the result to the image.

    A pixel's coordinates are those of its centre, as in OpenCV; past an edge, its last pixels.
    """
    height, width = images.shape[-2:]
    axis = torch.arange(SIZE, dtype=back.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    found = einsum(back, pixels, "b out xy1, h w xy1 -> b h w out")
    grid = (2 * found + 1) / torch.tensor([width, height]) - 1
    return F.grid_sample(images, grid.to(images), padding_mode="border", align_corners=False)
