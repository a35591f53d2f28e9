"""benchmarks.papers: its material, its runs and its tables."""

import re
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

import numpy as np
import torch
from torch.testing import assert_close

from benchmarks.papers import school
from benchmarks.papers.__main__ import _jobs, _parser, _setting, _teachers_images, main
from benchmarks.papers.locks import locked
from benchmarks.papers.made_up import write_faces, write_pairs, write_teacher
from benchmarks.papers.material import MOST, PLAIN, SEVERAL, Images, Outputs, chosen
from benchmarks.papers.report import (
    END,
    MAIN,
    START,
    added,
    by_row,
    cells,
    course_table,
    error,
    flatness,
    gap,
    needed,
    table,
    teaches,
    write,
)
from benchmarks.papers.results import differences, mend, read
from benchmarks.papers.rows import LABELS, TEACHER, swept
from benchmarks.papers.running import Course, in_processes, records, taught_by
from benchmarks.papers.settings import SETTINGS, SHORT
from benchmarks.papers.views import KINDS, drawn
from kdhooks.errors import KDHooksError
from kdhooks.recipe import Recipe
from kdhooks_demo.exam import Exam
from kdhooks_demo.faces import Faces
from kdhooks_demo.lesson import Lesson
from kdhooks_demo.material import views
from kdhooks_demo.training import Row, Settings, Training
from tests.demo_faces import made_faces


def test_people_with_one_image_are_left_out_and_others_are_limited() -> None:
    names = [f"alone/{0:03d}", *(f"many/{i:03d}" for i in range(30)), "two/0", "two/1"]
    faces = Faces(torch.zeros(len(names), 3, 2, 2, dtype=torch.uint8), tuple(names))
    kept = (*names[1 : 1 + MOST], "two/0", "two/1")
    assert chosen(faces, single=False).names == kept
    assert chosen(faces, single=True).names == (names[0], *kept)


def test_too_few_people_to_train_on_are_refused() -> None:
    faces = Faces(torch.zeros(3, 3, 112, 112, dtype=torch.uint8), ("one/0", "two/0", "two/1"))
    assert Images(("plain",)).views(faces).names
    with pytest.raises(KDHooksError, match="two people with several images must be in none of the"):
        Images(("plain",), single=False).views(faces)


def record(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "tar2": 0.5, "tar3": 0.1, "eer": 0.2, "cross": 0.5, "seconds": 3}


def test_a_row_is_compared_with_labels_alone_of_the_same_seed() -> None:
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
    """0.12 ± 0.061 over three seeds is too little; 0.1 ± 0.023 suffices."""
    assert error([0.04, 0.16]) == pytest.approx(0.06)
    assert not teaches([0.04, 0.08, 0.24])
    assert teaches([0.06, 0.1, 0.14])
    assert not teaches([0.5]), "one seed has no error"
    assert not teaches([0.50, 0.51]), "two seeds hardly have one"
    rows = {
        LABELS: tars([0.2, 0.2, 0.2]),
        "kd": tars([0.26, 0.3, 0.34]),
        "fcd": tars([0.24, 0.28, 0.44]),
    }
    assert cells(rows)[2][7] == "**+10.0 ± 2.3**"
    assert cells(rows)[3][7] == "+12.0 ± 6.1"


def test_the_gap_is_the_share_of_the_difference_between_labels_alone_and_teacher() -> None:
    rows = {TEACHER: tars([0.9]), LABELS: tars([0.4, 0.6]), "fcd": tars([0.6, 0.8])}
    assert gap(rows, "fcd") == pytest.approx(0.5)
    assert gap(rows, LABELS) is None
    assert gap({LABELS: rows[LABELS], "fcd": rows["fcd"]}, "fcd") is None
    assert cells(rows)[3][8] == "50"
    assert gap({**rows, TEACHER: tars([0.5])}, "fcd") is None, "there is no gap"


def test_gains_in_tar_are_larger_compared_with_their_errors_than_those_in_accuracy() -> None:
    """As docs/results/papers.md says; of all rows that teach, with five seeds."""
    found = read(Path(__file__).parents[1] / "docs" / "results" / "papers.jsonl")
    steady = []
    for setting in {str(one["setting"]) for one in found}:
        rows = by_row(one for one in found if one["setting"] == setting)
        for name in rows:
            accuracy, tar = (added(rows, name, key) for key in ("accuracy", MAIN))
            if len(tar) == 5 and teaches(tar):
                steady.append(np.mean(tar) / error(tar) > np.mean(accuracy) / error(accuracy))
    assert len(steady) >= 5
    assert all(steady)


