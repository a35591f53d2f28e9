"""Makes the script's `torch.save` atomic, so that a killed process leaves complete files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PREVIOUS = ".previous"


class SafeTorch(ModuleType):
    """Replaces torch in one script; everything except `save` is torch's own."""

    def __init__(self, check: Callable[[], None]) -> None:
        """check: raises if the numbers to be saved are not finite."""
        super().__init__("torch")
        vars(self)["_check"] = check

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(torch, name, value)

    def save(self, obj: object, f: Any, *args: Any, **kwargs: Any) -> None:
        """Write a new file first, which then replaces the old one atomically.

        A rank's previous checkpoint is kept as `….previous`, since ranks that are stopped while
        saving may be one checkpoint apart.
        """
        self._check()
        if not isinstance(f, str | os.PathLike):
            torch.save(obj, f, *args, **kwargs)
            return
        path = Path(os.path.realpath(f))
        draft = path.with_name(f"{path.name}.part")
        torch.save(obj, draft, *args, **kwargs)
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        if path.name.startswith("checkpoint_gpu_") and path.is_file():
            _keep(path)
        draft.replace(path)


def _keep(path: Path) -> None:
    """Keep the present content of the file under the name `….previous`; the file remains."""
    draft = path.with_name(f"{path.name}{PREVIOUS}.part")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # a file system without links
        shutil.copyfile(path, draft)
    draft.replace(path.with_name(f"{path.name}{PREVIOUS}"))
