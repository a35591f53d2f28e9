"""The script's `torch.save`, made to leave a whole file behind whenever the process ends."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PREVIOUS = ".previous"


class SafeTorch(ModuleType):
    """torch for one script; all but `save` is torch's own."""

    def __init__(self, check: Callable[[], None]) -> None:
        """check: raises where what would be saved is spoilt."""
        super().__init__("torch")
        vars(self)["_check"] = check

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(torch, name, value)

    def save(self, obj: object, f: Any, *args: Any, **kwargs: Any) -> None:
        """Beside the old file, which it then replaces at one stroke.

        A rank's checkpoint keeps the one before as `….previous`: ranks that are stopped while they
        save may be one checkpoint apart.
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
    """A second name for the file as it is; the first stays."""
    draft = path.with_name(f"{path.name}{PREVIOUS}.part")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # a file system without links
        shutil.copyfile(path, draft)
    draft.replace(path.with_name(f"{path.name}{PREVIOUS}"))
