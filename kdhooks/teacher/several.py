"""Several teachers that teach as one: their embeddings, their class rows and their taps, joined."""

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

    They have one embedding and one classifier, in which a cosine is the mean of theirs. A path
    starts with a teacher's number: `1.layer3`. `1` is all that teacher 1 puts out, and the empty
    path is the joined embedding.
    """

    embedding = ""

    def __init__(self, members: Sequence[Teacher]) -> None:
        self.members = tuple(members)
        # A teacher that is a function has no submodules, and keeps its number.
        self.module = nn.ModuleList([one.module or nn.Identity() for one in self.members])
        rows = [one.classifier for one in self.members]
        known = [one for one in rows if one is not None]
        self.classifier = JoinedRows(known) if len(known) == len(rows) else None
        self.without_rows = [n for n, one in enumerate(rows) if one is None] if known else []
        """The numbers of the teachers without class rows, if others have them."""

    def split(self, paths: Sequence[str]) -> list[dict[str, str]]:
        """By teacher: each path without the number, and with it. The empty path is nobody's."""
        found: list[dict[str, str]] = [{} for _ in self.members]
        for path in paths:
            if path:
                number, inner = self.place(path)
                found[number][inner] = path
        return found

    def place(self, path: str) -> tuple[int, str]:
        """`1.layer3` -> (1, "layer3")."""
        found = _NUMBERED.fullmatch(path)
        if found is None or int(found[1]) >= len(self.members):
            raise KDHooksError(
                f"teacher tap '{path}' must start with the number of one of {len(self.members)} "
                "teachers, which are counted from 0, as in '0.layer3'"
            )
        return int(found[1]), found[2]


@contextmanager
def numbered(number: int) -> Iterator[None]:
    """Name the teacher in errors."""
    try:
        yield
    except KDHooksError as error:
        raise KDHooksError(f"teacher {number}: {error}") from error


def listed_teachers(given: object) -> list[Any]:
    """The items of a list or a tuple of teachers; of anything else, itself."""
    if not isinstance(given, list | tuple):
        return [given]
    if not given:
        raise KDHooksError("teacher must be at least one teacher; found an empty list")
    return list(given)


def one_or_several(given: object) -> Teacher | Teachers:
    """A `Teacher`, module or function; or a list of them. A list of one is that teacher."""
    every = listed_teachers(given)
    if len(every) == 1:
        return every[0] if isinstance(every[0], Teacher) else Teacher(every[0])
    members = []
    for number, one in enumerate(every):
        with numbered(number):
            members.append(one if isinstance(one, Teacher) else Teacher(one))
    return Teachers(members)
