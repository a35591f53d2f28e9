"""benchmarks.papers.locks: several commands that use one folder."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.papers.locks import locked, remove_abandoned


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with locked(path) as free, locked(path, wait=False) as again:
        assert (free, again) == (True, False)
    with locked(path, wait=False) as free:
        assert free


def test_a_waiting_command_says_so_and_gets_the_lock_in_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = []

    def wait() -> None:
        with locked(tmp_path / "a"):
            order.append("second")

    waiting = threading.Thread(target=wait)
    with locked(tmp_path / "a"):
        waiting.start()
        waiting.join(timeout=0.5)
        order.append("first")
    waiting.join(timeout=60)
    assert order == ["first", "second"]
    assert "waiting for another command, which holds '" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process by a signal")
def test_the_files_of_a_killed_command_are_removed(tmp_path: Path) -> None:
    """Those of a command that still runs are not."""
    killed, running = tmp_path / "course-1.pt", tmp_path / "course-2.pt"
    killed.touch()
    running.touch()
    code = "import os, sys; from pathlib import Path; from benchmarks.papers.locks import locked\n"
    code += "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    ended = subprocess.run([sys.executable, "-c", code, str(killed)], check=False)
    assert ended.returncode == -9
    with locked(running):
        remove_abandoned(tmp_path, "course-*.pt")
        assert [path.name for path in tmp_path.glob("*.pt")] == ["course-2.pt"]