def drawn_by(*curves: list[float]) -> dict[int, dict[str, Any]]:
    """Return records whose curves have a point after every 10 images."""
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
def test_needed_is_the_number_of_images_to_stay_above_labels_alone(
    found: list[float], images: int | None
) -> None:
    rows = {LABELS: drawn_by([0.1, 0.3, 0.5, 0.4, 0.5], [0.1, 0.3, 0.5, 0.8, 0.7])}
    rows["fcd"] = drawn_by(found, found)
    assert needed(rows, "fcd") == images
    assert f"| fcd | {images or 'not reached'} |  |  |" in course_table(rows)


def test_needed_compares_the_same_seeds() -> None:
    rows = {LABELS: drawn_by([0.1, 0.2], [0.8, 0.9]), "fcd": drawn_by([0.3, 0.3])}
    assert needed(rows, "fcd") == 10


def test_the_strength_is_shown_for_both_ends_of_the_curves() -> None:
    rows = {LABELS: drawn_by([0.1, 0.2]), "fcd": drawn_by([0.3, 0.3], [0.3, 0.3])}
    strengths = {0: [1.0, 0.5], 1: [3.0, 0.7]}
    for seed, found in strengths.items():
        for point, strength in zip(rows["fcd"][seed]["curve"], found, strict=True):
            point |= {"strength": strength, "agreement": 0.1 * strength}
    assert course_table(rows).splitlines()[-1] == "| fcd | 10 | 2.00 to 0.60 | 0.20 to 0.06 |"


def test_the_gain_of_labels_alone_in_the_last_fifth_is_reported() -> None:
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
    assert second.count("| fcd |") == 2, "one in the table, one in the table of needed images"
    assert (tmp_path / "papers-A.png").stat().st_size > 1000
    page.write_text("# By hand\n")
    write(records, results)
    assert page.read_text().startswith(f"# By hand\n\n{START}")


def test_the_tables_name_the_file_that_replaces_sface(tmp_path: Path) -> None:
    one = {**record(0.5), "row": TEACHER, "seed": 0, "images_seen": 50, "versions": "torch 2"}
    write([{**one, "setting": "A"}], tmp_path / "papers.jsonl")
    assert "replaces SFace" not in (tmp_path / "papers.md").read_text()
    write([{**one, "setting": "A", "teacher_file": "own.onnx"}], tmp_path / "papers.jsonl")
    assert "torch 2. `own.onnx` replaces SFace.\n" in (tmp_path / "papers.md").read_text()


def test_every_row_has_a_valid_recipe() -> None:
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


def test_views_do_not_depend_on_later_views() -> None:
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


def write_material(folder: Path) -> None:
    """Write made-up faces, pairs and a teacher."""
    write_faces(folder / "faces")
    write_pairs(folder / "pairs.txt")
    write_teacher(folder / "teacher.onnx")


def students(
    material: Path,
    out: Path,
    processes: int,
    images_seen: int = 40,
    rows: Sequence[str] = ("acsr", LABELS, "fcd"),
) -> list[dict[str, object]]:
    """Return the results of these rows on the made-up faces, without their seconds."""
    arguments = f"--images-seen {images_seen} --batch 20 --seeds 1 --device cpu".split()
    arguments += ["--setting", SHORT]
    arguments += ["--threads", f"{processes}"]
    arguments += ["--data", f"{material / 'faces'}", "--pairs", f"{material / 'pairs.txt'}"]
    arguments += ["--teacher", f"{material / 'teacher.onnx'}", "--work", f"{material / 'work'}"]
    arguments += ["--out", f"{out}", "--processes", f"{processes}", "--rows", *rows]
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
    """`students` omits TAR at FAR 0.001, which is nan on so few pairs."""
    write_material(tmp_path)
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
    (tmp_path / "other").mkdir()
    changed = (tmp_path / "killed" / "lfw.jsonl").read_text().replace("512.0", "8.0")
    (tmp_path / "other" / "lfw.jsonl").write_text(changed)
    with pytest.raises(SystemExit):
        students(tmp_path, tmp_path / "other", 1)
    weights = "{'name': 'fcd', 'weight': 8.0}] there, [{'name': 'fcd', 'weight': 512.0}] here)"
    assert weights in capsys.readouterr().err
    (tmp_path / "faces" / "p0" / "p0_0001.png").rename(tmp_path / "faces" / "p0" / "p0_0099.png")
    with pytest.raises(SystemExit):
        students(tmp_path, tmp_path / "killed", 1)
    assert "lfw.jsonl' holds results of other settings: data (" in capsys.readouterr().err


