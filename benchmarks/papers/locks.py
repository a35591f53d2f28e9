"""Locks of several commands that use one folder; a command that is killed releases its locks."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of this name, and yield whether it was free.

    wait: wait until it is free. The file is removed when the lock is released.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _lock(file, path, wait)
            if free and not _is_file(path, file):
                continue  # the process that held the lock removed the file: it locks nothing
            try:
                yield free
            finally:
                if free:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(file)


def _lock(file: int, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        print(f"waiting for another command, which holds '{path}'", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return True


def _is_file(path: Path, file: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the files whose lock is free: the command that created them was killed."""
    for path in folder.glob(pattern):
        with locked(lock_of(path), wait=False) as free:
            if free:
                path.unlink(missing_ok=True)


def lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
