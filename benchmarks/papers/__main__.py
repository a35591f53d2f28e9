"""`python -m benchmarks.papers --setting A --data lfw112.zip --pairs pairs.txt`.

Trains the students of one setting on the people of LFW's folds 1 to 8 and tests them on the pairs
of folds 9 and 10. Writes each result immediately, and the state of each training ten times, so that
an interrupted command continues near the step where it ended. With `--rows teacher` it only trains
the setting's teacher, and tests it.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.command import add_device
from benchmarks.papers.material import PLAIN, PLAIN_KINDS, digest_of_pairs, digests
from benchmarks.papers.probes import ProbeExam
from benchmarks.papers.report import write
from benchmarks.papers.results import append, differences, mend, read
from benchmarks.papers.rows import SWEPT, TEACHER, swept
from benchmarks.papers.running import Course, Job, Record, prepare, records, taught_by
from benchmarks.papers.school import School
from benchmarks.papers.settings import SETTINGS, SHORT, Setting
from benchmarks.papers.views import KINDS
from kdhooks.arguments import at_least, factor, make_folder
from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks_demo.exam import Exam
from kdhooks_demo.faces import read_faces
from kdhooks_demo.pairs import Split, read_pairs, split_by_pairs
from kdhooks_demo.training import Row, Settings

SEEDS = 3
MORE_SEEDS = 5
LOOKS = 10  # points of a student's curve


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        _run(parser, options)
    except KDHooksError as error:
        parser.error(str(error))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    setting = _setting(parser, options)
    names = [TEACHER, *dict.fromkeys(_method(row) for row in setting.rows)]
    _check_rows(parser, options.rows or (), names)
    prepare(options.device, options.threads)
    work = make_folder(options.work, "--work")
    results = make_folder(options.out) / _file(options)
    mend(results)
    faces, pairs = read_faces(options.data), read_pairs(options.pairs)
    split = split_by_pairs(faces, pairs)
    school = School(setting, split.train, options.teacher, work, options.device)
    common: Record = {
        "setting": setting.name,
        "images_seen": setting.students.images_seen,
        "batch": setting.students.batch,
        "views": " ".join(setting.images.kinds),
        "device": options.device.type,
        **digests(faces, pairs, school.sface),
        **_teachers_images(setting),
        **_stages(setting),
    }
    if options.sweep:
        common["swept_on"] = digest_of_pairs(read_pairs(options.pairs, fifth=4))
    found = [record for record in read(results) if record.get("setting", SHORT) == setting.name]
    different = differences(found, common)
    for row in setting.rows:
        same_name = [record for record in found if record["row"] == row.name]
        different += [f"{row.name}: {one}" for one in differences(same_name, taught_by(row))]
    if different:
        parser.error(
            f"'{results}' holds results of other settings: {'; '.join(different)}; use the "
            "settings of that file, or specify another folder with --out"
        )
    if options.teacher is not None:
        common["teacher_file"] = Path(options.teacher).name  # it may be renamed, so it comes last
    done = {(record["row"], record["seed"]) for record in found}
    left = [job for job in _jobs(setting, options) if (job[0].name, job[1]) not in done]
    if left or (TEACHER, 0) not in done:
        course = _course(school, split, common, options)
        if (TEACHER, 0) not in done:
            append(results, course.entry(TEACHER, 0, course.exam.teachers_score))
        try:
            _train(left, course, options, results)
        except SystemExit:  # some students failed
            write(read(results), results)
            raise
    write(read(results), results)


def _method(row: Row) -> str:
    """Return the row's name without its weight: a sweep has one row for each weight of a method."""
    return row.name.split(" x ")[0]


def _file(options: argparse.Namespace) -> str:
    if options.sweep:
        return "sweep.jsonl"
    return "lfw.jsonl" if options.setting == SHORT else "papers.jsonl"


