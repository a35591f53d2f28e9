"""The files of the cache survive damage, a full disk and several writing processes."""

import errno
import gc
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kdhooks import KDHooksError, Teacher
from kdhooks.teacher import cache as cache_module
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.cache_files import Index, checksums
from kdhooks.teacher.session import TeacherSession
from tests.cache_samples import Counting, Log, counts, filled, started, stored, views
from tests.ranks import Results, here, on_two_ranks

# --- damage ----------------------------------------------------------------------------------


def part_of(folder: Path, suffix: str) -> Path:
    (path,) = folder.glob(f"*.{suffix}")
    return path


@pytest.mark.parametrize(
    ("suffix", "cut", "left"), [("keys", 1, 7), ("rows", 1, 7), ("rows", 30, 6)]
)
def test_a_truncated_tail_is_ignored(suffix: str, cut: int, left: int, tmp_path: Path) -> None:
    expected = filled(tmp_path)
    path = part_of(tmp_path, suffix)
    os.truncate(path, path.stat().st_size - cut)
    teacher = started(tmp_path)
    found = teacher(views(0, 8)).embedding
    assert teacher.cache is not None
    assert teacher.cache.hits == left
    assert_close(found, expected, rtol=2e-3, atol=2e-3)
    teacher.close()
    assert stored(tmp_path) == 8


@pytest.mark.parametrize("content", [b"\0" * 24, b"\x01\x02" * 12])
def test_a_damaged_row_is_embedded_again(content: bytes, tmp_path: Path) -> None:
    """After a power cut, a file may have its length but not its content."""
    expected = filled(tmp_path)
    path = part_of(tmp_path, "rows")
    with path.open("r+b") as file:
        file.seek(3 * 24)
        file.write(content)
    for hits in (7, 8):
        teacher = started(tmp_path)
        assert_close(teacher(views(0, 8)).embedding, expected, rtol=2e-3, atol=2e-3)
        assert teacher.cache is not None
        assert teacher.cache.hits == hits
        teacher.close()


WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from tests.cache_samples import Counting, started, views

