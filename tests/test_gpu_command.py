"""`python -m benchmarks.gpu` runs every part at a tiny size, and survives failures and kills."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from benchmarks.gpu.__main__ import PARTS, main

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--tiny"]
ODD = {"odd": "tests.odd_part", "even": "tests.even_part"}
SLOW = {"slow": "tests.slow_part"}


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


def page_in(folder: Path) -> str:
    """Return the report, without the spaces that align its tables."""
    return re.sub(" +", " ", (folder / "gpu.md").read_text())


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
    page = page_in(tmp_path)
    assert all(f"\n## {part}\n" in page for part in parts)
    assert "| trainer | weight 0 of 21 methods is the plain run bit for bit | 0 of " in page


def odd(out: Path, *options: str) -> int:
    """Run two parts; in the first, some cases fail, one crashes, and one is absent."""
    return main([*TINY, "--out", str(out), *options], ODD)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of both parts."""
    out = tmp_path_factory.mktemp("tried")
    assert odd(out) == 1
    return out


@pytest.fixture
def copied(tried: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder."""
    return Path(shutil.copytree(tried, tmp_path / "copied"))


def test_a_case_that_fails_is_recorded_and_does_not_stop_the_others(tried: Path) -> None:
    assert statuses(tried, "odd") == {
        "good": "done",
        "failing": "failed",
        "half": "failed",
        "crashing": "failed",
        "absent": "absent",
        "last": "done",
    }
    failed = record(tried, "odd")
    assert "ZeroDivisionError: division by zero" in failed["failing"]["traceback"]
    assert "exit code -6" in failed["crashing"]["traceback"]
    assert failed["absent"]["reason"] == "no odd hardware"
    assert failed["half"]["result"] == {"pid": 0}
    assert statuses(tried, "even") == {"only": "done"}
    page = (tried / "gpu.md").read_text()
    assert "- **failing: failed**: `ZeroDivisionError: division by zero`" in page
    assert "- absent: absent: no odd hardware" in page
    assert "| good |\n| half |\n| last |" in page, "cases with results are shown"


def test_only_unfinished_cases_are_run_again(copied: Path) -> None:
    first = record(copied, "odd")
    odd(copied)
    second = record(copied, "odd")
    assert second["good"] == first["good"]  # including its time
    assert second["failing"]["traceback"] == first["failing"]["traceback"]
    odd(copied, "--again", "--parts", "even")
    assert record(copied, "even")["only"]["result"] == {"runs": 2}


def test_a_result_is_kept_until_a_later_try_is_done(copied: Path) -> None:
    (copied / "no more").touch()
    assert odd(copied, "--parts", "even", "--again") == 1
    entry = record(copied, "even")["only"]
    assert (entry["status"], entry["kept"]["result"]) == ("failed", {"runs": 1})
    page = page_in(copied)
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
    main([*TINY, "--out", str(tmp_path), "--budget", "12"], SLOW)
    assert time.monotonic() - started < 40
    assert statuses(tmp_path, "slow") == {"quick": "done", "endless": "stopped"}


@pytest.fixture
def endless(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start a run in another process, and wait for its endless case. Also return its TMPDIR."""
    program = (
        "import sys; from benchmarks.gpu.__main__ import main; "
        "sys.exit(main(sys.argv[1:], {'slow': 'tests.slow_part'}))"
    )
    out, folders = tmp_path / "out", tmp_path_factory.mktemp("tmp")
    command = [sys.executable, "-c", program, *TINY, "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(folders)}) as running:
        try:
            _until(lambda: (out / "endless.pid").is_file())
            yield running, folders
        finally:
            running.kill()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def test_a_killed_run_continues_and_leaves_nothing_running(
    endless: tuple[subprocess.Popen[bytes], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    running, _ = endless
    out = tmp_path / "out"
    command = [*TINY, "--out", str(out)]
    with pytest.raises(SystemExit, match="2"):
        main(command, SLOW)
    assert "another run writes to" in capsys.readouterr().err
    running.kill()
    running.wait()
    assert statuses(out, "slow") == {"quick": "done", "endless": "running"}
    made = record(out, "slow")["quick"]["made"]
    _until(lambda: not alive(int((out / "endless.pid").read_text())))
    (out / "not endless").touch()
    assert main(command, SLOW) == 0
    assert statuses(out, "slow") == {"quick": "done", "endless": "done"}
    assert record(out, "slow")["quick"]["made"] == made


def test_a_terminated_run_removes_its_folder_and_leaves_nothing_running(
    endless: tuple[subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    running, folders = endless
    running.terminate()
    assert running.wait() == 130
    assert not [path for path in folders.iterdir() if path.name.startswith("kdhooks-gpu-")]
    assert statuses(tmp_path / "out", "slow") == {"quick": "done", "endless": "running"}
    _until(lambda: not alive(int((tmp_path / "out" / "endless.pid").read_text())))


def alive(process: int) -> bool:
    """Return whether the process runs; zombies do not count."""
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
def test_wrong_options_are_refused_before_the_run(
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


def test_an_out_that_is_not_a_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        odd(Path("/dev/null"))
    assert "--out must be a folder that can be written; " in capsys.readouterr().err


def test_results_of_another_device_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "even.json").write_text('{"device": "cuda", "tiny": false, "cases": {}}')
    with pytest.raises(SystemExit, match="2"):
        odd(tmp_path)
    assert "holds results of another device or size" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["even.json"]