def interrupted_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Let trainings end with KeyboardInterrupt in place of this step."""
    calls = count(1)
    step = Training.step

    def stopped(training: Training, rows: torch.Tensor, compare: bool) -> dict[str, Any]:
        if next(calls) == number:
            raise KeyboardInterrupt
        return step(training, rows, compare)

    patch.setattr(Training, "step", stopped)


def unfinished(material: Path, number: int, images_seen: int, row: str) -> Path:
    """Train a student for the folder `two` until this step; return the file of its state."""
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(number, patch)
        with pytest.raises(KeyboardInterrupt):
            students(material, material / "two", 1, images_seen, [row])
    (state,) = (material / "work").glob("student-*.pt")
    return state


@pytest.mark.parametrize("row", ["icdface", "eckd", "adadistill"])
def test_an_interrupted_student_continues_near_the_step_where_it_ended(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bank, with parameters of its own, and with rows that follow the student."""
    write_material(tmp_path)
    alone = students(tmp_path, tmp_path / "alone", 1, images_seen=300, rows=[row])
    unfinished(tmp_path, 11, images_seen=300, row=row)
    steps = []
    step = Training.step

    def counted(self: Training, rows: torch.Tensor, compare: bool) -> dict[str, Any]:
        steps.append(rows)
        return step(self, rows, compare)

    monkeypatch.setattr(Training, "step", counted)
    assert students(tmp_path, tmp_path / "two", 1, images_seen=300, rows=[row]) == alone
    assert len(steps) == 6, "the state of step 9 of 15 was the last one"
    assert not list((tmp_path / "work").glob("student-*.pt"))


def damaged(path: Path, how: str) -> None:
    """Cut the file off, or replace it by a file of other tensors."""
    if how == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        torch.save({"weight": torch.zeros(2)}, path)


