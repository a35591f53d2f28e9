"""The option parser of these commands, common types of options, and their output as JSON."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import NoReturn

import torch

from kdhooks.arguments import usable_device
from kdhooks.errors import KDHooksError


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in the same way as every other error."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("kdhooks ")
        raise KDHooksError(f"{command}: {message}; '{self.prog} --help' lists all options")


def make_parser(
    command: str, about: str | None, usage: str | None = None
) -> argparse.ArgumentParser:
    """about: the docstring of the command's module, which --help prints unchanged."""
    return _Parser(
        prog=f"kdhooks {command}",
        usage=usage,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# --- types of options ----------------------------------------------------------------------------


def path(text: str) -> Path:
    """Return a path with ~ expanded."""
    if not text:  # pathlib would read this as the working directory
        raise argparse.ArgumentTypeError("must be a path; found ''")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"must be a path; found '{text}', whose home directory is unknown"
        ) from error


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to run on, such as cpu or cuda:1 (default: cuda if available, else cpu)",
    )


# --- JSON ----------------------------------------------------------------------------------------


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead of lines; its keys are in docs/arcface_torch.md "
        "(default: off)",
    )


@contextmanager
def quiet_stdout(wanted: bool) -> Iterator[None]:
    """If wanted, send the output of networks, config files and packages to stderr."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


def print_json(content: object) -> None:
    print(as_json(content))


def as_json(content: object) -> str:
    """Return JSON, in which numbers that are not finite become null."""
    return json.dumps(_finite(content), allow_nan=False)


def _finite(content: object) -> object:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
