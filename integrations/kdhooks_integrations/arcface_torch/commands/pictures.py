"""Every picture of a data set: a folder, a zip, or the trainer's own records."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks_integrations.arcface_torch.commands.recordio import MXIndexedRecordIO, imdecode, unpack

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp")


class Pictures:
    """Names in a fixed order, and the content of each."""

    def __init__(self, source: str) -> None:
        """A folder with pictures at any depth or with train.rec and train.idx, or a zip."""
        path = Path(source).expanduser()
        self.names, self._read = _opened(path)
        if not self.names:
            raise KDHooksError(
                f"--data must be a folder or a zip with pictures ({' '.join(_SUFFIXES)}), or a "
                f"folder with train.rec and train.idx; found none in '{path}'"
            )

    def batches(
        self, names: Sequence[str], size: int, shape: tuple[int, int, int]
    ) -> Iterator[Tensor]:
        """(b 3 h w) in [-1, 1], as the trainers make them of 8 bits, all of this shape."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(names), size):
                part = names[start : start + size]
                yield torch.stack(list(pool.map(lambda name: self._picture(name, shape), part)))

    def _picture(self, name: str, shape: tuple[int, int, int]) -> Tensor:
        pixels = torch.from_numpy(np.array(imdecode(self._read(name))))
        if tuple(pixels.shape) != (*shape[1:], shape[0]):
            raise KDHooksError(
                f"--data: pictures must have the size that the trainer gives the student, "
                f"{shape[1:]} (input_shape of the recipe); '{name}' has {tuple(pixels.shape[:2])}; "
                "align them first"
            )
        return (pixels.permute(2, 0, 1).float() - 127.5) / 127.5


def _opened(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    if (path / "train.rec").is_file() and (path / "train.idx").is_file():
        return _records(path)
    if path.is_dir():
        files = (file.relative_to(path).as_posix() for file in path.rglob("*"))
        return _chosen(files), lambda name: (path / name).read_bytes()
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        return _chosen(archive.namelist()), archive.read
    raise KDHooksError(f"--data must be a folder or a zip file; '{path}' is neither")


def _chosen(names: Iterator[str] | list[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(_SUFFIXES))


def _records(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    records = MXIndexedRecordIO(str(path / "train.idx"), str(path / "train.rec"), "r")
    header, _ = unpack(records.read_idx(records.keys[0]))
    keys = records.keys
    if not isinstance(header.label, float):  # the first record says where the images end
        keys = list(range(1, int(header.label[0])))
    return [str(key) for key in keys], lambda name: unpack(records.read_idx(int(name)))[1]
