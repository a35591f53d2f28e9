"""Inputs by formula, and the results of the equations on them, computed once in numpy (float64).

S, T (b d): student and teacher embeddings; W (c d): classifier rows; Y (b): labels.
S2, W2, Y2: the same for a well-trained student, with a different class for each sample.
"""

import numpy as np
import torch
from torch import Tensor


def _grid(rows: int) -> tuple[np.ndarray, np.ndarray]:
    i, j = np.meshgrid(np.arange(rows), np.arange(6), indexing="ij")
    return i.astype(np.float64), j.astype(np.float64)


_i, _j = _grid(4)
_c, _k = _grid(5)

S: Tensor = torch.from_numpy(np.sin(1 + 0.7 * _i + 0.3 * _j + 0.11 * _i * _j))
T: Tensor = torch.from_numpy(np.cos(0.5 + 0.9 * _i - 0.4 * _j + 0.07 * _i * _j))
W: Tensor = torch.from_numpy(np.sin(0.2 + 1.3 * _c - 0.6 * _k + 0.05 * _c * _k))
Y: Tensor = torch.tensor([0, 1, 0, 2])

S2: Tensor = torch.from_numpy(np.cos(0.3 + 0.9 * _i - 0.35 * _j + 0.09 * _i * _j))
W2: Tensor = torch.from_numpy(np.cos(0.45 + 0.9 * _i - 0.4 * _j + 0.05 * _i * _j))
Y2: Tensor = torch.tensor([0, 1, 2, 3])

EMBEDDING_DISTANCE = {
    "l2": 1.41835486,
    "mse": 0.23639248,
    "cosine": 0.70917743,
    "cosine_squared": 0.95226656,
}

PROXYLESSKD_ARCFACE = 69.19426608  # scale 64, m 0.5, no guard
PROXYLESSKD_ARCFACE_MONOTONE = 72.77909888
PROXYLESSKD_COSFACE = 76.45193808  # m 0.35
PROXYLESSKD_NO_MARGIN = 59.70019242
PROXYLESSKD_TRAINED_ARCFACE = 0.60151806  # S2, W2, Y2
PROXYLESSKD_TRAINED_COSFACE = 4.44615166

COUPLEFACE_NEIGHBOURS = [[4, 1], [0, 2], [3, 1], [2, 4], [0, 3]]  # top 2, prototypes W
COUPLEFACE_RAD = {0.0: 0.33451015, 0.03: 0.34951015}  # by q; mean over (b k)
COUPLEFACE_TWO_SIDED = 0.44965662
