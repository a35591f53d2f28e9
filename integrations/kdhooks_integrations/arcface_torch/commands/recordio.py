"""What arcface_torch uses of mxnet: records of images, and pictures decoded."""

import io
import struct
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray as Array

from kdhooks.errors import KDHooksError

_MAGIC = 0xCED7230A
_HEADER = struct.Struct("<IfQQ")


class Header(NamedTuple):
    flag: int
    label: Any  # a number, or an array of flag numbers where flag is not 0
    id: int
    id2: int


class NDArray(np.ndarray[Any, Any]):
    def asnumpy(self) -> "Array[Any]":
        return np.asarray(self)


class MXIndexedRecordIO:
    """train.rec by the keys of train.idx, for reading; open only while it reads, so that the
    workers of a loader share it.
    """

    def __init__(self, idx_path: str, uri: str, flag: str) -> None:
        if flag != "r":
            raise KDHooksError(f"records can be read (flag 'r') without mxnet; found '{flag}'")
        self._path = Path(uri)
        rows = [line.split("\t") for line in Path(idx_path).read_text().splitlines() if line]
        self.idx = {int(row[0]): int(row[1]) for row in rows}
        self.keys = list(self.idx)

    def read_idx(self, idx: int) -> bytes:
        parts = []
        with self._path.open("rb") as file:
            file.seek(self.idx[int(idx)])
            while True:
                magic, word = struct.unpack("<II", file.read(8))
                if magic != _MAGIC:
                    raise KDHooksError(
                        f"'{self._path}' has no record where its index says, for key {idx}; the "
                        ".rec and the .idx must be of one making"
                    )
                part, length = word >> 29, word & (1 << 29) - 1
                parts.append(file.read(length))
                if part in (0, 3):  # whole, or the last; a record is cut where it has the magic
                    return struct.pack("<I", _MAGIC).join(parts)
                file.seek(-length % 4, 1)


def unpack(record: bytes) -> tuple[Header, bytes]:
    flag, label, number, second = _HEADER.unpack_from(record)
    content = record[_HEADER.size :]
    if flag == 0:
        return Header(flag, label, number, second), content
    # In double precision, since torch.tensor(…, dtype=torch.long) takes no numpy.float32 any more.
    labels = np.frombuffer(content, np.float32, flag).astype(np.float64)
    return Header(flag, labels, number, second), content[4 * flag :]


def imdecode(content: "bytes | Array[np.uint8]", *unused: object) -> NDArray:
    """-> (h w 3) RGB, 0..255."""
    try:
        pillow = import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise KDHooksError(
            "images can't be decoded without mxnet and without Pillow; pip install pillow"
        ) from error
    return np.array(pillow.open(io.BytesIO(bytes(content))).convert("RGB")).view(NDArray)


def transpose(data: NDArray, axes: Sequence[int]) -> NDArray:
    return np.ascontiguousarray(np.transpose(data, axes)).view(NDArray)


def flip(data: NDArray, axis: int) -> NDArray:
    return np.ascontiguousarray(np.flip(data, axis)).view(NDArray)


def stand_in_for_mxnet() -> None:
    """`import mxnet` gives these from now on; a half-imported one goes."""
    for name in [name for name in sys.modules if name.split(".")[0] == "mxnet"]:
        del sys.modules[name]
    root = _module("mxnet")
    arrays: dict[str, object] = {"NDArray": NDArray, "transpose": transpose, "flip": flip}
    parts: dict[str, dict[str, object]] = {
        "ndarray": arrays,
        "nd": arrays,
        "image": {"imdecode": imdecode},
        "recordio": {"MXIndexedRecordIO": MXIndexedRecordIO, "unpack": unpack},
    }
    for name, names in parts.items():
        setattr(root, name, _module(f"mxnet.{name}", **names))


def _module(name: str, **names: object) -> ModuleType:
    module = ModuleType(name)

    def absent(wanted: str) -> object:
        raise AttributeError(f"kdhooks' stand-in for mxnet has no {name}.{wanted}; install mxnet")

    vars(module).update(names, __getattr__=absent, __path__=[])
    sys.modules[name] = module
    return module
