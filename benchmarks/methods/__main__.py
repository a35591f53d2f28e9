"""`python -m benchmarks.methods --data lfw112.zip --pairs pairs.txt`, or `make bench-methods`.

Trains on the people of LFW's folds 1 to 8 and tests on the pairs of folds 9 and 10. Writes each
result as it comes, so that a run that was stopped goes on where it was.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.methods.material import Material, chosen
from benchmarks.methods.report import write
from benchmarks.methods.rows import ROWS, SWEPT, swept
from benchmarks.methods.running import Course, Job, prepare, records
from kdhooks.demo.exam import Exam
from kdhooks.demo.faces import read_faces
from kdhooks.demo.main import teacher_of
from kdhooks.demo.pairs import read_pairs, split_by_pairs
from kdhooks.demo.training import Settings
from kdhooks.inputs import InputTransform
from kdhooks.onnx_to_torch import to_torch
from kdhooks.teacher import Teacher


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    prepare(torch.device(options.device), options.threads)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / ("sweep.jsonl" if options.sweep else "lfw.jsonl")
    done = {(r["row"], r["seed"]) for r in read(results)}
    rows = swept(options.factors) if options.sweep else ROWS
    wanted = [row for row in rows if not options.rows or row.name.split(" x ")[0] in options.rows]
    if options.rows:
        wanted.sort(key=lambda row: options.rows.index(row.name.split(" x ")[0]))
    seeds = [options.seed] if options.sweep else range(options.seed, options.seed + options.seeds)
    left = [(row, seed) for seed in seeds for row in wanted if (row.name, seed) not in done]
    if left:
        _run(left, options, results)
    write(read(results), out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, help="LFW, aligned and 112x112: a folder or a zip")
    add("--pairs", required=True, help="its pairs.txt")
    add("--rows", nargs="*", help="only these lines of the table, in this order")
    add("--sweep", action="store_true", help="weights instead, on the pairs of folds 7 and 8")
    add("--factors", type=float, nargs="*", default=SWEPT, help="of the weights, with --sweep")
    add("--seed", type=int, default=0, help="the first one: initial weights, order of the images")
    add("--seeds", type=int, default=3)
    add("--images-seen", type=int, default=30000, help="by each student")
    add("--batch", type=int, default=30)
    add("--teacher", help="ONNX file with stages named as in SFace, which is the default")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cuda:0")
    add("--processes", type=int, default=1, help="students that are trained at the same time")
    add("--threads", type=int, default=torch.get_num_threads(), help="of all processes together")
    add("--work", default="bench-work", help="folder for the teacher's outputs, some 6 GB")
    add("--out", default="bench-out", help="folder for results, table and picture")
    return parser


def _run(left: list[Job], options: argparse.Namespace, results: Path) -> None:
    device, work = torch.device(options.device), Path(options.work)
    faces = read_faces(options.data)
    tested = split_by_pairs(faces, read_pairs(options.pairs))
    teacher = _teacher(options.teacher)
    material = Material(chosen(tested.train), teacher, work, device)
    left_out: set[str] = set()
    if options.sweep:
        pairs = read_pairs(options.pairs, fifth=4)
        tested = split_by_pairs(tested.train, pairs)
        left_out = set(tested.test.people)
    lesson = material.lesson(left_out)
    print(f"{len(lesson.labels)} views of {len(lesson.rows)} people", flush=True)
    exam = Exam(tested, teacher, device)
    settings = Settings(images_seen=options.images_seen, batch=options.batch)
    course = Course(lesson.to(device), exam, settings)
    _append(results, course.entry("teacher", 0, exam.teachers_score))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the teacher's memory, for the processes of the students
    found = records(left, course, work, options.processes, options.threads)
    for record in tqdm(found, desc="students", total=len(left)):
        _append(results, record)
        tqdm.write("{row} {seed}: {accuracy:.4f} {seconds:.0f} s".format_map(record))


def _teacher(path: str | None) -> Teacher:
    """As a torch module always, since its stages are tapped."""
    if path is None:
        return teacher_of(None)
    network = to_torch(path)
    transform = InputTransform(size=network.size, mean=network.mean, std=network.std)
    return Teacher(network, transform=transform, channels_last=True)


def _append(path: Path, record: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(record)}\n")


def read(path: Path) -> list[dict[str, object]]:
    """The results so far."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
