"""Trains and tests the students of a table, one after another or several at the same time."""

import os
import platform
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import numpy as np
import torch

from benchmarks.papers.locks import locked, remove_abandoned
from benchmarks.papers.material import digest, short_digest
from benchmarks.papers.probes import ProbeExam
from kdhooks_demo.exam import Exam
from kdhooks_demo.lesson import Lesson
from kdhooks_demo.report import Score
from kdhooks_demo.training import Row, Settings, train

Record: TypeAlias = dict[str, object]
Job: TypeAlias = tuple[Row, int]
"""A line of the table, and a seed."""
Outcome: TypeAlias = tuple[Job, Callable[[], Record]]
"""A student, and a function that returns its record or raises the error that ended it."""


@dataclass(frozen=True)
class Course:
    """Everything that the students of a table have in common."""

    lesson: Lesson  # on the device on which the students are trained
    exam: Exam
    settings: Settings
    common: Record  # the entries in which all records of a setting must agree
    folder: Path  # for unfinished students, and for the file from which processes read the course
    looks: int = 0  # points of a student's curve

    def record(self, row: Row, seed: int) -> Record:
        """Train one student, or continue its training, and test it.

        If another command trains the same student in the same folder, nothing is kept of this one.
        """
        kept = self.unfinished(row, seed)
        with locked(kept, wait=False) as free:
            if not free:
                print(f"{row.name} {seed}: another command trains this student too", flush=True)
            trained = train(
                self.lesson,
                row,
                self.settings,
                seed,
                look=self.exam.glance,
                looks=self.looks,
                kept=kept if free else None,
            )
        found = self.entry(row.name, seed, self.exam.score(trained)) | taught_by(row)
        if isinstance(self.exam, ProbeExam):
            found |= self.exam.more(trained.student)
        return {**found, "curve": trained.looks}

    def unfinished(self, row: Row, seed: int) -> Path:
        """Return the file for the student's state; its name depends on all that the state does."""
        inputs = (row, seed, self.settings, self.common, self.looks, self._digests)
        return self.folder / f"student-{short_digest(repr(inputs))}.pt"

    @cached_property
    def _digests(self) -> list[str]:
        """The digests of the lesson's labels and embeddings."""
        return [digest(part.cpu()) for part in (self.lesson.labels, self.lesson.embedding)]

    def entry(self, row: str, seed: int, score: Score) -> Record:
        """Return the figures of one student as they are stored in the results."""
        return {
            **self.common,
            "row": row,
            "seed": seed,
            "accuracy": score.pairs.accuracy,
            "eer": score.pairs.eer,
            "tar2": score.tar[1e-2],
            "tar3": score.tar[1e-3],
            "cross": score.cross.accuracy,
            "seconds": round(score.seconds, 1),
            "cosine": float(np.mean(score.cosines[-50:])) if score.cosines else 1.0,
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "card": _name(self.lesson.images.device),
        }


def taught_by(row: Row) -> Record:
    """Return what teaches a student: the entries in which all records of a row must agree."""
    return {"methods": list(row.methods), "labels_share": row.labels}


def prepare(device: torch.device, threads: int) -> None:
    """Make results repeatable; call this before the process uses CUDA.

    On a GPU, an operation that has no repeatable implementation warns instead of raising. Float32
    is not shortened to TF32 there.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # Filling new memory takes time in every step, and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.allow_tf32 = False


def records(jobs: Sequence[Job], course: Course, processes: int, threads: int) -> Iterator[Record]:
    """Yield each student's record as soon as the student is tested.

    A student that fails does not stop the others: its traceback is printed, and SystemExit is
    raised after the last one. threads: the number of threads of all processes together.
    """
    failures = []
    for (row, seed), outcome in _outcomes(jobs, course, processes, threads):
        try:
            yield outcome()
        except Exception as error:
            traceback.print_exception(error)
            failures.append(f"{row.name} {seed}: {error!r}")
    if failures:
        raise SystemExit(f"{len(failures)} of {len(jobs)} students failed: {'; '.join(failures)}")


def _outcomes(
    jobs: Sequence[Job], course: Course, processes: int, threads: int
) -> Iterator[Outcome]:
    if processes == 1:
        yield from (((row, seed), partial(course.record, row, seed)) for row, seed in jobs)
        return
    device = course.lesson.images.device
    remove_abandoned(course.folder, "course-*.pt")
    file = course.folder / f"course-{uuid4().hex[:12]}.pt"
    with locked(file):
        try:
            torch.save(replace(course, lesson=course.lesson.to(torch.device("cpu"))), file)
            student = partial(_student, file, device, max(1, threads // processes))
            yield from in_processes(student, jobs, min(processes, len(jobs)))
        finally:
            file.unlink(missing_ok=True)


def in_processes(
    student: Callable[[Row, int], Record], jobs: Sequence[Job], processes: int
) -> Iterator[Outcome]:
    """Train several students at the same time.

    Each process is a pool of its own: if it is killed, its student fails, and another process
    takes its place.
    """
    left = list(jobs)[::-1]
    running: dict[Future[Record], tuple[Job, ProcessPoolExecutor]] = {}
    with ExitStack() as stack:

        def pool() -> ProcessPoolExecutor:
            return stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))

        idle = [pool() for _ in range(processes)]
        while left or running:
            while left and idle:
                job, own = left.pop(), idle.pop()
                running[own.submit(student, *job)] = job, own
            for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                job, own = running.pop(future)
                idle.append(pool() if isinstance(future.exception(), BrokenExecutor) else own)
                yield job, future.result


def _student(file: Path, device: torch.device, threads: int, row: Row, seed: int) -> Record:
    """Do one job; the process may do several, one after another."""
    return _course(file, device, threads).record(row, seed)


@cache
def _course(file: Path, device: torch.device, threads: int) -> Course:
    """Return the course that the parent process stored; each process reads it once."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(device, threads)
    course: Course = torch.load(file, weights_only=False, mmap=True)
    return replace(course, lesson=course.lesson.to(device))


def _end_with_parent() -> None:
    """End this process with its parent; it would wait for ever after the parent was killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
