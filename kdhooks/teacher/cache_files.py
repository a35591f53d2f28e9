"""The files of a teacher cache: a folder in which each process writes its own files.

`NAME.rows` holds embeddings (n e) in float16. `NAME.keys` holds the key of each embedding and a
checksum of both. Readers use the records that are complete in both files, and no process writes to
a file of another process or an earlier run. So if a process is killed, a disk is full or a host is
lost, only the records that were being written are lost. The ranks need no lock, whether they are on
one host or on several that share the folder.
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
_RECENT = 65536  # views that are added between two sorts of the index


class Part:
    """The two files that one process wrote, mapped into memory."""

    def __init__(self, keys: Path, dim: int) -> None:
        self._paths = keys, keys.with_suffix(".rows")
        self._keys: NDArray[Any] = np.empty(0, _KEY)
        self._rows: Embeddings = np.empty((0, dim), "<f2")

    def __len__(self) -> int:
        return len(self._keys)

    def read_on(self) -> Keys:
        """Map the records that were added since the last call, and return their keys."""
        known, dim = len(self), self._rows.shape[1]
        with _named(self._paths[0].parent):
            count = min(map(int, self.records()))
            if count > known:
                self._keys = np.memmap(self._paths[0], _KEY, "r", shape=(count,))
                self._rows = np.memmap(self._paths[1], "<f2", "r", shape=(count, dim))
        return np.array(self._keys["key"][known:], np.int64)

    def records(self) -> tuple[float, float]:
        """Return the numbers of keys and rows in the files, with fractions for incomplete ones."""
        keys, rows = (path.stat().st_size if path.exists() else 0 for path in self._paths)
        return keys / _KEY.itemsize, rows / (2 * self._rows.shape[1])

    def take(self, rows: NDArray[np.int64]) -> tuple[Embeddings, NDArray[np.bool_]]:
        """(n) -> (n e), and (n): whether the checksum of each is correct."""
        found, named = np.array(self._rows[rows]), self._keys[rows]
        return found, checksums(named["key"], found) == named["sum"]

    def append(self, keys: Keys, rows: Embeddings) -> None:
        """Write records. Raises OSError if the disk is full; earlier records stay readable."""
        named = np.empty(len(keys), _KEY)
        named["key"], named["sum"] = keys, checksums(keys, rows)
        _append(self._paths[1], np.ascontiguousarray(rows, "<f2").tobytes())
        _append(self._paths[0], named.tobytes())


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Name the file that cannot be read, or that no longer exists."""
    try:
        yield
    except OSError as error:
        raise KDHooksError(
            f"teacher cache: '{error.filename or folder}' can't be read ({error.strerror}); check "
            "its permissions, or remove the .rows and .keys files of this name: their views are "
            f"then embedded again; kdhooks cache verify {folder} checks all files"
        ) from error


def checksums(keys: Keys, rows: Embeddings) -> NDArray[np.uint32]:
    """(n), (n e) -> (n): CRC-32 of each row, with its key as the initial value."""
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
    """The numbered parts of a folder, and the part that this process writes."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self._numbers: dict[Path, int] = {}
        self._parts: list[Part] = []
        self._own = folder / f"{uuid.uuid4().hex}.keys"

    def __getitem__(self, number: int) -> Part:
        return self._parts[number]

    def read_on(self) -> Iterator[tuple[int, int, Keys]]:
        """Yield the new records of each part: its number, the first new row and the new keys.

        The oldest part comes first.
        """
        with _named(self.folder):
            paths = sorted(self.folder.glob("*.keys"), key=lambda path: path.stat().st_mtime)
        for path in paths:
            number = self._number(path)
            known = len(self[number])
            yield number, known, self[number].read_on()

    def incomplete(self) -> Iterator[tuple[str, bool]]:
        """Yield each fault in the lengths of the files, and whether it lost records."""
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
                yield f"{text}: the last write was interrupted, or is in progress", False

    def append(self, keys: Keys, rows: Embeddings) -> tuple[int, int, Keys]:
        """Write records to this process's own part, and return them like an item of `read_on`."""
        number = self._number(self._own)
        known = len(self[number])
        self[number].append(keys, rows)
        return number, known, self[number].read_on()

    def size(self, more: int = 0) -> int:
        """Return the bytes of the files of all processes, and of `more` records that may follow."""
        files = [*self.folder.glob("*.keys"), *self.folder.glob("*.rows")]
        return sum(path.stat().st_size for path in files) + more * (_KEY.itemsize + 2 * self.dim)

    def _number(self, path: Path) -> int:
        if path not in self._numbers:
            self._numbers[path] = len(self._parts)
            self._parts.append(Part(path, self.dim))
        return self._numbers[path]


class Index:
    """Finds the place of each key's row, in two sorted arrays and a dict of the newest keys."""

    def __init__(self) -> None:
        self._keys: Keys = np.empty(0, np.int64)
        self._places: NDArray[np.int64] = np.empty(0, np.int64)
        self._recent: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._keys) + len(self._recent)

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """(b) -> (b): the place of each key, or -1."""
        found = np.array([self._recent.get(key, -1) for key in keys.tolist()], np.int64)
        if len(self._keys):
            at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
            sorted_in = (self._keys[at] == keys) & (found < 0)
            found[sorted_in] = self._places[at[sorted_in]]
        return found

    def add(self, keys: Keys, places: NDArray[np.int64]) -> None:
        """Add keys; if one is already known, its new place replaces the old one."""
        if len(self._recent) + len(keys) <= _RECENT:
            self._recent.update(zip(keys.tolist(), places.tolist(), strict=True))
            return
        recent = [np.fromiter(part, np.int64) for part in (self._recent, self._recent.values())]
        self._keys, first = np.unique(
            np.concatenate([keys[::-1], recent[0], self._keys]), return_index=True
        )
        self._places = np.concatenate([places[::-1], recent[1], self._places])[first]
        self._recent.clear()
