"""The JSON file of each part: its cases, each with its status and its result."""

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch.cuda import nccl

from benchmarks.gpu.part import Options

Entry: TypeAlias = dict[str, Any]
"""status: "done", "failed", "absent", "skipped", "stopped" or "running"; what else, by status."""

SETTLED = ("done",)  # a case with another status is run again


class Record:
    """The file OUT/PART.json, written anew after each change."""

    def __init__(self, name: str, options: Options) -> None:
        self.path = options.out / f"{name}.json"
        self._command = options.command
        self._content: dict[str, Any] = {"part": name, "tiny": options.tiny, "cases": {}}
        self._content["device"] = options.device.type
        if self.path.is_file():
            self._content = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def cases(self) -> Mapping[str, Entry]:
        found: Mapping[str, Entry] = self._content["cases"]
        return found

    def made_like(self, options: Options) -> bool:
        """Whether the file holds results of the same kind of device and size."""
        found = self._content["device"], self._content["tiny"]
        return found == (options.device.type, options.tiny)

    def settled(self, case: str) -> bool:
        return self.cases.get(case, {}).get("status") in SETTLED

    def put(self, case: str, status: str, **more: Any) -> None:
        """Replace a case's entry; the file is whole at every moment."""
        at = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        made = {"at": at, "by": self._command, "on": machine()}
        self._content["cases"][case] = {"status": status, **more, "made": made}
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


@lru_cache
def machine() -> dict[str, str]:
    """Card, driver and versions."""
    found = {
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


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
