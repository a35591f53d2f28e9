"""The command `python -m benchmarks.gpu`: every part at a tiny size, and what it survives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from benchmarks.gpu.__main__ import PARTS, main

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--tiny"]
ODD = {"odd": "tests.odd_part", "even": "tests.even_part"}


def record(out: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{part}.json").read_text())["cases"]
    return found


def statuses(out: Path, part: str) -> dict[str, str]:
    return {case: entry["status"] for case, entry in record(out, part).items()}


def test_the_parts_are_listed_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(PARTS)
    assert [*PARTS][:2] == ["tests", "trainer"]
    assert [*PARTS][-1] == "faces"


@pytest.mark.slow
def test_every_part_runs_at_a_tiny_size_and_writes_its_record(tmp_path: Path) -> None:
    parts = {
        part: module for part, module in PARTS.items() if part != "faces"
    }  # test_benchmarks.py
    assert main([*TINY, "--out", str(tmp_path)], parts) == 0
    for part in parts:
        found = statuses(tmp_path, part)
        assert found, part
        assert set(found.values()) <= {"done", "absent"}, part
    assert {"done"} == {*statuses(tmp_path, "trainer").values()}
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"\n## {part}\n" in page for part in parts)
    assert "| trainer | weight 0 of 21 methods is the plain run bit for bit | 0 of " in page


def odd(out: Path, *options: str) -> int:
    """Two parts: of the first, a case fails, one kills its process, and one is absent."""
    return main([*TINY, "--out", str(out), *options], ODD)


def test_a_case_that_fails_is_recorded_and_does_not_stop_the_others(tmp_path: Path) -> None:
    assert odd(tmp_path) == 1
    assert statuses(tmp_path, "odd") == {
        "good": "done",
        "failing": "failed",
        "half": "failed",
        "crashing": "failed",
        "absent": "absent",
        "last": "done",
    }
    failed = record(tmp_path, "odd")
    assert "ZeroDivisionError: division by zero" in failed["failing"]["traceback"]
    assert "exit code -6" in failed["crashing"]["traceback"]
    assert failed["absent"]["reason"] == "no odd hardware"
    assert failed["half"]["result"] == {"pid": 0}
    assert statuses(tmp_path, "even") == {"only": "done"}
    page = (tmp_path / "gpu.md").read_text()
    assert "- **failing: failed**: `ZeroDivisionError: division by zero`" in page
    assert "- absent: absent: no odd hardware" in page
    assert "| good |\n| half |\n| last |" in page, "what has figures is shown"


def test_only_what_is_not_done_is_run_again(tmp_path: Path) -> None:
    odd(tmp_path)
    first = record(tmp_path, "odd")
    odd(tmp_path)
    second = record(tmp_path, "odd")
    assert second["good"] == first["good"]  # with the moment at which it was made
    assert second["failing"]["traceback"] == first["failing"]["traceback"]
    odd(tmp_path, "--again", "--parts", "even")
    assert record(tmp_path, "even")["only"]["result"] == {"runs": 2}


def test_a_result_is_kept_until_a_later_try_is_done(tmp_path: Path) -> None:
    odd(tmp_path, "--parts", "even")
    (tmp_path / "no more").touch()
    assert odd(tmp_path, "--parts", "even", "--again") == 1
    entry = record(tmp_path, "even")["only"]
    assert (entry["status"], entry["kept"]["result"]) == ("failed", {"runs": 1})
    page = (tmp_path / "gpu.md").read_text()
    assert "- **only: failed**" in page
    assert "| only | 1 |" in page


def test_cases_that_were_not_reached_are_named(tmp_path: Path) -> None:
    odd(tmp_path, "--parts", "odd", "--cases", "good", "last")
    page = (tmp_path / "gpu.md").read_text()
    assert "- not run: failing; half; crashing; absent\n" in page
    assert "- not run: only\n" in page


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cases": {"only": {}}}', '{"cases": 3'])
def test_a_broken_record_is_named_and_left_as_it_is(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "even.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        odd(tmp_path)
    assert "even.json' holds no results of this command, or not all" in capsys.readouterr().err
    assert (tmp_path / "even.json").read_text() == content


def test_a_case_that_needs_more_time_than_is_left_is_skipped(tmp_path: Path) -> None:
    assert odd(tmp_path, "--budget", "0.9", "--parts", "even") == 0
    entry = record(tmp_path, "even")["only"]
    assert entry["status"] == "skipped"
    assert entry["reason"].startswith("it needs 1 s, and ")
    assert "- only: skipped: it needs 1 s" in (tmp_path / "gpu.md").read_text()
    assert odd(tmp_path, "--parts", "even") == 0
    assert statuses(tmp_path, "even") == {"only": "done"}


def test_a_case_that_is_still_running_at_the_end_of_the_budget_is_stopped(tmp_path: Path) -> None:
    started = time.monotonic()
    main([*TINY, "--out", str(tmp_path), "--budget", "12"], {"slow": "tests.slow_part"})
    assert time.monotonic() - started < 40
    assert statuses(tmp_path, "slow") == {"quick": "done", "endless": "stopped"}


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_continues_and_leaves_nothing_running(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ended_by: signal.Signals
) -> None:
    folders = tmp_path_factory.mktemp("tmp")
    program = (
        "import sys; from benchmarks.gpu.__main__ import main; "
        "sys.exit(main(sys.argv[1:], {'slow': 'tests.slow_part'}))"
    )
    command = [sys.executable, "-c", program, *TINY, "--out", str(tmp_path)]
    running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(folders)})
    pid = tmp_path / "endless.pid"
    deadline = time.monotonic() + 60
    while not pid.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "another run writes to" in second.stderr
    running.send_signal(ended_by)
    running.wait()
    before = "running"
    if ended_by == signal.SIGTERM:
        assert running.returncode == 130
        assert not [path for path in folders.iterdir() if path.name.startswith("kdhooks-gpu-")]
    assert statuses(tmp_path, "slow") == {"quick": "done", "endless": before}
    made = record(tmp_path, "slow")["quick"]["made"]
    while alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(pid.read_text()))
    (tmp_path / "not endless").touch()
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert statuses(tmp_path, "slow") == {"quick": "done", "endless": "done"}
    assert record(tmp_path, "slow")["quick"]["made"] == made


def alive(process: int) -> bool:
    """Zombies, which nobody waits for here, are dead."""
    try:
        return " Z" not in Path(f"/proc/{process}/stat").read_text()[:40]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "needs a CUDA device, and torch finds none"),
        (["--device", "foo"], "--device: must be cpu or cuda; found 'foo'"),
        (["--device", "mps"], "--device: must be cpu or cuda; found 'mps'"),
        (["--budget", "0"], "--budget must be a number of seconds above 0; found 0"),
        (["--budget", "inf"], "--budget must be a number of seconds above 0; found inf"),
        (["--cases", "wieght 0"], "no part has 'wieght 0'; did you mean 'weight 0'? the cases are"),
        (["--arcface-torch", "tests"], "'tests' holds no train_v2.py"),
        (["--faces", "nowhere.zip"], "--faces: there is no 'nowhere.zip'"),
        (["--parts", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_what_could_only_fail_later_is_refused(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main([*options, "--out", str(tmp_path)])
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_out_that_is_no_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        odd(Path("/dev/null"))
    assert "--out must be a writable folder; " in capsys.readouterr().err


def test_results_of_another_device_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "even.json").write_text('{"device": "cuda", "tiny": false, "cases": {}}')
    with pytest.raises(SystemExit, match="2"):
        odd(tmp_path)
    assert "holds results of another device or size" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["even.json"]
