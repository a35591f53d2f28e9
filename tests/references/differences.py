"""Gradients without autograd."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def central_differences(loss: Callable[[Matrix], float], x: Matrix, step: float = 1e-5) -> Matrix:
    """(…) -> (…): (L(x + h) - L(x - h)) / 2h, one coordinate at a time."""
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        out[place] = (loss(up) - loss(down)) / (2 * step)
    return out
