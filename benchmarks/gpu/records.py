"""The JSON file of each part: its cases, each with its status and its result."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.cuda import nccl

from benchmarks.gpu.part import Options

Entry: TypeAlias = dict[str, Any]
"""status: "done", "failed", "absent", "skipped", "stopped" or "running", which determines the other
keys. kept: the last entry that was "done", if a later attempt was not.
"""


class Unreadable(Exception):
    """Raised for a file that this command did not write, or did not write completely."""


class Record:
    """The file OUT/PART.json, which is rewritten after each change."""

    def __init__(self, name: str, options: Options) -> None:
        self.path = options.out / f"{name}.json"
        self._command = options.command
        device = options.device.type
        self._new = {"part": name, "tiny": options.tiny, "device": device, "cases": {}}

    def _read(self) -> dict[str, Any]:
        """Read the file, in each call, because the command and the part's process both write it."""
        if not self.path.is_file():
            return self._new
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            assert all(entry["status"] for entry in found["cases"].values())
            assert {"device", "tiny"} <= found.keys()
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise Unreadable(
                f"'{self.path}' holds no results of this command, or not all of them; delete the "
                "file, or name another folder by --out"
            ) from error
        content: dict[str, Any] = found
        return content

    @property
    def cases(self) -> Mapping[str, Entry]:
        found: Mapping[str, Entry] = self._read()["cases"]
        return found

    @property
    def shown(self) -> Mapping[str, Entry]:
        """Return the entry of each case that has a result, in the order of the file."""
        return {
            case: shown
            for case, entry in self.cases.items()
            if (shown := entry if "result" in entry else entry.get("kept"))
        }

    def made_like(self, options: Options) -> bool:
        """Return whether the file holds results of the same type of device and of the same size."""
        found = self._read()
        return (found["device"], found["tiny"]) == (options.device.type, options.tiny)

    def settled(self, case: str) -> bool:
        return self.cases.get(case, {}).get("status") == "done"

    def put(self, case: str, status: str, **more: Any) -> None:
        """Replace a case's entry; the file is complete at every moment."""
        content = self._read()
        before = content["cases"].get(case, {})
        kept = before if before.get("status") == "done" else before.get("kept")
        # Microseconds distinguish two attempts.
        at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f UTC")
        made = {"at": at, "by": self._command, "on": machine()}
        entry = {"status": status, **more, "made": made}
        if kept and status != "done":
            entry["kept"] = kept
        content["cases"][case] = entry
        draft = self.path.with_suffix(".part")
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)


@lru_cache
def machine() -> dict[str, str]:
    """Return the card, the driver and the versions."""
    found = {
        "kdhooks": _revision(),
        "card": "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["card"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["driver"] = _driver()
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, nccl.version()))
    return found


def _revision() -> str:
    """Return the version and a digest of the packages' sources, which distinguishes commits."""
    digest = hashlib.sha256()
    for package in ("kdhooks", "kdhooks_plugins", "kdhooks_integrations"):
        (folder,) = import_module(package).__path__
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{version('kdhooks')}, sources {digest.hexdigest()[:12]}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
