"""Several teachers used as one: their embeddings, class rows and taps are joined."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from kdhooks.classes.joined import JoinedRows
from kdhooks.errors import KDHooksError
from kdhooks.teacher.teacher import Teacher

_NUMBERED = re.compile(r"([0-9]{1,4})(?:\.(?=.)|(?=[@\[:])|$)(.*)")


class Teachers:
    """Two or more `Teacher`s, which are numbered from 0.

    They have one joined embedding and one joined classifier. A cosine between these is the mean of
    the teachers' cosines. A path starts with a teacher's number, as `1.layer3`. The path `1` is the
    output of teacher 1, and the empty path is the joined embedding.
    """

    embedding = ""

    def __init__(self, members: Sequence[Teacher]) -> None:
        self.members = tuple(members)
        # A function has no submodules; the placeholder keeps the numbers of the others right.
        self.module = nn.ModuleList([one.module or nn.Identity() for one in self.members])
        rows = [one.classifier for one in self.members]
        known = [one for one in rows if one is not None]
        self.classifier = JoinedRows(known) if len(known) == len(rows) else None
        self.without_rows = [n for n, one in enumerate(rows) if one is None] if known else []
        """The numbers of the teachers without class rows, if others have them."""

    def split(self, paths: Sequence[str]) -> list[dict[str, str]]:
        """Return a dict for each teacher: its paths without the number -> the whole paths.

        The empty path belongs to no teacher.
        """
        found: list[dict[str, str]] = [{} for _ in self.members]
        for path in paths:
            if path:
                number, inner = self.place(path)
                found[number][inner] = path
        return found

    def place(self, path: str) -> tuple[int, str]:
        """Split a path into the number and the rest: `1.layer3` -> (1, "layer3")."""
        found = _NUMBERED.fullmatch(path)
        if found is None or int(found[1]) >= len(self.members):
            raise KDHooksError(
                f"teacher tap '{path}' must start with the number of one of {len(self.members)} "
                "teachers, which are numbered from 0, as in '0.layer3'"
            )
        return int(found[1]), found[2]


def inside(number: int, path: str) -> str:
    """Join a teacher's number and a path in it; `[0]` is one of several tensors of its output."""
    return f"{number}{path}" if path[:1] in ("", "[", "@") else f"{number}.{path}"


@contextmanager
def numbered(number: int) -> Iterator[None]:
    """Name the teacher in errors."""
    try:
        yield
    except KDHooksError as error:
        raise KDHooksError(f"teacher {number}: {error}") from error


def listed_teachers(given: object) -> list[Any]:
    """Return the teachers as a list; anything but a list or tuple becomes a list of one."""
    if not isinstance(given, list | tuple):
        return [given]
    if not given:
        raise KDHooksError("teacher must be at least one teacher; found an empty list")
    return list(given)


def one_or_several(given: object) -> Teacher | Teachers:
    """Return a `Teacher`, or the `Teachers` of a list of two or more.

    given: a `Teacher`, module or function, or a list of them.
    """
    every = listed_teachers(given)
    if len(every) == 1:
        return every[0] if isinstance(every[0], Teacher) else Teacher(every[0])
    members = []
    for number, one in enumerate(every):
        with numbered(number):
            members.append(one if isinstance(one, Teacher) else Teacher(one))
    return Teachers(members)
