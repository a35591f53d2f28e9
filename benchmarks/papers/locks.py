"""Locks of several commands that use one folder; a command that is killed releases its locks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file or folder, and yield whether it was free.

    wait: wait until it is free.
    """
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            yield False
            return
        print(f"waiting for another command, which holds '{lock.lock_file}'", flush=True)
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the files whose lock is free: the command that created them was killed."""
    for path in folder.glob(pattern):
        with locked(path, wait=False) as free:
            if free:
                path.unlink(missing_ok=True)
