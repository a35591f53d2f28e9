"""benchmarks.papers.locks: several commands that use one folder."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("fcntl")  # POSIX

from benchmarks.papers.locks import lock_of, locked, remove_abandoned


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with locked(path) as free, locked(path, wait=False) as again:
        assert (free, again) == (True, False)
    assert not path.exists()
    with locked(path, wait=False) as free:
        assert free


def test_a_waiting_command_gets_the_lock_in_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everyone who waits finds that the file was removed, and must lock a new one."""
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with locked(tmp_path / "a.lock"):
                with guard:
                    inside += 1
                    most = max(most, inside)
                threading.Event().wait(0.0005)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == 1
    assert "waiting for another command, which holds '" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_command_is_free(tmp_path: Path) -> None:
    """It leaves its files, which are removed; those of a command that still runs are not."""
    killed, running = tmp_path / "course-1.pt", tmp_path / "course-2.pt"
    killed.touch()
    running.touch()
    code = "import os, sys; from pathlib import Path; from benchmarks.papers.locks import locked\n"
    code += "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    ended = subprocess.run([sys.executable, "-c", code, str(lock_of(killed))], check=False)
    assert ended.returncode == -9
    assert lock_of(killed).exists()
    with locked(lock_of(running)):
        remove_abandoned(tmp_path, "course-*.pt")
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "course-2.pt",
            "course-2.pt.lock",
        ]
