"""The contract of a part, and the options that every part gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from matplotlib.figure import Figure

Result: TypeAlias = Mapping[str, Any]
"""The figures of one case, as they are written to JSON."""
Table: TypeAlias = Sequence[Sequence[str]]
"""The cells of a table, row by row; the first row holds the headings."""


class Absent(Exception):
    """Raised by a case that cannot run here, with the reason, for example a missing package."""


class Failed(Exception):
    """Raised by a case that failed but has figures, for example the number of failed tests."""

    def __init__(self, reason: str, result: Result) -> None:
        super().__init__(reason)
        self.result = result


@dataclass(frozen=True)
class Options:
    device: torch.device
    tiny: bool  # tiny sizes, to test the command itself
    out: Path  # folder of the records
    work: Path  # scratch folder; it is deleted at the end
    arcface_torch: Path | None = None  # InsightFace's folder recognition/arcface_torch
    faces: Path | None = None  # LFW, aligned and 112x112: a zip or a folder
    pairs: Path | None = None  # LFW's pairs.txt
    again: bool = False  # also run the cases that are recorded as done
    command: str = ""  # the user's command line, recorded with every result

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


class Goal(NamedTuple):
    """A bound, compared with a figure of a part."""

    text: str  # for example "a cached step takes at most 1.03 times the student alone"
    found: str
    met: bool


class Part(Protocol):
    """A module of benchmarks/gpu/parts.

    A part is a list of cases. Each case is recorded as soon as it ends, so that an interrupted run
    continues with the missing ones, and a case that fails does not stop the others.
    """

    ABOUT: str
    """A few sentences for the report: what was run, and the meaning of the columns."""

    def cases(self, options: Options) -> Mapping[str, float]:
        """Return each case's name with the seconds that it needs at full size on a GPU."""
        ...

    def run(self, case: str, options: Options) -> Result:
        """Run one case.

        Raises Absent if the case cannot run here. Any other exception is recorded as a failure.
        """
        ...

    def tables(self, found: Mapping[str, Result]) -> Sequence[Table]:
        """Return the report's tables of all cases that have a result; found is never empty."""
        ...

    def goals(self, found: Mapping[str, Result]) -> Sequence[Goal]: ...

    def picture(self, found: Mapping[str, Result]) -> Figure | None: ...