def _setting(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Setting:
    """Return the setting from the table of settings, with the changes of the command line."""
    setting = SETTINGS[options.setting]
    students = setting.students
    if options.images_seen:
        students = replace(students, images_seen=options.images_seen)
    if options.batch:
        students = replace(students, batch=options.batch)
    taught = _taught(setting, options.teacher_images)
    teachers = tuple(
        replace(one, taught=_taught(one, options.teacher_images)) for one in setting.teachers
    )
    counts = [("images-seen", students), ("teacher-images", taught)]
    counts += [("teacher-images", one.taught) for one in teachers]
    rows = setting.rows
    if options.factors and not options.sweep:
        parser.error(
            f"--factors needs --sweep; found {listed(f'{one:g}' for one in options.factors)}; "
            "remove --factors, or add --sweep"
        )
    if options.sweep:
        factors = dict.fromkeys(options.factors or SWEPT)
        rows = (*swept(setting.rows, tuple(factors)), *setting.study)
    wanted = [row for row in rows if not options.rows or _method(row) in options.rows]
    counts += [("images-seen", replace(students, **row.changes)) for row in wanted if row.changes]
    for option, found in counts:
        if found and found.images_seen < found.batch:
            parser.error(
                f"--{option} must be at least a batch; found {found.images_seen} and {found.batch}"
            )
    images = setting.images
    if options.views:
        images = replace(images, kinds=tuple(options.views))
    if any(row.part == PLAIN for row in wanted) and not set(images.kinds) & set(PLAIN_KINDS):
        parser.error(
            f"--views: rows on {PLAIN} need one of {listed(PLAIN_KINDS)}; found "
            f"{listed(images.kinds)}"
        )
    return replace(
        setting,
        images=images,
        students=students,
        taught=taught,
        rows=rows,
        teachers=teachers,
        recorded=_recorded(parser, setting, options.teacher_stages),
    )


def _recorded(
    parser: argparse.ArgumentParser, setting: Setting, paths: Sequence[str] | None
) -> Mapping[str, str]:
    """Return the paths of the teacher's features that are recorded: SFace's, or those given."""
    if paths is None:
        return setting.recorded
    if len(paths) != len(setting.recorded):
        parser.error(
            f"--teacher-stages: setting {setting.name} records {len(setting.recorded)} stages of "
            f"the teacher; found {listed(paths)}"
        )
    return dict(zip(setting.recorded, paths, strict=True))


def _taught(setting: Setting, images_seen: int | None) -> Settings | None:
    """Return how the setting's teacher is trained, if it is; images_seen overrides its images."""
    taught = setting.taught
    return replace(taught, images_seen=images_seen) if taught and images_seen else taught


def _teachers_images(setting: Setting) -> Record:
    """Return the number of images for the teachers that are trained here, each number once."""
    trained = [one.taught.images_seen for one in (setting, *setting.teachers) if one.taught]
    return {"teacher_images": " ".join(map(str, dict.fromkeys(trained)))} if trained else {}


def _stages(setting: Setting) -> Record:
    """Return the paths of the teacher's features that are recorded, if any."""
    return {"stages": " ".join(setting.recorded.values())} if setting.recorded else {}


def _check_rows(
    parser: argparse.ArgumentParser, wanted: Sequence[str], known: Sequence[str]
) -> None:
    """Refuse unknown rows before anything runs."""
    for name in wanted:
        if name not in known:
            parser.error(
                f"--rows: there is no row '{name}'; {near_miss(name, known)}"
                f"the rows are {listed(known)}"
            )


def _jobs(setting: Setting, options: argparse.Namespace) -> list[Job]:
    """Return the jobs, seed by seed, with rows in the order of the command line or the table."""

    def seeds(row: Row) -> int:
        usual = MORE_SEEDS if row.name in setting.more_seeds else SEEDS
        return options.seeds or (1 if options.sweep else usual)

    rows = list(setting.rows)
    if options.rows:
        rows = [row for row in rows if _method(row) in options.rows]
        rows.sort(key=lambda row: options.rows.index(_method(row)))
    return [
        (row, options.seed + number)
        for number in range(max(map(seeds, rows), default=0))
        for row in rows
        if number < seeds(row)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers", description=__doc__)
    add = parser.add_argument
    add("--setting", required=True, choices=SETTINGS, help="the table to run; see settings.py")
    add("--data", required=True, help="LFW, aligned and 112x112: a folder or a zip")
    add("--pairs", required=True, help="LFW's pairs.txt")
    add("--rows", nargs="+", help="run only these rows of the table, in this order")
    add("--sweep", action="store_true", help="vary the weights, on the pairs of folds 7 and 8")
    add("--factors", type=factor, nargs="+", help="weight factors, with --sweep; default: 1 4 16")
    add(
        "--seed",
        type=at_least(0),
        default=0,
        help="the first seed, for initial weights and image order; default: %(default)s",
    )
    add(
        "--seeds",
        type=at_least(1),
        help="students of each row; default: 3, 5 for the setting's own papers, 1 with --sweep",
    )
    add("--images-seen", type=at_least(1), help="images for each student; default: the setting's")
    add("--batch", type=at_least(2), help="batch size of the students; default: the setting's")
    add("--views", nargs="+", choices=KINDS, help="of each photograph; default: plain mirror mild")
    add(
        "--teacher-images",
        type=at_least(1),
        help="images for a teacher that is trained here; default: the setting's",
    )
    add("--teacher", help="ONNX file; default: SFace")
    add(
        "--teacher-stages",
        nargs="+",
        metavar="PATH",
        help="the teacher's submodules whose features are recorded in settings B and short, from "
        "shallow to deep; default: those of SFace",
    )
    add_device(parser)
    add(
        "--processes",
        type=at_least(1),
        default=1,
        help="students that are trained at the same time; default: %(default)s",
    )
    add(
        "--threads",
        type=at_least(1),
        default=torch.get_num_threads(),
        help="threads of all processes together; default: %(default)s",
    )
    add("--work", default="bench-work", help="folder for teachers and their outputs, some 13 GB")
    add("--out", default="bench-out", help="folder for results, tables and pictures")
    return parser


def _course(school: School, split: Split, common: Record, options: argparse.Namespace) -> Course:
    left_out: set[str] = set()
    if options.sweep:
        split = split_by_pairs(split.train, read_pairs(options.pairs, fifth=4))
        left_out = set(split.test.people)
    lesson = school.lesson(left_out)
    print(f"{len(lesson.labels)} views of {len(lesson.rows)} people", flush=True)
    view = school.setting.probes
    exam = (
        Exam(split, school.teacher, options.device)
        if view is None
        else ProbeExam(split, school.teacher, options.device, view)
    )
    return Course(
        lesson.to(options.device),
        exam,
        school.setting.students,
        common,
        school.folder,
        LOOKS,
    )


def _train(left: list[Job], course: Course, options: argparse.Namespace, results: Path) -> None:
    if options.device.type == "cuda":
        torch.cuda.empty_cache()  # the teacher's memory, for the processes of the students
    found = records(left, course, options.processes, options.threads)
    for record in tqdm(found, desc="students", total=len(left)):
        append(results, record)
        tqdm.write("{row} {seed}: {accuracy:.4f} {tar2:.4f} {seconds:.0f} s".format_map(record))


if __name__ == "__main__":
    main()