def write(descriptor, content):
    calls.append(descriptor)
    if len(calls) == int(sys.argv[2]):
        real(descriptor, content[: len(content) // 2 + 1])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(descriptor, content)

calls = []
real, os.write = os.write, write
module = Counting()  # with the weights of the other process, to which rounding may differ
module.load_state_dict(torch.load(sys.argv[3]))
teacher = started(Path(sys.argv[1]), module)
for start in range(0, 64, 8):
    teacher(views(start, start + 8))
"""


@pytest.mark.parametrize(("fatal", "kept"), [(1, 0), (5, 16), (6, 20)])
def test_kill_9_during_a_write_leaves_an_intact_cache(
    fatal: int, kept: int, tmp_path: Path
) -> None:
    """Each batch of 8 is two writes, rows and keys; half of the fatal write reaches the file."""
    torch.save(Counting().state_dict(), tmp_path / "teacher.pt")
    folder = tmp_path / "cache"
    given = [str(folder), str(fatal), str(tmp_path / "teacher.pt")]
    ended = subprocess.run([sys.executable, "-c", WRITER, *given], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert stored(folder) == kept
    teacher, plain = started(folder), TeacherSession(Teacher(Counting()))
    for start in range(0, 64, 8):
        wanted = plain(views(start, start + 8)).embedding.half().float()
        found = teacher(views(start, start + 8)).embedding
        assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    assert teacher.cache is not None
    assert teacher.cache.hits == kept
    teacher.close()
    assert stored(folder) == 64


# --- the end of a training ---------------------------------------------------------------------


LAST = """
import ctypes, os, sys
from pathlib import Path
from tests.cache_samples import started, views

teacher = started(Path(sys.argv[1]))
ctypes.pythonapi.Py_IncRef(ctypes.py_object(teacher))  # Python never destroys it
for start in (0, 8):
    teacher(views(start, start + 8))
if sys.argv[2] == "fork" and os.fork() == 0:
    sys.exit()  # a copy of the process must not write the rows a second time
if sys.argv[2] == "error":
    raise SystemExit("an error")
if sys.argv[2] == "fork":
    os.wait()
"""


@pytest.mark.parametrize("end", ["plain", "error", "fork"])
def test_the_last_batch_is_written_when_the_program_ends(end: str, tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", LAST, str(tmp_path), end], check=False)
    assert ended.returncode == (end == "error")
    assert stored(tmp_path) == 16


def test_the_last_batch_is_written_before_the_folder_is_opened_again(tmp_path: Path) -> None:
    teacher = started(tmp_path)
    teacher(views(0, 8))
    assert stored(tmp_path) == 0
    again = started(tmp_path)
    assert again.cache is not None
    assert again.cache.look_up(again.cache.keys(views(0, 8)))[0].all()


def test_the_last_batch_is_written_when_the_cache_is_no_longer_used(tmp_path: Path) -> None:
    teacher = started(tmp_path)
    teacher(views(0, 8))
    del teacher
    gc.collect()
    assert stored(tmp_path) == 8


# --- a full disk, and the bound --------------------------------------------------------------


def test_a_full_disk_is_reported_once_and_the_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    """The disk accepts half of a write, and then nothing."""
    expected = filled(tmp_path)
    teacher = started(tmp_path)
    written: list[int] = []

    def write(descriptor: int, content: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(real(descriptor, content[: len(content) // 2]))
        return written[0]

    real = os.write
    monkeypatch.setattr(os, "write", write)
    plain = TeacherSession(Teacher(Counting()))(views(8, 16)).embedding.half().float()
    for _ in range(3):
        assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
        assert_close(teacher(views(8, 16)).embedding, plain, rtol=0, atol=0)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "can't be written (No space left on device); its content is still used" in said
    assert str(tmp_path) in said
    monkeypatch.undo()
    teacher.close()
    assert stored(tmp_path) == 8
    assert_close(started(tmp_path)(views(0, 8)).embedding, expected, rtol=0, atol=0)


def test_a_complete_cache_may_be_in_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    expected = filled(tmp_path)

    def refuse(*arguments: object, **options: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    with started(tmp_path) as teacher:
        for _ in range(2):
            assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_write_in_several_parts_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda to, content: real(to, content[:7]))
    expected = filled(tmp_path)
    monkeypatch.undo()
    teacher = started(tmp_path)
    assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    assert teacher.cache is not None
    assert teacher.cache.hits == 8


def test_a_folder_without_room_for_a_header_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KDHooksError, match=r"can't be created \(No space left on device\); free"):
        started(tmp_path)


def test_a_full_cache_keeps_its_rows_and_adds_none(tmp_path: Path, caplog: Log) -> None:
    record = 24 + 12
    teacher = started(tmp_path, max_gb=15 * record / 1e9)
    for start in (0, 8, 16, 24):
        teacher(views(start, start + 8))
    teacher.close()
    assert stored(tmp_path) == 8  # a second batch would exceed the bound
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"{tmp_path} has reached max_gb = 5.4e-07; its content is still used" in said
    teacher = started(tmp_path, max_gb=15 * record / 1e9)
    assert teacher.cache is not None
    for start in (0, 16):
        teacher(views(start, start + 8))
    assert teacher.cache.hits == 8


def test_a_reserve_of_the_disk_is_left_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    expected = filled(tmp_path)
    monkeypatch.setattr("kdhooks.teacher.cache.RESERVE_GB", 1e9)
    teacher = started(tmp_path)
    for start in (0, 8, 16, 0):
        teacher(views(start, start + 8))
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        f"{tmp_path} is on a disk with less than 1000000000.0 GB free; its content is still used"
        in said
    )
    assert said.endswith("(8 of 16 views were found so far)")
    assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    teacher.close()
    assert stored(tmp_path) == 8


@pytest.mark.parametrize("bound", [0, -1, "20"])
def test_a_bound_must_be_positive(bound: Any) -> None:
    with pytest.raises(KDHooksError, match=rf"max_gb must be .*; found .?{bound}"):
        CacheOptions(path=Path("cache"), max_gb=bound)


# --- several ranks ---------------------------------------------------------------------------


def test_rows_of_another_process_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdhooks.teacher.cache.READ_ON_EVERY", 0.0)
    one, two = started(tmp_path), started(tmp_path)
    for start in (0, 8):
        expected = one(views(start, start + 8)).embedding
        one.cache.flush()  # type: ignore[union-attr]
        assert_close(two(views(start, start + 8)).embedding, expected, rtol=0, atol=0)
    assert two.cache is not None
    assert two.cache.hits == 16


def test_rows_of_other_processes_are_read_only_at_intervals(tmp_path: Path) -> None:
    one, two = started(tmp_path), started(tmp_path)
    one(views(0, 8))
    one.close()
    two(views(0, 8))
    assert two.cache is not None
    assert two.cache.hits == 0


def scenarios() -> dict[str, Results]:
    """Each rank sees its half of the views, and in a second epoch the other half."""
    cache_module.READ_ON_EVERY = 0.0
    teacher = started(Path(os.environ["CACHE_OF_RANKS"]))
    rank, _ = here()
    halves = [views(0, 8), views(8, 16)]
    first = teacher(halves[rank]).embedding
    assert teacher.cache is not None
    teacher.cache.flush()
    torch.distributed.barrier()
    second = teacher(halves[1 - rank]).embedding
    counts(teacher)
    third = teacher(torch.cat(halves)).embedding
    results = {"first": first, "second": second, "third": third}
    return {"": {**results, "hits": teacher.cache.hits, "calls": counts(teacher)}}


def test_two_ranks_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_OF_RANKS", str(tmp_path / "cache"))
    zero, one = (found[""] for found in on_two_ranks(scenarios, tmp_path))
    assert_close(zero["second"], one["first"], rtol=0, atol=0)
    assert_close(one["second"], zero["first"], rtol=0, atol=0)
    assert_close(zero["third"], one["third"], rtol=0, atol=0)
    assert zero["hits"] == one["hits"] == 8 + 16
    assert zero["calls"] == one["calls"] == []
    assert len(list((tmp_path / "cache").glob("*.keys"))) == 2
    assert stored(tmp_path / "cache") == 16


# --- the index -------------------------------------------------------------------------------


def test_the_index_is_a_dict_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdhooks.teacher.cache_files._RECENT", 50)
    generator = np.random.default_rng(0)
    index, expected = Index(), dict[int, int]()
    for size in [*generator.integers(0, 40, 40), 200, 3]:
        keys = generator.integers(-(2**62), 2**62, size) // 2**53  # small numbers, which repeat
        places = generator.integers(0, 2**62, size)
        index.add(keys, places)
        expected.update(zip(keys.tolist(), places.tolist(), strict=True))
        asked = np.concatenate([keys, np.arange(-520, 520)])
        assert index.find(asked).tolist() == [expected.get(key, -1) for key in asked.tolist()]


def test_a_checksum_covers_key_and_row() -> None:
    rows = np.ones((2, 4), np.float16)
    keys = np.array([1, 2])
    one, two = checksums(keys, rows)
    assert one != two
    rows[0, 3] = 2
    assert checksums(keys, rows)[0] != one
