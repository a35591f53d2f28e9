"""A table of embeddings that replaces a teacher: one row for each sample of the data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdhooks.errors import KDHooksError, listed
from kdhooks.later import Sent
from kdhooks.tensor_files import first_bytes, named_tensors, read_tensors, user_path

_SUBJECT = "teacher.embeddings"
Matrix: TypeAlias = Tensor | NDArray[Any]


class EmbeddingTable:
    """Embeddings (n e): row i belongs to sample i of the training set.

    Pass it to `Teacher` as the model. Rows are read by the indices that the loop passes to
    `kd(images, labels, indices=…)`. The rows of a file that numpy or torch wrote stay on disk until
    then.
    """

    sha256 = None  # the table does not record which teacher computed it

    def __init__(self, source: Tensor | str | Path) -> None:
        """source: a tensor, or a file with one: .npy, .safetensors, or written by torch.save."""
        self._name = "the tensor given"
        if isinstance(source, Tensor):
            rows: Matrix = source.detach().cpu()
        else:
            path = user_path(source, _SUBJECT)
            self._name = f"'{path}'"
            rows = _read(path)
        self._take, floating = _reader(rows)
        if rows.ndim != 2 or not floating or 0 in rows.shape:
            raise KDHooksError(
                f"{_SUBJECT}: a table must be a floating point matrix (n e), one row for each "
                f"sample; {self._name} has shape {tuple(rows.shape)} and dtype {rows.dtype}"
            )
        self.length: int = rows.shape[0]
        self.dim: int = rows.shape[1]

    def check_shape(self, images: tuple[int, ...]) -> None:
        """Accept images of any shape (3, h, w), since the table does not use them."""

    def __call__(self, images: Tensor, indices: object = None) -> Tensor:
        """(b 3 h w), (b) -> (b e), on the device of the images, in float32 at least."""
        numbers = self._checked(indices, len(images))
        rows = self._take(numbers)
        if images.device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(images.device, non_blocking=True)
        return rows if rows.dtype == torch.float64 else rows.float()

    def _checked(self, indices: object, b: int) -> Tensor:
        """Check the indices, and return them as (b) on the host."""
        if not isinstance(indices, Tensor):
            raise KDHooksError(
                f"{_SUBJECT}: {self._name} is a table by the index of each sample, so indices must "
                f"be a tensor (b); found {type(indices).__name__}; call kd(images, labels, "
                "indices=…), or use a folder filled by kdhooks cache build, which needs no indices"
            )
        if indices.ndim == 2 and indices.shape[1] == 1:
            indices = indices[:, 0]
        whole = not (indices.is_floating_point() or indices.dtype == torch.bool)
        if indices.shape != (b,) or not whole:
            raise KDHooksError(
                f"indices must be whole numbers (b), one for each of {b} images; found shape "
                f"{tuple(indices.shape)} and dtype {indices.dtype}"
            )
        numbers = (Sent(indices).get() if indices.is_cuda else indices.cpu()).long()
        wrong = [n for n in numbers.tolist() if not 0 <= n < self.length]
        if wrong:
            raise KDHooksError(
                f"indices must be from 0 to {self.length - 1}, the rows of {self._name}; found "
                f"{listed(map(str, wrong[:8]))}; the table must have one row for each sample of "
                "the training set"
            )
        return numbers


def _reader(rows: Matrix) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Return a function from indices (b) to copies of rows, and whether the rows are floats."""
    if isinstance(rows, Tensor):
        return rows.__getitem__, rows.is_floating_point()
    array = rows
    return lambda numbers: torch.from_numpy(array[numbers.numpy()]), array.dtype.kind == "f"


def _read(path: Path) -> Matrix:
    """Return the only matrix in a file, mapped into memory."""
    if first_bytes(path, _SUBJECT).startswith(b"\x93NUMPY"):
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise KDHooksError(f"{_SUBJECT}: '{path}' can't be read ({error})") from error
        return array
    content = read_tensors(path, _SUBJECT, mmap=True)
    if isinstance(content, Tensor):
        return content
    found = dict(named_tensors(content))
    if len(found) != 1:
        raise KDHooksError(
            f"{_SUBJECT}: a table must be the only tensor in its file; found {len(found)} in "
            f"'{path}' ({listed(list(found)[:6])}); save only the table"
        )
    (tensor,) = found.values()
    return tensor
