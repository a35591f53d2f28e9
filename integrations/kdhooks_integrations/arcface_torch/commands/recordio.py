"""Replaces the parts of mxnet that arcface_torch uses: records, and the decoding of pictures."""

import io
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray as Array

from kdhooks.errors import KDHooksError
from kdhooks.picture_files import check_sizes
from kdhooks.pictures import Pixels, Unreadable, decode, read_size

_MAGIC = 0xCED7230A
_HEADER = struct.Struct("<IfQQ")
_ONE_MAKING = "the .rec and the .idx must have been written together"
_LOOKED_AT = 1000  # the number of headers that are checked


class Header(NamedTuple):
    flag: int
    label: Any  # a number, or, if flag is not 0, an array of `flag` numbers
    id: int
    id2: int


class NDArray(np.ndarray[Any, Any]):
    def asnumpy(self) -> "Array[Any]":
        return np.asarray(self)


class MXIndexedRecordIO:
    """Reads train.rec by the keys of train.idx.

    The file is open only during a read, so the workers of a loader can share the object.
    """

    def __init__(self, idx_path: str, uri: str, flag: str) -> None:
        if flag != "r":
            raise KDHooksError(f"records can be read (flag 'r') without mxnet; found '{flag}'")
        self._path = Path(uri)
        self.idx = _read_index(Path(idx_path))
        self.keys = list(self.idx)
        self.read_idx(max(self.keys, key=self.idx.__getitem__))  # raises if the file is truncated

    def read_idx(self, idx: int) -> bytes:
        """Return the record of a key, without its framing."""
        if int(idx) not in self.idx:
            raise KDHooksError(f"'{self._path}': its index has no key {idx}; {_ONE_MAKING}")
        parts = []
        with self._opened() as file:
            file.seek(self.idx[int(idx)])
            while True:
                head = file.read(8)
                magic, word = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
                if magic != _MAGIC:
                    raise KDHooksError(
                        f"'{self._path}' has no record for key {idx} at the offset in its index; "
                        f"{_ONE_MAKING}"
                    )
                part, length = word >> 29, word & (1 << 29) - 1
                parts.append(file.read(length))
                if len(parts[-1]) < length or part not in ((0, 1) if len(parts) == 1 else (2, 3)):
                    raise KDHooksError(
                        f"'{self._path}' is truncated or damaged in the record of key {idx}; "
                        "fetch it again"
                    )
                # A record is split wherever it contains the magic number. 0 marks a complete
                # record, and 3 the last part of a split one.
                if part in (0, 3):
                    return struct.pack("<I", _MAGIC).join(parts)
                file.seek(-length % 4, 1)

    def _opened(self) -> IO[bytes]:
        try:
            return self._path.open("rb")
        except OSError as error:
            raise KDHooksError(f"'{self._path}' can't be opened ({error.strerror})") from error


def _read_index(path: Path) -> dict[int, int]:
    """Return the offset of each key, in the order of the file."""
    try:
        lines = [line for line in path.read_text(encoding="ascii").splitlines() if line]
        rows = [[int(number) for number in line.split("\t")] for line in lines]
        found = {key: offset for key, offset in rows if key >= 0 <= offset}
    except (OSError, ValueError) as error:
        raise KDHooksError(
            f"'{path}' must have a key, a tab and an offset in each line; found: {error}; "
            f"{_ONE_MAKING}"
        ) from error
    if not found or len(found) < len(lines):
        raise KDHooksError(
            f"'{path}' must list each key once, with an offset of at least 0; found {len(found)} "
            f"such keys in {len(lines)} lines; {_ONE_MAKING}"
        )
    return found


def unpack(record: bytes) -> tuple[Header, bytes]:
    try:
        flag, label, number, second = _HEADER.unpack_from(record)
        content = record[_HEADER.size :]
        if flag == 0:
            return Header(flag, label, number, second), content
        # float64, since torch.tensor(…, dtype=torch.long) no longer accepts numpy.float32.
        labels = np.frombuffer(content, np.float32, flag).astype(np.float64)
    except (struct.error, ValueError) as error:
        raise KDHooksError(
            f"a record of {len(record)} bytes has no complete header ({error}); fetch the .rec "
            "again"
        ) from error
    return Header(flag, labels, number, second), content[4 * flag :]


class Records:
    """The pictures of train.rec, named by their keys, with the interface of PictureFiles."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "train.rec"
        self._records = MXIndexedRecordIO(str(folder / "train.idx"), str(self.source), "r")
        header, _ = unpack(self._records.read_idx(0))
        keys = self._records.keys
        if header.flag:  # the first record holds the key at which the images end
            end = float(header.label[0])
            known = self._records.idx.keys()
            keys = list(range(1, int(end))) if 1 < end <= len(known) and end.is_integer() else []
            if not keys or not known >= set(keys):
                raise KDHooksError(
                    f"'{self.source}': its first record must hold the key at which the pictures "
                    f"end, and its index must have all keys before it; found the end {end:g} and "
                    f"{len(known)} keys; {_ONE_MAKING}"
                )
        self.names = [str(key) for key in keys]

    def pixels(self, name: str) -> Pixels:
        """Decode a picture, upright by its EXIF orientation as mxnet's OpenCV does.

        Raises Unreadable if there is no picture.
        """
        return decode(self._content(name)[1])

    def label(self, name: str) -> int:
        """Return the label, the first one of several; raise Unreadable if it is no class number."""
        label = float(np.atleast_1d(self._content(name)[0].label)[0])
        if not label.is_integer() or label < 0:
            raise Unreadable(f"has the label {label:g}, which must be a class number from 0")
        return int(label)

    def check(self, names: Sequence[str], size: tuple[int, int]) -> None:
        """Check some headers, spread over the whole file, which would take long to read."""

        def header(name: str) -> tuple[int, int]:
            return read_size(io.BytesIO(self._content(name)[1]))

        some = names[:: -(-len(names) // _LOOKED_AT) or 1]
        check_sizes("--data", self.source, some, header, size)

    def _content(self, name: str) -> tuple[Header, bytes]:
        try:
            return unpack(self._records.read_idx(int(name)))
        except KDHooksError as error:
            raise Unreadable(f"is no record: {error}") from error


def imdecode(content: "bytes | Array[np.uint8]", *unused: object) -> NDArray:
    """Decode a picture to (h w 3), RGB, 0..255."""
    try:
        return decode(bytes(content)).view(NDArray)
    except Unreadable as error:
        raise KDHooksError(f"records: a picture {error}") from error


def transpose(data: NDArray, axes: Sequence[int]) -> NDArray:
    return np.ascontiguousarray(np.transpose(data, axes)).view(NDArray)


def flip(data: NDArray, axis: int) -> NDArray:
    return np.ascontiguousarray(np.flip(data, axis)).view(NDArray)


def stand_in_for_mxnet() -> None:
    """Let `import mxnet` return these replacements, also after a failed import of mxnet."""
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
