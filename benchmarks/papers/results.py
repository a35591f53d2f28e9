"""The file of results: one JSON object per line, appended as soon as a student is tested."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdhooks.errors import KDHooksError


def read(path: Path) -> list[dict[str, object]]:
    """Return the results so far, without an incomplete last line."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [_record(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _record(line: bytes, place: str) -> dict[str, object]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not (isinstance(found, dict) and {"row", "seed"} <= found.keys()):
        raise KDHooksError(
            f"{place} must be a result, as one JSON object with a row and a seed; found "
            f"{line[:40]!r}; delete the line, and its student is trained again"
        )
    return found


def append(path: Path, record: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(record)}\n")


def mend(path: Path) -> None:
    """Cut off an incomplete last line, which a command leaves if it is killed while it writes.

    A complete one that lacks its newline, as some editors leave it, gets that newline.
    """
    content = path.read_bytes() if path.is_file() else b""
    complete = content.rfind(b"\n") + 1
    if _is_json(content[complete:]):
        path.write_bytes(content + b"\n")
    elif complete < len(content):
        print(f"{path}: cut off an incomplete last line; its student is trained again", flush=True)
        os.truncate(path, complete)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def differences(found: Sequence[Mapping[str, object]], settings: Mapping[str, object]) -> list[str]:
    """Return the settings in which records differ from these; missing ones count as equal."""
    different = []
    for key, value in settings.items():
        others = {str(record[key]) for record in found if record.get(key, value) != value}
        if others:
            different.append(f"{key} ({', '.join(sorted(others))} there, {value} here)")
    return different
