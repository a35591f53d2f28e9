"""Values of the commands' options, checked while the command line is read."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

from kdhooks.errors import KDHooksError
from kdhooks.tensor_files import user_path

_DIGITS = 9


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser for whole numbers of at least `least`."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text[:_DIGITS]) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, at least {least}; found {text}"
            )
        if len(text) > _DIGITS:
            raise argparse.ArgumentTypeError(f"must have at most {_DIGITS} digits; found {text}")
        return int(text)

    return number


def share(text: str) -> float:
    """Parse a number between 0 and 1, both excluded."""
    found = _number(text)
    if not 0 < found < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1; found '{text}'")
    return found


def factor(text: str) -> float:
    """Parse a factor of a weight: a number of at least 0."""
    found = _number(text)
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; found '{text}'")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def usable_device(text: str) -> torch.device:
    """Parse the name of a device on which torch can create a tensor on this machine."""
    number = re.fullmatch(r"cuda:(\d+)", text)
    # This comes first because torch takes large numbers for others: cuda:256 becomes cuda:0.
    if number and int(number[1]) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"must be a device of this machine; found '{text}', and "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # torch raises four kinds of exceptions here
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise argparse.ArgumentTypeError(
            "must be a device of this machine, such as cpu, cuda or cuda:0; found "
            f"'{text}' ({reason})"
        ) from error
    return device


def make_folder(path: str | Path, option: str = "--out") -> Path:
    """Create the folder that this option of a command names, and its parents."""
    folder = user_path(path, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KDHooksError(
            f"{option} must be a writable folder; '{path}' can't be created ({error.strerror})"
        ) from error
    return folder
