"""Shows the progress of long work on one line of the terminal."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_PATIENCE = 2.0  # seconds before the line appears


def progress(parts: Sequence[T], what: str) -> Iterator[T]:
    """Yield the parts, in order. If that takes long, rank 0 shows their number on a terminal."""
    shown, start = False, time.monotonic()
    for number, part in enumerate(parts, start=1):
        yield part
        if shown or (time.monotonic() - start > _PATIENCE and _is_shown()):
            shown = True
            end = "\n" if number == len(parts) else ""
            line = f"\r{what}: {number} of {len(parts)} parts"
            print(line, end=end, file=sys.stderr, flush=True)


def _is_shown() -> bool:
    several = dist.is_available() and dist.is_initialized()
    return sys.stderr.isatty() and not (several and dist.get_rank())