@pytest.mark.parametrize("how", ["cut off", "of other tensors"])
def test_a_student_with_a_damaged_state_starts_again(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_material(tmp_path)
    alone = students(tmp_path, tmp_path / "alone", 1, images_seen=100, rows=["fcd"])
    state = unfinished(tmp_path, 3, images_seen=100, row="fcd")
    damaged(state, how)
    assert students(tmp_path, tmp_path / "two", 1, images_seen=100, rows=["fcd"]) == alone
    assert f"'{state}' is not used; the training starts again" in capsys.readouterr().out


def test_a_student_that_another_command_trains_is_trained_without_its_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_material(tmp_path)
    alone = students(tmp_path, tmp_path / "alone", 1, images_seen=100, rows=["fcd"])
    state = unfinished(tmp_path, 3, images_seen=100, row="fcd")
    content = state.read_bytes()
    capsys.readouterr()
    with locked(state):
        assert students(tmp_path, tmp_path / "two", 1, images_seen=100, rows=["fcd"]) == alone
        assert state.read_bytes() == content
    assert "fcd 0: another command trains this student too" in capsys.readouterr().out


def test_the_files_of_killed_commands_are_removed(tmp_path: Path) -> None:
    write_material(tmp_path)
    (tmp_path / "work").mkdir()
    left = tmp_path / "work" / "course-1.pt"
    left.touch()
    students(tmp_path, tmp_path / "out", 2, images_seen=20, rows=["fcd"])
    assert not list((tmp_path / "work").glob("*.pt"))


def test_two_commands_record_a_teacher_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If both recorded, one would empty the files that the other already trains with."""
    write_teacher(tmp_path / "teacher.onnx")
    teacher = school._sface(str(tmp_path / "teacher.onnx"))
    images = torch.randint(256, (9, 3, 112, 112), dtype=torch.uint8)
    stages = {"maps7": SETTINGS["B"].recorded["maps7"]}
    recorded = []
    record = Outputs._record

    def counted(*arguments: Any) -> None:
        recorded.append(arguments)
        record(*arguments)

    monkeypatch.setattr(Outputs, "_record", counted)
    commands = [
        Thread(target=Outputs, args=(tmp_path, images, teacher, stages, torch.device("cpu")))
        for _ in range(2)
    ]
    for command in commands:
        command.start()
    for command in commands:
        command.join(timeout=60)
    assert len(recorded) == 1


def test_an_unfinished_student_is_not_continued_with_other_images_or_options() -> None:
    def file(course: Course, row: Row, seed: int) -> str:
        return course.unfinished(row, seed).name

    lesson = Lesson(torch.zeros(2, 3, 8, 8), torch.arange(2), torch.eye(2), torch.eye(2), {})
    course = Course(lesson, cast(Exam, None), Settings(), {"setting": "A"}, Path())
    row = Row("fcd", [{"name": "fcd", "weight": 1.0}])
    others = [
        (replace(course, lesson=replace(lesson, labels=torch.tensor([1, 0]))), row, 0),
        (replace(course, lesson=replace(lesson, embedding=2 * torch.eye(2))), row, 0),
        (replace(course, settings=Settings(batch=30)), row, 0),
        (replace(course, common={"setting": "B"}), row, 0),
        (replace(course, looks=5), row, 0),
        (course, replace(row, labels=0.1), 0),
        (course, Row("fcd", [{"name": "fcd", "weight": 2.0}]), 0),
        (course, row, 1),
    ]
    names = {file(course, row, 0), *(file(*other) for other in others)}
    assert len(names) == 1 + len(others)
    assert file(replace(course), replace(row), 0) == file(course, row, 0)


@pytest.mark.parametrize("name", ["D", "S"])
def test_a_teacher_sees_at_least_one_batch(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--setting {name} --data none --pairs none --out {tmp_path} --teacher-images 20"
    with pytest.raises(SystemExit):
        main(options.split())
    assert "--teacher-images must be at least a batch; found 20 and 60" in capsys.readouterr().err


def jobs(options: str) -> list[tuple[str, int]]:
    """Return the row and seed of each student that these options of setting A train."""
    parsed = _parser().parse_args(f"--setting A --data none --pairs none {options}".split())
    return [(row.name, seed) for row, seed in _jobs(_setting(_parser(), parsed), parsed)]


def test_a_sweep_trains_one_seed_unless_more_are_specified() -> None:
    sweep = "--rows fcd --sweep --factors 1 1 2 --seed 4"
    assert jobs(sweep) == [("fcd x 512", 4), ("fcd x 1024", 4)]
    assert jobs(f"{sweep} --seeds 2") == [
        *((f"fcd x {weight}", 4) for weight in (512, 1024)),
        *((f"fcd x {weight}", 5) for weight in (512, 1024)),
    ]
    assert jobs("--rows fcd eckd") == [
        *((row, seed) for seed in range(3) for row in ("fcd", "eckd")),
        ("eckd", 3),
        ("eckd", 4),
    ]


def test_results_name_the_images_of_the_teachers_that_are_trained() -> None:
    assert _teachers_images(SETTINGS["A"]) == {}
    assert _teachers_images(SETTINGS["D"]) == {"teacher_images": "150000"}
    assert _teachers_images(SETTINGS["S"]) == {"teacher_images": "150000"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "A"])  # A has SHORT's rows
def test_every_row_of_a_setting_trains_on_made_up_faces(name: str, tmp_path: Path) -> None:
    write_material(tmp_path)
    options = f"--setting {name} --images-seen 40 --batch 20 --seeds 1 --teacher-images 60"
    options += f" --device cpu --threads 1 --data {tmp_path / 'faces'} --work {tmp_path / 'work'}"
    options += f" --pairs {tmp_path / 'pairs.txt'} --teacher {tmp_path / 'teacher.onnx'}"
    try:
        main(f"{options} --out {tmp_path}".split())
    finally:
        torch.use_deterministic_algorithms(False)
    found = read(tmp_path / ("lfw.jsonl" if name == SHORT else "papers.jsonl"))
    assert [record["row"] for record in found] == [
        TEACHER,
        *(row.name for row in SETTINGS[name].rows),
    ]


def test_a_teacher_with_other_stages_is_refused_until_they_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_material(tmp_path)
    write_teacher(tmp_path / "teacher.onnx", ("shallow", "middle", "deep"))
    options = "--setting B --rows fitnet --images-seen 20 --batch 20 --seeds 1 --device cpu"
    options += f" --threads 1 --data {tmp_path / 'faces'} --pairs {tmp_path / 'pairs.txt'}"
    options += f" --teacher {tmp_path / 'teacher.onnx'} --work {tmp_path / 'work'}"
    options += f" --out {tmp_path}"
    with pytest.raises(SystemExit):
        main(options.split())
    assert "has no submodule 'conv_6_relu'" in (refusal := capsys.readouterr().err)
    assert "name 3 stages of this teacher with --teacher-stages" in refusal
    assert not list((tmp_path / "work").glob("*/*.npy")), "the teacher has not run"
    named = f"{options} --teacher-stages shallow middle deep"
    try:
        main(named.split())
    finally:
        torch.use_deterministic_algorithms(False)
    found = read(tmp_path / "papers.jsonl")
    assert [record["row"] for record in found] == [TEACHER, "fitnet"]
    with pytest.raises(SystemExit):
        main(named.replace("shallow middle", "middle shallow").split())
    assert "stages (shallow middle deep there" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["cut off", "of other tensors"])
def test_a_teacher_is_trained_once_and_loaded_afterwards(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the file of its weights is damaged, it is trained again."""
    write_material(tmp_path)
    options = "--setting D --rows teacher --teacher-images 120 --device cpu --threads 1 --data "
    options += f"{tmp_path / 'faces'} --pairs {tmp_path / 'pairs.txt'} --work {tmp_path / 'work'} "
    options += f"--teacher {tmp_path / 'teacher.onnx'} --out {tmp_path}"
    try:
        with monkeypatch.context() as patch:
            interrupted_at(2, patch)
            with pytest.raises(KeyboardInterrupt):
                main(f"{options}/one".split())
        (begun,) = (tmp_path / "work").glob("teacher-*.begun.pt")
        assert len(torch.load(begun, weights_only=True)["losses"]) == 1
        main(f"{options}/one".split())
        assert not begun.exists()
        (kept,) = (tmp_path / "work").glob("teacher-D-120-*.pt")
        weights = torch.load(kept, weights_only=True)
        damaged(kept, how)
        main(f"{options}/again".split())
        assert f"'{kept}' is not used; the teacher is trained again" in capsys.readouterr().out
        assert_close(torch.load(kept, weights_only=True), weights, rtol=0, atol=0)
        monkeypatch.setattr(school, "train", None)
        main(f"{options}/two".split())
        with pytest.raises(SystemExit):
            main(f"{options}/one --teacher-images 60".split())
        assert "teacher_images (120 there, 60 here)" in capsys.readouterr().err
    finally:
        torch.use_deterministic_algorithms(False)
    (one,), (two,) = (read(tmp_path / name / "papers.jsonl") for name in ("one", "two"))
    assert one["row"] == TEACHER
    assert one["tar2"] == two["tar2"]
    assert one["accuracy"] == two["accuracy"]
    assert len(list((tmp_path / "work").glob("teacher-D-120-*.pt"))) == 1


def test_a_setting_that_an_old_record_lacks_counts_as_equal() -> None:
    found = [{"row": "kd", "batch": 30}, {"row": "fcd", "batch": 60, "device": "cpu"}]
    assert differences(found, {"batch": 60, "device": "cuda"}) == [
        "batch (30 there, 60 here)",
        "device (cpu there, cuda here)",
    ]
    assert differences(found[:1], {"batch": 30, "device": "cuda"}) == []
    known = read(Path(__file__).parents[1] / "docs" / "results" / "lfw.jsonl")
    old = [record for record in known if "batch" not in record]
    assert old
    assert differences(old, {"batch": 60, "device": "cuda", "data": "0", "teacher": "0"}) == []


def test_an_incomplete_last_line_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "lfw.jsonl"
    mend(results)  # the file does not exist yet
    results.write_text('{"row": "kd", "seed": 0}\n')
    mend(results)
    assert capsys.readouterr().out == ""
    results.write_text('{"row": "kd", "seed": 0}\n{"row": "fc')
    assert read(results) == [{"row": "kd", "seed": 0}]
    mend(results)
    assert "lfw.jsonl: cut off an incomplete last line" in capsys.readouterr().out
    assert results.read_text() == '{"row": "kd", "seed": 0}\n'


def test_a_complete_last_line_is_kept(tmp_path: Path) -> None:
    """Some editors leave out its newline."""
    results = tmp_path / "lfw.jsonl"
    results.write_text('{"row": "kd", "seed": 0}')
    mend(results)
    assert read(results) == [{"row": "kd", "seed": 0}]


@pytest.mark.parametrize("line", ['{"row": "fc', "[1]", '{"row": "fcd"}'])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    results = tmp_path / "lfw.jsonl"
    results.write_text(f'{{"row": "kd", "seed": 0}}\n{line}\n{{"row": "at", "seed": 0}}\n')
    with pytest.raises(KDHooksError, match=r"lfw\.jsonl:2 must be a result.*delete the line"):
        read(results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rows labels nosuch", "--rows: there is no row 'labels'; did you mean 'labels alone'?"),
        ("--rows nosuch", "the rows are teacher, labels alone, fcd"),
        ("--sweep --rows proxylesskd", "there is no row 'proxylesskd'"),
        ("--rows", "--rows: expected at least one argument"),
        ("--factors 1 2.5", "--factors needs --sweep; found 1, 2.5; remove --factors"),
        ("--processes 0", "--processes: must be a whole number, at least 1; found 0"),
        ("--processes -1", "--processes: must be a whole number, at least 1; found -1"),
        ("--images-seen 0", "--images-seen: must be"),
        ("--batch 1", "--batch: must be a whole number, at least 2; found 1"),
        ("--work /dev/null/no", "--work must be a writable folder"),
        ("--seeds 0", "--seeds: must be"),
        ("--threads 0", "--threads: must be"),
        ("--images-seen 20", "--images-seen must be at least a batch; found 20 and 30"),
        (
            "--device foo",
            "--device: must be a device of this machine",
        ),
        (
            "--device meta",
            "--device: must be a device of this machine",
        ),
        ("--device cuda:99", "--device: must be a device of"),
        (
            "--teacher-stages a",
            "--teacher-stages: setting short records 2 stages of the teacher; found a",
        ),
        ("--setting A --teacher-stages a", "setting A records 0 stages"),
        (
            "--setting A --sweep --images-seen 100",
            "--images-seen must be at least a batch; found 100 and 120",
        ),
        (
            "--setting A --sweep --views mild strong",
            "--views: rows on plain views need one of plain, mirror; found mild, strong",
        ),
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


def test_the_tables_are_written_although_a_student_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_material(tmp_path)

    def failing(course: Course, row: Row, seed: int) -> dict[str, object]:
        raise ValueError("no")

    monkeypatch.setattr(Course, "record", failing)
    with pytest.raises(SystemExit, match="1 of 1 students failed: fcd 0: ValueError"):
        students(tmp_path, tmp_path / "out", 1, rows=["fcd"])
    page = (tmp_path / "out" / "lfw.md").read_text()
    assert "| teacher | " in page
    assert "`teacher.onnx` replaces SFace." in page


def test_a_sweep_refuses_results_on_other_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pairs that `digests` knows, those of the last folds, stay equal here."""
    write_material(tmp_path)
    file = tmp_path / "pairs.txt"
    _, *tested = file.read_text().splitlines(keepends=True)
    earlier = {"p6": "p2", "p7": "p3", "p8": "p4", "p9": "p5"}
    pairs = ["4\t6\n", *(re.sub(r"p\d", lambda p: earlier[p[0]], one) for one in tested), *tested]
    file.write_text("".join(pairs))

    def untrained(course: Course, row: Row, seed: int) -> dict[str, object]:
        return course.common | taught_by(row) | record(0.5) | {"row": row.name, "seed": seed}

    monkeypatch.setattr(Course, "record", untrained)
    monkeypatch.setattr("benchmarks.papers.__main__.write", lambda found, results: None)
    sweep = ["fcd", "--sweep", "--factors", "1"]
    students(tmp_path, tmp_path, 1, rows=sweep)
    assert len(read(tmp_path / "sweep.jsonl")) == 2
    file.write_text("".join([pairs[0], pairs[2], pairs[1], *pairs[3:]]))
    with pytest.raises(SystemExit):
        students(tmp_path, tmp_path, 1, rows=sweep)
    assert "sweep.jsonl' holds results of other settings: swept_on (" in capsys.readouterr().err


class Failing:
    """A course in which the row fcd fails."""

    def record(self, row: Row, seed: int) -> dict[str, object]:
        if row.name == "fcd":
            raise ValueError("no")
        return {"row": row.name, "seed": seed}


def test_a_student_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [(Row(name), 0) for name in (LABELS, "sp", "fcd")]
    found = records(jobs, cast(Course, Failing()), processes=1, threads=1)
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
