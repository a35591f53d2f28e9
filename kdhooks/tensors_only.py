"""Copies the tensors of a checkpoint that also holds other objects to a new file.

    python -m kdhooks.tensors_only OLD.pt NEW.pt

Reading the old file can run any code that it contains, so only use files from people you trust.
"""

import argparse
import sys
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.exit_status import exit_status
from kdhooks.tensor_files import check_target, first_bytes, named_tensors, write_tensors

_SUBJECT = "tensors_only"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kdhooks.tensors_only",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "old", type=Path, help="the checkpoint to read, from a source that you trust"
    )
    parser.add_argument("new", type=Path, help="the file to write, with a suffix such as .pt")
    options = parser.parse_args(argv)
    return exit_status(partial(convert, options.old, options.new))


def convert(old: Path, new: Path) -> None:
    """Copy tensors, arrays, numbers and text in dicts and lists; modules become state dicts."""
    if first_bytes(old, _SUBJECT).startswith(b"PK") and not zipfile.is_zipfile(old):
        raise KDHooksError(
            f"{_SUBJECT}: '{old}' is cut short: its end is missing; copy or download it again"
        )
    check_target(new, _SUBJECT)
    if new.exists() and new.samefile(old):
        raise KDHooksError(
            f"{_SUBJECT}: '{new}' is the file to read, whose other objects would be lost; name "
            "another file"
        )
    try:
        content = torch.load(old, map_location="cpu", weights_only=False)
    except Exception as error:
        raise KDHooksError(
            f"{_SUBJECT}: '{old}' can't be read ({type(error).__name__}: {error}); run this in the "
            "folder from which the code of its objects can be imported"
        ) from error
    kept = _plain(content)
    count = sum(1 for _ in named_tensors(kept))
    if not count:
        raise KDHooksError(f"{_SUBJECT}: '{old}' holds no tensors; name a checkpoint")
    write_tensors(kept, new, _SUBJECT)
    print(f"{new}: {count} tensors")


def _plain(value: object) -> object:
    """Keep tensors, arrays, numbers and text, in plain dicts and lists; else return None."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping):
        kept = {key: _plain(inner) for key, inner in value.items() if type(key) in (str, int)}
        return {key: inner for key, inner in kept.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.tensor(value)
    if isinstance(value, Tensor):
        return value.detach()
    return value if type(value) in (bool, int, float, str) else None


if __name__ == "__main__":
    sys.exit(main())
