"""Several embedding spaces as one, in which a cosine is the mean of theirs."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.classes.rows import Rows
from kdhooks.errors import KDHooksError


def joined(parts: Sequence[Tensor]) -> Tensor:
    """[(n e_i)] -> (n Σ e_i): unit vectors side by side, times 1/√m for m parts.

    Vectors of zeros stay zero, and vectors that are not finite stay so.
    """
    return torch.cat([F.normalize(part) for part in parts], dim=1) / math.sqrt(len(parts))


class JoinedRows(Rows):
    """The class rows of several teachers, joined like their embeddings.

    Rows are joined when they are read, so that a rank reads only its own classes.
    """

    def __init__(self, of_each: Sequence[Rows]) -> None:
        self._of_each = tuple(of_each)
        self.backbone = {}
        self.total = self._of_each[0].total
        self.dim = sum(rows.dim for rows in self._of_each)
        for number, rows in enumerate(self._of_each):
            if rows.total != self.total:
                raise KDHooksError(
                    "teacher classifiers must have the same classes in the same order; found "
                    f"{self.total} classes of teacher 0 and {rows.total} of teacher {number}; make "
                    "class means of the training set with kdhooks.class_means for each of them"
                )

    def described(self) -> str:
        """Those of each teacher, since rounding in the joined rows depends on the processor."""
        return " and ".join(
            f"teacher {number}'s {rows.described()}" for number, rows in enumerate(self._of_each)
        )

    def slice(self, start: int, stop: int) -> Tensor:
        """(stop-start e) in float32, a copy."""
        return joined([rows.slice(start, stop) for rows in self._of_each])
