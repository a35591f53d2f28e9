"""The images of all students, embedded by the teacher once, and their training in processes."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.teacher import Teacher
from kdhooks_demo.embedding import as_input
from kdhooks_demo.exam import TEACHER_CHUNK
from kdhooks_demo.faces import Faces
from kdhooks_demo.lesson import Lesson, means_of
from kdhooks_demo.material import blends, together, views
from kdhooks_demo.training import Row, Settings, Trained, train

_KNOWN = "known people"  # the name of the part of a lesson


@dataclass(frozen=True)
class Material:
    """Images with the teacher's embeddings, which are computed once for all students."""

    seen: Faces  # n views and blends
    people: NDArray[np.str_]  # (n 2): the person in a view, twice, or the two people of a blend
    embedding: Tensor  # (n e)

    def showing(self, people: Sequence[str]) -> NDArray[np.bool_]:
        """(n): whether an image shows nobody but these people."""
        one, other = np.isin(self.people, people).T
        known: NDArray[np.bool_] = one & other
        return known

    def lesson(self, people: Sequence[str]) -> Lesson:
        """A lesson with a part that shows nobody but these people.

        It shares the images and embeddings of everybody, so that they are in memory only once.
        """
        kept = self.showing(people)
        labels = torch.full((len(self.seen),), -1)
        rows = torch.from_numpy(np.flatnonzero(kept))
        labels[rows] = self.seen.where(kept).labels
        means = means_of(self.embedding[rows], labels[rows])
        return Lesson(self.seen.images, labels, self.embedding, means, {_KNOWN: rows})


def material(faces: Faces, teacher: Teacher, count: int, couples: int, seed: int) -> Material:
    """Draw `count` views of each face and blends of the couples, and embed all of them."""
    photographs = views(faces, count, seed)
    blended, of = blends(faces, couples, seed)
    seen = together(photographs, blended)
    chunks = range(0, len(seen), TEACHER_CHUNK)
    bar = tqdm(chunks, desc=f"teacher, {len(seen)} images", leave=False)
    with TeacherSession(teacher, like=as_input(seen.images[:1])) as session:
        embedded = [
            session(as_input(seen.images[start : start + TEACHER_CHUNK])).embedding for start in bar
        ]
    alone = np.stack([photographs.people] * 2, axis=1)
    return Material(seen, np.concatenate([alone, of]), torch.cat(embedded))


class Student(NamedTuple):
    """How a student is trained: from whom it learns, its row of the table, and its seed."""

    people: tuple[str, ...]
    row: Row
    seed: int


def trained(
    students: Sequence[Student],
    material: Material,
    settings: Settings,
    processes: int,
    folder: Path,
) -> Iterator[Trained]:
    """Train the students, and yield them in their order.

    Each process has one thread, since small networks train no faster with several. The processes
    share the images through a file in the folder.
    """
    with (
        TemporaryDirectory(dir=folder) as shared,
        ProcessPoolExecutor(min(processes, len(students)), get_context("spawn")) as pool,
    ):
        file = Path(shared) / "material.pt"
        torch.save(material, file)
        found = pool.map(partial(_train, file, settings), students)
        yield from tqdm(found, desc="students", total=len(students), leave=False)


def _train(file: Path, settings: Settings, student: Student) -> Trained:
    people, row, seed = student
    return train(_read(file).lesson(people), replace(row, part=_KNOWN), settings, seed)


@cache
def _read(file: Path) -> Material:
    """Return the material that the parent process wrote; each process reads it once."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    found: Material = torch.load(file, weights_only=False, mmap=True)
    return found
