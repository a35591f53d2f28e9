"""The files of a teacher cache: a folder in which each process writes files of its own.

`NAME.rows` holds embeddings (n e) in float16; `NAME.keys` the key of each, with a checksum of both.
Readers take as many records as both files hold whole, and nobody writes into a file of another
process or an earlier run. So a kill in the middle, a full disk or a lost host costs the records
that were being written; and ranks need no lock, on one host or on several that share the folder.
"""

import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError

Keys: TypeAlias = NDArray[np.int64]  # (n)
Embeddings: TypeAlias = NDArray[np.float16]  # (n e)

_KEY = np.dtype([("key", "<i8"), ("sum", "<u4")])
_RECENT = 65536  # views between two sortings of the index


class Part:
    """What one process wrote, mapped into memory."""

    def __init__(self, keys: Path, dim: int) -> None:
        self._paths = keys, keys.with_suffix(".rows")
        self._keys: NDArray[Any] = np.empty(0, _KEY)
        self._rows: Embeddings = np.empty((0, dim), "<f2")

    def __len__(self) -> int:
        return len(self._keys)

    def read_on(self) -> Keys:
        """The keys that came since the last time."""
        known, dim = len(self), self._rows.shape[1]
        with _named(self._paths[0].parent):
            count = min(map(int, self.records()))
            if count > known:
                self._keys = np.memmap(self._paths[0], _KEY, "r", shape=(count,))
                self._rows = np.memmap(self._paths[1], "<f2", "r", shape=(count, dim))
        return np.array(self._keys["key"][known:], np.int64)

    def records(self) -> tuple[float, float]:
        """How many keys and how many rows the two files hold by now; a part of one counts too."""
        keys, rows = (path.stat().st_size if path.exists() else 0 for path in self._paths)
        return keys / _KEY.itemsize, rows / (2 * self._rows.shape[1])

    def take(self, rows: NDArray[np.int64]) -> tuple[Embeddings, NDArray[np.bool_]]:
        """(n) -> (n e), and (n): which of them are as they were written."""
        found, named = np.array(self._rows[rows]), self._keys[rows]
        return found, checksums(named["key"], found) == named["sum"]

    def append(self, keys: Keys, rows: Embeddings) -> None:
        """Raises OSError where the disk is full; what was whole before then stays readable."""
        named = np.empty(len(keys), _KEY)
        named["key"], named["sum"] = keys, checksums(keys, rows)
        _append(self._paths[1], np.ascontiguousarray(rows, "<f2").tobytes())
        _append(self._paths[0], named.tobytes())


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Name the file that can't be read, or that has vanished."""
    try:
        yield
    except OSError as error:
        raise KDHooksError(
            f"teacher cache: '{error.filename or folder}' can't be read ({error.strerror}); look "
            "at its permissions, or remove it and its .keys or .rows: its views are then embedded "
            f"again; kdhooks cache verify {folder} checks all files"
        ) from error


def checksums(keys: Keys, rows: Embeddings) -> NDArray[np.uint32]:
    """(n), (n e) -> (n): CRC-32 of each row, begun with its key."""
    pairs = zip(keys.tolist(), rows, strict=True)
    return np.array([zlib.crc32(row.data, key & 0xFFFFFFFF) for key, row in pairs], np.uint32)


def _append(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


class Parts:
    """All that lies in a folder, by number, and the part that this process writes."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self._numbers: dict[Path, int] = {}
        self._parts: list[Part] = []
        self._own = folder / f"{uuid.uuid4().hex}.keys"

    def __getitem__(self, number: int) -> Part:
        return self._parts[number]

    def read_on(self) -> Iterator[tuple[int, int, Keys]]:
        """What came since the last time: number of the part, first row, keys; oldest part first."""
        with _named(self.folder):
            paths = sorted(self.folder.glob("*.keys"), key=lambda path: path.stat().st_mtime)
        for path in paths:
            number = self._number(path)
            known = len(self[number])
            yield number, known, self[number].read_on()

    def incomplete(self) -> Iterator[tuple[str, bool]]:
        """What is wrong with the lengths of files, and whether records were lost by it."""
        for path in sorted({p.with_suffix(".keys") for p in self.folder.glob("*.rows")}):
            if not path.exists():
                yield f"{path.with_suffix('.rows').name} has no {path.name}", False
        for path, number in self._numbers.items():
            keys, rows = self[number].records()
            rows_name = path.with_suffix(".rows").name
            if int(rows) < int(keys):  # a row is written before its key
                yield f"{rows_name} is cut short: {rows:.10g} rows for {int(keys)} keys", True
            elif rows != keys:
                text = f"{path.name} has {keys:.10g} keys for {rows:.10g} rows"
                yield f"{text}: the last write was stopped, or goes on", False

    def append(self, keys: Keys, rows: Embeddings) -> tuple[int, int, Keys]:
        """As one item of `read_on`."""
        number = self._number(self._own)
        known = len(self[number])
        self[number].append(keys, rows)
        return number, known, self[number].read_on()

    def size(self, more: int = 0) -> int:
        """Bytes of all files by now, whoever wrote them, with so many records more."""
        files = [*self.folder.glob("*.keys"), *self.folder.glob("*.rows")]
        return sum(path.stat().st_size for path in files) + more * (_KEY.itemsize + 2 * self.dim)

    def _number(self, path: Path) -> int:
        if path not in self._numbers:
            self._numbers[path] = len(self._parts)
            self._parts.append(Part(path, self.dim))
        return self._numbers[path]


class Index:
    """Where each key's row lies: two sorted arrays, and a dict for what came since."""

    def __init__(self) -> None:
        self._keys: Keys = np.empty(0, np.int64)
        self._places: NDArray[np.int64] = np.empty(0, np.int64)
        self._recent: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._keys) + len(self._recent)

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """(b) -> (b), -1 where there is none."""
        found = np.array([self._recent.get(key, -1) for key in keys.tolist()], np.int64)
        if len(self._keys):
            at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
            sorted_in = (self._keys[at] == keys) & (found < 0)
            found[sorted_in] = self._places[at[sorted_in]]
        return found

    def add(self, keys: Keys, places: NDArray[np.int64]) -> None:
        """Of two places of a key the later one counts."""
        if len(self._recent) + len(keys) <= _RECENT:
            self._recent.update(zip(keys.tolist(), places.tolist(), strict=True))
            return
        recent = [np.fromiter(part, np.int64) for part in (self._recent, self._recent.values())]
        self._keys, first = np.unique(
            np.concatenate([keys[::-1], recent[0], self._keys]), return_index=True
        )
        self._places = np.concatenate([places[::-1], recent[1], self._places])[first]
        self._recent.clear()
