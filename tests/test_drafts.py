"""Either all draft files appear, or none."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kdhooks.drafts import drafts


def write(folder: Path, *names: str, text: str = "new") -> None:
    for name in names:
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_files_appear_when_the_block_ends(tmp_path: Path) -> None:
    write(tmp_path, "a", "c", text="old")
    with drafts(tmp_path) as draft:
        write(draft, "a", "b")
        assert (tmp_path / "a").read_text() == "old"
    assert content(tmp_path) == {"a": "new", "b": "new", "c": "old"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_earlier_files_unchanged(
    error: type[BaseException], tmp_path: Path
) -> None:
    write(tmp_path, "a", text="old")
    with pytest.raises(error), drafts(tmp_path) as draft:  # noqa: PT012 - the block is the subject
        write(draft, "a", "b")
        raise error
    assert content(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("moved", [0, 1, 2])
@pytest.mark.parametrize("done", [False, True])
def test_an_interruption_between_two_files_restores_the_first(
    moved: int, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption comes before or after a file is replaced."""
    write(tmp_path, "a", "c", text="old")
    replace, calls = os.replace, []

    def interrupted(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) != moved + 1 or done:
            replace(source, target)
        if len(calls) == moved + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), drafts(tmp_path) as draft:  # noqa: PT012
        write(draft, "a", "b", "c")
        monkeypatch.setattr(os, "replace", interrupted)
    assert content(tmp_path) == {"a": "old", "c": "old"}


def test_a_failed_copy_leaves_earlier_files_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path, "a", text="old")
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space"), drafts(tmp_path) as draft:
        write(draft, "a")
    assert content(tmp_path) == {"a": "old"}


def test_weights_appear_before_the_graph_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, placed = os.replace, []

    def noted(source: Any, target: Any) -> None:
        placed.append(Path(target).name)
        replace(source, target)

    with drafts(tmp_path) as draft:
        write(draft, "m.onnx", "m.onnx.data", "m.pt")
        monkeypatch.setattr(os, "replace", noted)
    assert placed == ["m.onnx.data", "m.pt", "m.onnx"]
