"""The benchmarks: who is trained on, what is compared with what."""

import argparse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

import torch

from benchmarks import teacher_cache
from benchmarks.methods.material import MOST, chosen
from benchmarks.methods.report import added, table
from benchmarks.methods.rows import LABELS, ROWS, swept
from benchmarks.overhead.__main__ import Size, batch_of, check_gradient, measure
from benchmarks.overhead.parts import parts_of_a_step
from benchmarks.overhead.report import picture
from benchmarks.overhead.report import table as overhead_table
from benchmarks.overhead.ways import Pair, alone, by_hand, material
from kdhooks.demo.faces import Faces
from kdhooks.recipe import Recipe


def test_people_with_one_image_are_left_out_and_none_has_too_many() -> None:
    names = [f"alone/{0:03d}", *(f"many/{i:03d}" for i in range(30)), "two/0", "two/1"]
    kept = chosen(Faces(torch.zeros(len(names), 3, 2, 2, dtype=torch.uint8), tuple(names)))
    assert kept.names == (*names[1 : 1 + MOST], "two/0", "two/1")


def record(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "tar2": 0.5, "tar3": 0.1, "eer": 0.2, "cross": 0.5, "seconds": 3}


def test_rows_are_compared_with_labels_alone_of_the_same_seed() -> None:
    rows = {LABELS: {0: record(0.7), 1: record(0.8)}, "fcd": {1: record(0.85), 2: record(0.9)}}
    assert added(rows, "fcd", "accuracy") == [pytest.approx(0.05)]
    assert added(rows, LABELS, "accuracy") == []
    line = table(rows).splitlines()[-1]
    assert line.startswith("| fcd | 87.5 ± 3.5 |")
    assert "| 5.0 |" in line


def test_every_row_is_a_recipe() -> None:
    for row in [*ROWS, *swept()]:
        if row.methods:
            Recipe.read({"teacher": lambda images: images, "methods": list(row.methods)})
    names = [row.name for row in swept()]
    assert len(set(names)) == len(names)


def test_the_cached_step_of_the_benchmark_is_a_cached_one(tmp_path: Path) -> None:
    """Else `measure` raises; the student's ratio to itself is 1."""
    options = argparse.Namespace(
        student=2, teacher=4, batch_size=4, batches=2, turns=3, device="cpu"
    )
    measured = teacher_cache.measure(options, tmp_path / "cache")
    assert list(measured) == ["student", "uncached", "cached", "hash", "look_up", "terms"]
    assert measured["student"]["clock_ratio"] == {"median": 1.0, "quartiles": [1.0, 1.0]}
    assert (
        measured["hash"]["clock_seconds"]["median"]
        < measured["uncached"]["clock_seconds"]["median"]
    )


def test_the_overhead_of_every_way_at_hand_is_measured_and_drawn(tmp_path: Path) -> None:
    size = Size(2, 1, 16, 4)
    found = measure(size, 2, torch.device("cpu"))
    rows = found["rows"]
    assert {"student alone", "without hooks", "by hand", "kdhooks"} <= rows.keys()
    assert rows["without hooks"]["extra_python_calls"] == 0
    assert 0 < rows["by hand"]["extra_python_calls"] < rows["kdhooks"]["extra_python_calls"]
    assert rows["student alone"]["clock_of_student_alone"]["median"] == 1
    assert set(found["left_out"]) <= {"torchdistill", "modelopt"}
    picture([found], tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").stat().st_size > 0
    assert "| kdhooks |" in overhead_table(found)


def test_a_way_that_computes_another_gradient_is_noticed() -> None:
    models = material(2, 1, 16)
    pairs = [Pair(*models, torch.device("cpu")) for _ in range(2)]
    images, labels = batch_of(Size(2, 1, 16, 4), torch.device("cpu"))
    alone(pairs[0])(images, labels)
    by_hand(pairs[1])(images, labels)
    with pytest.raises(AssertionError, match="student computes another gradient"):
        check_gradient("student", pairs[0], pairs[1])


def test_the_parts_of_a_step_are_timed_and_traced(tmp_path: Path) -> None:
    models = material(2, 1, 16)
    batch = batch_of(Size(2, 1, 16, 4), torch.device("cpu"))
    pair = Pair(*models, torch.device("cpu"))
    found = parts_of_a_step(pair, *batch, tmp_path / "trace.json")
    assert found["ms"]["kdhooks"] > found["ms"]["kdhooks itself"] > 0
    assert found["floor_ms"]["teacher"] > 0
    assert (tmp_path / "trace.json").is_file()
