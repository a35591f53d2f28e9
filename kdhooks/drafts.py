"""Writes files that appear complete or not at all: into a draft folder, from which they move."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def drafts(folder: Path) -> Iterator[Path]:
    """Yield a new folder in `folder`. When the block ends, its files replace those of `folder`.

    If the block or the replacement raises any exception, `folder` keeps its earlier files. A
    process that is killed leaves the drafts in a folder `.draft-…`, but no half-written file.
    """
    with TemporaryDirectory(prefix=".draft-", dir=folder) as name:
        draft = Path(name)
        yield draft
        _replace(draft, folder)


def _replace(draft: Path, folder: Path) -> None:
    files = sorted(path for path in draft.iterdir() if path.is_file())
    # External weights are moved before the ONNX graph that refers to them.
    files.sort(key=lambda path: path.suffix == ".onnx")
    earlier = draft / "earlier"
    earlier.mkdir()
    for file in files:
        if (folder / file.name).exists():
            shutil.copy2(folder / file.name, earlier / file.name)
    begun: list[str] = []
    try:
        for file in files:
            begun.append(file.name)
            os.replace(file, folder / file.name)
    except BaseException:
        for name in begun:
            if (earlier / name).exists():
                os.replace(earlier / name, folder / name)
            elif not (draft / name).exists():  # it was moved, and replaced nothing
                (folder / name).unlink(missing_ok=True)
        raise
