"""`python -m benchmarks.methods --data lfw112.zip --pairs pairs.txt`, or `make bench-methods`.

Trains on the people of LFW's folds 1 to 8 and tests on the pairs of folds 9 and 10. Writes each
result immediately, so that an interrupted run continues with the students that are missing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.methods.material import Material, chosen, digests
from benchmarks.methods.report import write
from benchmarks.methods.results import append, differences, mend, read
from benchmarks.methods.rows import ROWS, SWEPT, swept
from benchmarks.methods.running import Course, Job, Record, prepare, records
from kdhooks.arguments import at_least, factor, make_folder, usable_device
from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.onnx.to_torch import to_torch
from kdhooks.teacher.input_transform import InputTransform
from kdhooks.teacher.teacher import Teacher
from kdhooks_demo.exam import Exam
from kdhooks_demo.faces import Faces, read_faces
from kdhooks_demo.main import teacher_of
from kdhooks_demo.pairs import Pairs, read_pairs, split_by_pairs
from kdhooks_demo.training import Row, Settings


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        _run(parser, options)
    except KDHooksError as error:
        parser.error(str(error))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    rows = swept(options.factors) if options.sweep else ROWS
    _check(parser, options, rows)
    prepare(options.device, options.threads)
    out = make_folder(options.out)
    results = out / ("sweep.jsonl" if options.sweep else "lfw.jsonl")
    mend(results)
    found = read(results)
    faces, pairs = read_faces(options.data), read_pairs(options.pairs)
    teacher = _teacher(options.teacher)
    common = {
        "images_seen": options.images_seen,
        "batch": options.batch,
        "device": options.device.type,
        **digests(faces, pairs, teacher),
    }
    if different := differences(found, common):
        parser.error(
            f"'{results}' holds results of other settings: {'; '.join(different)}; take the "
            "settings of that file, or name another folder by --out"
        )
    done = {(record["row"], record["seed"]) for record in found}
    wanted = [row for row in rows if not options.rows or _method(row) in options.rows]
    if options.rows:
        wanted.sort(key=lambda row: options.rows.index(_method(row)))
    seeds = [options.seed] if options.sweep else range(options.seed, options.seed + options.seeds)
    left = [(row, seed) for seed in seeds for row in wanted if (row.name, seed) not in done]
    if left:
        course = _course(faces, pairs, teacher, common, options)
        if ("teacher", 0) not in done:
            append(results, course.entry("teacher", 0, course.exam.teachers_score))
        _train(left, course, options, results)
    write(read(results), out)


def _method(row: Row) -> str:
    """The name of a line of the table; a sweep has several lines of it, one for each weight."""
    return row.name.split(" x ")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, help="LFW, aligned and 112x112: a folder or a zip")
    add("--pairs", required=True, help="its pairs.txt")
    add("--rows", nargs="*", help="only these lines of the table, in this order")
    add("--sweep", action="store_true", help="weights instead, on the pairs of folds 7 and 8")
    add("--factors", type=factor, nargs="+", default=SWEPT, help="of the weights, with --sweep")
    add(
        "--seed",
        type=at_least(0),
        default=0,
        help="the first one: initial weights, order of the images",
    )
    add("--seeds", type=at_least(1), default=3, help="students of each row; default: %(default)s")
    add("--images-seen", type=at_least(1), default=30000, help="by each student")
    add("--batch", type=at_least(1), default=30, help="images of a step; default: %(default)s")
    add("--teacher", help="ONNX file with stages named as in SFace, which is the default")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add(
        "--device",
        type=usable_device,
        default=default,
        help="cpu, cuda or cuda:N; default: %(default)s",
    )
    add(
        "--processes",
        type=at_least(1),
        default=1,
        help="students that are trained at the same time",
    )
    add(
        "--threads",
        type=at_least(1),
        default=torch.get_num_threads(),
        help="of all processes together",
    )
    add("--work", default="bench-work", help="folder for the teacher's outputs, some 6 GB")
    add("--out", default="bench-out", help="folder for results, table and picture")
    return parser


def _check(
    parser: argparse.ArgumentParser, options: argparse.Namespace, rows: Sequence[Row]
) -> None:
    """Refuse before anything runs what could only fail later."""
    if options.images_seen < options.batch:
        parser.error(
            "--images-seen must be at least --batch; "
            f"found {options.images_seen} and {options.batch}"
        )
    known = list(dict.fromkeys(map(_method, rows)))
    for name in options.rows or ():
        if name not in known:
            parser.error(
                f"--rows: there is no row '{name}'; {near_miss(name, known)}"
                f"the rows are {listed(known)}"
            )


def _course(
    faces: Faces, pairs: Pairs, teacher: Teacher, common: Record, options: argparse.Namespace
) -> Course:
    tested = split_by_pairs(faces, pairs)
    material = Material(chosen(tested.train), teacher, Path(options.work), options.device)
    left_out: set[str] = set()
    if options.sweep:
        tested = split_by_pairs(tested.train, read_pairs(options.pairs, fifth=4))
        left_out = set(tested.test.people)
    lesson = material.lesson(left_out)
    print(f"{len(lesson.labels)} views of {len(lesson.rows)} people", flush=True)
    exam = Exam(tested, teacher, options.device)
    settings = Settings(images_seen=options.images_seen, batch=options.batch)
    return Course(lesson.to(options.device), exam, settings, common)


def _train(left: list[Job], course: Course, options: argparse.Namespace, results: Path) -> None:
    if options.device.type == "cuda":
        torch.cuda.empty_cache()  # the teacher's memory, for the processes of the students
    found = records(left, course, Path(options.work), options.processes, options.threads)
    for record in tqdm(found, desc="students", total=len(left)):
        append(results, record)
        tqdm.write("{row} {seed}: {accuracy:.4f} {seconds:.0f} s".format_map(record))


def _teacher(path: str | None) -> Teacher:
    """As a torch module always, since its stages are tapped."""
    if path is None:
        return teacher_of(None)
    network = to_torch(path)
    transform = InputTransform(size=network.size, mean=network.mean, std=network.std)
    return Teacher(network, transform=transform, channels_last=True)


if __name__ == "__main__":
    main()
