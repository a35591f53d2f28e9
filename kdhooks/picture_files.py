"""The pictures of a folder or a zip file, sorted by name; all faults are reported together."""

import logging
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

from kdhooks.errors import KDHooksError
from kdhooks.pictures import Pixels, Unreadable, decode, read_size

# The suffixes that torchvision's ImageFolder accepts.
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_SHOWN = 5
_CHUNK = 4096  # files that are submitted to a thread pool at a time
_ENCRYPTED = 1  # a bit of a zip entry's flags
log = logging.getLogger("kdhooks")

Found = TypeVar("Found")


class PictureFiles:
    """The pictures of a source. Hidden files and files of other types are skipped and logged."""

    def __init__(self, source: str | Path, subject: str, turn: bool = True) -> None:
        """source: a folder, in which links are followed, or a zip file. subject: the start of each
        error. turn: as in `decode`.
        """
        if not str(source):
            raise KDHooksError(f"{subject} must be a folder or a zip file; found an empty name")
        self.source, self._subject = Path(os.path.expanduser(source)), subject
        self.names: list[str] = []
        self._turn = turn
        self._faults: dict[str, str] = {}
        self._skipped: list[str] = []
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._archive: zipfile.ZipFile | None = None
        if self.source.is_dir():
            self._list_folder()
        else:
            self._archive = self._opened_archive()
            self._list_archive(self._archive)
        self.names.sort()
        if not self.names:
            refuse(subject, self.source, self._faults, 0)
        if self._skipped:
            log.warning(
                "%s: skipped %d entries of '%s' that are not pictures: %s",
                subject,
                len(self._skipped),
                self.source,
                first(sorted(self._skipped)),
            )

    def check(self, names: Sequence[str], size: tuple[int, int]) -> None:
        """Raise an error if a picture's header is unusable, or states another width and height."""

        def header(name: str) -> tuple[int, int]:
            with self._open(name) as file:
                return read_size(file, self._turn)

        check_sizes(self._subject, self.source, names, header, size, self._faults)

    def pixels(self, name: str) -> Pixels:
        """Return the pixels of a picture; raise Unreadable if it cannot be decoded."""
        with self._open(name) as file:
            return decode(file.read(), self._turn)

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with self._opened(name) as file:
                yield file
        except (Unreadable, KDHooksError):
            raise
        except Exception as error:  # decompressing a damaged zip entry may raise anything
            reason = getattr(error, "strerror", None) or error
            raise Unreadable(f"can't be opened ({reason}); repair or remove it") from error

    def _opened(self, name: str) -> IO[bytes]:
        if self._archive:
            return self._archive.open(self._entries[name])
        path = self.source / name
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
            raise Unreadable("is not a regular file; remove it")
        return path.open("rb")

    def _list_folder(self) -> None:
        todo: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
        while todo:
            prefix, above = todo.pop()
            folder = self.source / prefix
            try:
                status = folder.stat()
                entries = list(os.scandir(folder))
            except OSError as error:
                self._faults[prefix or "."] = (
                    f"can't be listed ({error.strerror}); change its permissions"
                )
                continue
            here = (status.st_dev, status.st_ino)
            if here in above:
                self._faults[prefix] = "links to a folder that contains it; remove the link"
                continue
            for entry in entries:
                name = prefix + entry.name
                if _is_junk(entry.name):
                    self._skipped.append(name)
                elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    todo.append((f"{name}/", above | {here}))
                else:
                    self._take(name)

    def _opened_archive(self) -> zipfile.ZipFile:
        try:
            if stat.S_ISREG(self.source.stat().st_mode):
                return zipfile.ZipFile(self.source)
            found = "is neither"
        except FileNotFoundError:
            found = "does not exist"
        except OSError as error:
            found = f"can't be opened ({error.strerror})"
        except Exception as error:  # reading a damaged list of entries may raise anything
            found = f"can't be read as a zip file ({error})"
        raise KDHooksError(
            f"{self._subject} must be a folder or a zip file with pictures; '{self.source}' {found}"
        )

    def _list_archive(self, archive: zipfile.ZipFile) -> None:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        names = [str(PurePosixPath(entry.filename)) for entry in entries]  # without a leading ./
        counts = Counter(names)
        for name, entry in zip(names, entries, strict=True):
            parts = name.split("/")
            if ".." in parts or name.startswith("/") or "\\" in name:
                self._faults[name] = "leads out of the archive, or has \\ for /; create it again"
            elif any(map(_is_junk, parts)):
                self._skipped.append(name)
            elif counts[name] > 1:
                self._faults[name] = f"names {counts[name]} entries; rename or remove them"
            elif entry.flag_bits & _ENCRYPTED:
                self._faults[name] = "is encrypted; unpack the archive with its password"
            elif self._take(name):
                self._entries[name] = entry

    def _take(self, name: str) -> bool:
        taken = name.lower().endswith(SUFFIXES)
        (self.names if taken else self._skipped).append(name)
        return taken


def read_all(
    names: Sequence[str], read: Callable[[str], Found], faults: dict[str, str]
) -> Iterator[tuple[str, Found]]:
    """Yield each name and its content, in order, read by several threads; add errors to faults."""

    def tried(name: str) -> Found | Unreadable:
        try:
            return read(name)
        except Unreadable as error:
            return error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(names), _CHUNK):
            part = names[start : start + _CHUNK]
            for name, found in zip(part, pool.map(tried, part), strict=True):
                if isinstance(found, Unreadable):
                    faults[name] = str(found)
                else:
                    yield name, found


def check_sizes(
    subject: str,
    source: Path,
    names: Sequence[str],
    read: Callable[[str], tuple[int, int]],
    size: tuple[int, int],
    faults: Mapping[str, str] | None = None,
) -> None:
    """Raise one error for all pictures whose header is unusable, or states another size.

    read: returns the width and height of a picture. faults: those that are known already.
    """

    def header(name: str) -> None:
        found = read(name)
        # A picture may be stored rotated by 90 degrees; decoding turns it upright.
        if sorted(found) != sorted(size):
            raise Unreadable(wrong_size(found, size))

    every = dict(faults or {})
    for _ in read_all(names, header, every):
        pass
    refuse(subject, source, every, len(names))


def refuse(subject: str, source: Path, faults: Mapping[str, str], total: int) -> None:
    """Raise one error for all faults, if there are any."""
    if faults:
        texts = [f"'{name}' {fault}" for name, fault in sorted(faults.items())]
        raise KDHooksError(
            f"{subject}: every picture must be readable; found {len(faults)} faults among "
            f"{total} pictures of '{source}': {first(texts)}"
        )


def wrong_size(found: tuple[int, int], wanted: tuple[int, int]) -> str:
    """Describe a picture of the wrong size. found, wanted: width and height."""
    return (
        f"is {found[0]}x{found[1]} (width x height), but {wanted[0]}x{wanted[1]} is needed; "
        "align the face to that size, as insightface.utils.face_align.norm_crop does"
    )


def _is_junk(name: str) -> bool:
    """Whether an operating system left the file there; macOS's ._x.jpg looks like a picture."""
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def first(texts: Sequence[str]) -> str:
    """List the first few texts, and count the others."""
    left = len(texts) - _SHOWN
    return "; ".join(texts[:_SHOWN]) + (f"; and {left} more" if left > 0 else "")
