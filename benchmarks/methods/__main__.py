"""`python -m benchmarks.methods --data lfw112.zip --pairs pairs.txt`, or `make bench-methods`.

Trains on the people of LFW's folds 1 to 8 and tests on the pairs of folds 9 and 10. Writes each
result as it comes, so that a run that was stopped goes on where it was.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.methods.material import Material, chosen
from benchmarks.methods.report import write
from benchmarks.methods.rows import ROWS, SWEPT, swept
from kdhooks.demo.exam import Exam
from kdhooks.demo.faces import read_faces
from kdhooks.demo.main import teacher_of
from kdhooks.demo.pairs import read_pairs, split_by_pairs
from kdhooks.demo.report import Score
from kdhooks.demo.training import Row, Settings, train


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / ("sweep.jsonl" if options.sweep else "lfw.jsonl")
    done = {(r["row"], r["seed"]) for r in read(results)}
    rows = swept(options.factors) if options.sweep else ROWS
    wanted = [row for row in rows if not options.rows or row.name.split(" x ")[0] in options.rows]
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
    add("--rows", nargs="*", help="only these lines of the table")
    add("--sweep", action="store_true", help="weights instead, on the pairs of folds 7 and 8")
    add("--factors", type=float, nargs="*", default=SWEPT, help="of the weights, with --sweep")
    add("--seed", type=int, default=0, help="the first one: initial weights, order of the images")
    add("--seeds", type=int, default=3)
    add("--images-seen", type=int, default=30000, help="by each student")
    add("--batch", type=int, default=30)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--work", default="bench-work", help="folder for the teacher's outputs, some 6 GB")
    add("--out", default="bench-out", help="folder for results, table and picture")
    return parser


def _run(left: list[tuple[Row, int]], options: argparse.Namespace, results: Path) -> None:
    faces = read_faces(options.data)
    tested = split_by_pairs(faces, read_pairs(options.pairs))
    teacher = teacher_of(None)
    material = Material(chosen(tested.train), teacher, Path(options.work))
    left_out: set[str] = set()
    if options.sweep:
        pairs = read_pairs(options.pairs, fifth=4)
        tested = split_by_pairs(tested.train, pairs)
        left_out = set(tested.test.people)
    lesson = material.lesson(left_out)
    print(f"{len(lesson.labels)} views of {len(lesson.rows)} people", flush=True)
    exam = Exam(tested, teacher)
    _append(results, _record("teacher", 0, exam.teachers_score, options))
    settings = Settings(images_seen=options.images_seen, batch=options.batch)
    for row, seed in tqdm(left, desc="students"):
        score = exam.score(train(lesson, row, settings, seed))
        _append(results, _record(row.name, seed, score, options))
        tqdm.write(f"{row.name} {seed}: {score.pairs.accuracy:.4f} {score.seconds:.0f} s")


def _record(row: str, seed: int, score: Score, options: argparse.Namespace) -> dict[str, object]:
    return {
        "row": row,
        "seed": seed,
        "accuracy": score.pairs.accuracy,
        "eer": score.pairs.eer,
        "tar2": score.tar[1e-2],
        "tar3": score.tar[1e-3],
        "cross": score.cross.accuracy,
        "seconds": round(score.seconds, 1),
        "cosine": float(np.mean(score.cosines[-50:])) if score.cosines else 1.0,
        "images_seen": options.images_seen,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def _append(path: Path, record: dict[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(record)}\n")


def read(path: Path) -> list[dict[str, object]]:
    """The results so far."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
