"""Options of command lines, refused before anything runs."""

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from kdhooks.errors import KDHooksError

_DIGITS = 9


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least so much."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text[:_DIGITS]) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}; found '{text}'"
            )
        if len(text) > _DIGITS:
            raise argparse.ArgumentTypeError(f"must have {_DIGITS} digits at most; found '{text}'")
        return int(text)

    return parse


def share(text: str) -> float:
    """The type of an option that lies between 0 and 1."""
    found = _number(text)
    if not 0 < found < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1; found '{text}'")
    return found


def factor(text: str) -> float:
    """The type of an option that multiplies a weight."""
    found = _number(text)
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; found '{text}'")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def device(text: str) -> torch.device:
    """The type of an option that names a processor or a GPU that is there."""
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N; found '{text}'")
    count = torch.cuda.device_count()
    if text != "cpu" and int(found[1] or 0) >= count:  # torch takes 900 for another number
        raise argparse.ArgumentTypeError(f"torch finds {count} CUDA devices; found '{text}'")
    return torch.device(text)


def make_folder(path: str | Path) -> Path:
    """The folder for the results of a command, with those around it."""
    folder = Path(os.path.expanduser(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KDHooksError(
            f"--out must be a folder that can be written; '{path}' can't be made ({error.strerror})"
        ) from error
    return folder
