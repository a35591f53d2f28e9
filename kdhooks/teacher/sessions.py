"""Runs several teachers for one training run: one session for each, with joined outputs."""

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from kdhooks.classes.joined import joined
from kdhooks.copies import NotCopied
from kdhooks.teacher.cache import TeacherCache
from kdhooks.teacher.session import TeacherOutput, TeacherSession
from kdhooks.teacher.several import Teachers, numbered
from kdhooks.teacher.teacher import Teacher


class TeacherSessions(NotCopied):
    """One `TeacherSession` for each teacher; it is used like a single session."""

    def __init__(self, teacher: Teachers, taps: Sequence[str], like: Tensor | None) -> None:
        """taps: paths that start with a teacher's number; "" is the joined embedding."""
        self.teacher = teacher
        self.named = [(f"teacher {n}", one) for n, one in enumerate(teacher.members)]
        self._taps_joined = "" in taps
        self._paths = teacher.split(taps)
        self._widths: list[int] = []
        self._sessions: list[TeacherSession] = []
        with ExitStack() as undo:
            for number, paths in enumerate(self._paths):
                with numbered(number):
                    session = TeacherSession(teacher.members[number], list(paths), like=like)
                undo.callback(session.close)
                self._sessions.append(session)
            undo.pop_all()

    def __call__(self, images: Tensor, indices: Tensor | None = None) -> TeacherOutput:
        """(b 3 h w), (b), as for a single session."""
        outputs = []
        for number, session in enumerate(self._sessions):
            with numbered(number):
                outputs.append(session(images, indices))
        self._widths = [output.embedding.shape[1] for output in outputs]
        features = {
            path: output.features[inner]
            for paths, output in zip(self._paths, outputs, strict=True)
            for inner, path in paths.items()
        }
        embedding = joined([output.embedding for output in outputs])
        if self._taps_joined:
            features[""] = embedding
        return TeacherOutput(embedding, features, all(output.finite for output in outputs))

    @property
    def by_index(self) -> bool:
        """Whether a call needs the indices of the samples in the training set."""
        return any(session.by_index for session in self._sessions)

    @property
    def caches(self) -> list[TeacherCache]:
        """The caches of those teachers that have one."""
        return [cache for session in self._sessions for cache in session.caches]

    def of_each(self, output: TeacherOutput) -> list[tuple[str, Teacher, TeacherOutput]]:
        """Return the name, teacher and output of each of m teachers.

        The embeddings have the length 1/√m, at which they were joined.
        """
        parts = output.embedding.split(self._widths, dim=1)
        return [
            (
                who,
                teacher,
                TeacherOutput(part, {path: output.features[path] for path in paths.values()}),
            )
            for (who, teacher), part, paths in zip(self.named, parts, self._paths, strict=True)
        ]

    def run_ahead(self, images: Tensor) -> None:
        for session in self._sessions:
            session.run_ahead(images)

    def drop_ahead(self) -> None:
        for session in self._sessions:
            session.drop_ahead()

    def close(self) -> None:
        for session in self._sessions:
            session.close()

    def __enter__(self) -> "TeacherSessions":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_session(
    teacher: Teacher | Teachers,
    taps: Sequence[str] = (),
    adapter: nn.Module | None = None,
    like: Tensor | None = None,
) -> TeacherSession | TeacherSessions:
    """Open a session, with the arguments of `TeacherSession`; several teachers have no adapter."""
    if isinstance(teacher, Teacher):
        return TeacherSession(teacher, taps, adapter, like)
    assert adapter is None
    return TeacherSessions(teacher, taps, like)
