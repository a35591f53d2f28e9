"""Writes installed distributions with the minimum that importlib.metadata needs."""

from collections.abc import Mapping
from pathlib import Path


def write_distribution(
    folder: Path, name: str, methods: Mapping[str, str], source: str = "", version: str = "1.0"
) -> None:
    """Write a distribution into a folder on sys.path; its only module has the same name.

    methods: entry point -> "module:attribute".
    """
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = "".join(f"{method} = {value}\n" for method, value in methods.items())
    (info / "entry_points.txt").write_text(f"[kdhooks]\n{points}")
    (folder / f"{name}.py").write_text(source)
