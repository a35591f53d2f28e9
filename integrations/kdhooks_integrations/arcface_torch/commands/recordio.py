"""What arcface_torch uses of mxnet: records of images, and pictures decoded."""

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
from kdhooks.picture_files import read_all, refuse, wrong_size
from kdhooks.pictures import Pixels, Unreadable, decode, read_size

_MAGIC = 0xCED7230A
_HEADER = struct.Struct("<IfQQ")
_ONE_MAKING = "the .rec and the .idx must be of one making"
_LOOKED_AT = 1000  # headers of pictures


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
        self.idx = _read_index(Path(idx_path))
        self.keys = list(self.idx)
        self.read_idx(max(self.keys, key=self.idx.__getitem__))  # missing if the file is cut short

    def read_idx(self, idx: int) -> bytes:
        """Return the record of a key, without the marks around it."""
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
                        f"'{self._path}' has no record where its index says, for key {idx}; "
                        f"{_ONE_MAKING}"
                    )
                part, length = word >> 29, word & (1 << 29) - 1
                parts.append(file.read(length))
                if len(parts[-1]) < length or part not in ((0, 1) if len(parts) == 1 else (2, 3)):
                    raise KDHooksError(
                        f"'{self._path}' is cut short or damaged in the record of key {idx}; "
                        "fetch it again"
                    )
                if part in (0, 3):  # whole, or the last; a record is cut where it has the magic
                    return struct.pack("<I", _MAGIC).join(parts)
                file.seek(-length % 4, 1)

    def _opened(self) -> IO[bytes]:
        try:
            return self._path.open("rb")
        except OSError as error:
            raise KDHooksError(f"'{self._path}' can't be opened ({error.strerror})") from error


def _read_index(path: Path) -> dict[int, int]:
    """The offset of each key, in the order of the file."""
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
        # In double precision: torch.tensor(…, dtype=torch.long) takes no numpy.float32 any more.
        labels = np.frombuffer(content, np.float32, flag).astype(np.float64)
    except (struct.error, ValueError) as error:
        raise KDHooksError(
            f"a record of {len(record)} bytes has no whole header ({error}); fetch the .rec again"
        ) from error
    return Header(flag, labels, number, second), content[4 * flag :]


class Records:
    """The pictures of train.rec, by key, with the interface of PictureFiles."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "train.rec"
        self._records = MXIndexedRecordIO(str(folder / "train.idx"), str(self.source), "r")
        header, _ = unpack(self._records.read_idx(0))
        keys = self._records.keys
        if header.flag:  # the first record says where the images end
            end = float(header.label[0])
            known = self._records.idx.keys()
            keys = list(range(1, int(end))) if 1 < end <= len(known) and end.is_integer() else []
            if not keys or not known >= set(keys):
                raise KDHooksError(
                    f"'{self.source}': its first record must say where the pictures end, and its "
                    f"index must have them all; found an end of {end:g} and {len(known)} keys; "
                    f"{_ONE_MAKING}"
                )
        self.names = [str(key) for key in keys]

    def pixels(self, name: str) -> Pixels:
        """Raises Unreadable if there are none. OpenCV, by which mxnet decodes, turns them too."""
        return decode(self._content(name)[1])

    def label(self, name: str) -> int:
        """The first number of several. Raises Unreadable if it is none of a class."""
        label = float(np.atleast_1d(self._content(name)[0].label)[0])
        if not label.is_integer() or label < 0:
            raise Unreadable(f"has the label {label:g}, where a class number from 0 is needed")
        return int(label)

    def check(self, names: Sequence[str], size: tuple[int, int]) -> None:
        """Some headers, spread over all, for a whole file of records is long to read."""

        def header(name: str) -> None:
            found = read_size(io.BytesIO(self._content(name)[1]))
            if sorted(found) != sorted(size):
                raise Unreadable(wrong_size(found, size))

        faults: dict[str, str] = {}
        some = names[:: -(-len(names) // _LOOKED_AT) or 1]
        for _ in read_all(some, header, faults):
            pass
        refuse("--data", self.source, faults, len(some))

    def _content(self, name: str) -> tuple[Header, bytes]:
        try:
            return unpack(self._records.read_idx(int(name)))
        except KDHooksError as error:
            raise Unreadable(f"is no record: {error}") from error


def imdecode(content: "bytes | Array[np.uint8]", *unused: object) -> NDArray:
    """-> (h w 3) RGB, 0..255."""
    try:
        return decode(bytes(content)).view(NDArray)
    except Unreadable as error:
        raise KDHooksError(f"records: a picture {error}") from error


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
