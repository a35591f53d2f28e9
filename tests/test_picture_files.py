"""Folders and zips of pictures: their names, skipped entries, and all faults in one error."""

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")

from kdhooks import KDHooksError
from kdhooks.picture_files import PictureFiles, read_all
from kdhooks.pictures import encode

PICTURE = encode(np.zeros((4, 6, 3), np.uint8))
SIZE = (6, 4)
JUNK = (".DS_Store", "Thumbs.db", "desktop.ini", "a/._1.png", "__MACOSX/a/1.png", ".git/x.png")

Logged = pytest.LogCaptureFixture


def write(folder: Path, *names: str, content: bytes = PICTURE) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(path: Path, *names: str, content: bytes = PICTURE) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return path


def checked(source: Path) -> PictureFiles:
    files = PictureFiles(source, "faces")
    files.check(files.names, SIZE)
    return files


@pytest.fixture(params=[write, lambda folder, *names: zipped(folder / "x.zip", *names)])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Write a folder, or a zip, with these names."""
    return lambda *names: request.param(tmp_path, *names)


def test_pictures_of_any_depth_are_sorted_by_name(made: Callable[..., Path]) -> None:
    names = ["b/2.PNG", "a/9/1.jpg", "b/10.png", "c.jpg/1.webp", "0.tif"]
    assert checked(made(*names)).names == sorted(names)


def test_other_files_are_skipped_and_logged(made: Callable[..., Path], caplog: Logged) -> None:
    files = checked(made("a/1.png", "notes.txt", *JUNK))
    assert files.names == ["a/1.png"]
    assert re.search(r"faces: skipped \d entries of '.*' that are not pictures: ", caplog.text)
    assert "notes.txt" in caplog.text or "more" in caplog.text
    assert ".DS_Store" in caplog.text


def test_nothing_is_logged_if_nothing_is_skipped(made: Callable[..., Path], caplog: Logged) -> None:
    checked(made("a/1.png"))
    assert not caplog.records


def test_all_faults_are_reported_together(made: Callable[..., Path]) -> None:
    source = made("a/1.png")
    folder = source if source.is_dir() else source.parent / "unpacked"
    write(folder, "a/1.png", "a/2.png")
    write(folder, "b/empty.png", content=b"")
    write(folder, "b/text.jpg", content=b"hello")
    write(folder, "c/large.png", content=encode(np.zeros((4, 7, 3), np.uint8)))
    write(folder, *(f"d/{number}.jpg" for number in range(4)), content=b"hello")
    if source != folder:
        with zipfile.ZipFile(source, "w") as archive:
            for path in folder.rglob("*.*"):
                archive.write(path, path.relative_to(folder))
    with pytest.raises(KDHooksError, match="found 7 faults among 9 pictures") as caught:
        checked(source)
    said = str(caught.value)
    assert said.startswith("faces: every picture must be readable; found 7 faults among 9")
    assert "'b/empty.png' is empty; " in said
    assert "'b/text.jpg' can't be read as an image of the formats" in said
    assert "'c/large.png' is 7x4 (width x height), but 6x4 is needed; align" in said
    assert said.endswith("; and 2 more")


def test_links_are_followed_unless_they_form_a_loop(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "a/1.png")
    write(tmp_path / "other", "2.png")
    (folder / "b").symlink_to(tmp_path / "other")
    assert checked(folder).names == ["a/1.png", "b/2.png"]
    (folder / "a" / "up").symlink_to(folder)
    with pytest.raises(
        KDHooksError, match="'a/up/' links to a folder that contains it; remove the"
    ):
        checked(folder)


def test_two_folders_that_link_to_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    with pytest.raises(KDHooksError, match=r"found 2 faults.*'a/other/other/' links to a folder"):
        checked(tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(KDHooksError, match="found 3 faults among 4") as caught:
        checked(tmp_path)
    said = str(caught.value)
    assert "'gone.png' can't be opened (No such file or directory); repair or remove it" in said
    assert "'loop.png' can't be opened (Too many levels of symbolic links)" in said
    assert "'pipe.png' is not a regular file; remove it" in said


def test_a_file_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not restrict root, so the refusals are simulated."""
    write(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    scandir, open_file = os.scandir, Path.open

    def refusing_folder(path: str | Path) -> object:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def refusing_file(path: Path, mode: str = "r") -> object:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, mode)

    monkeypatch.setattr(os, "scandir", refusing_folder)
    monkeypatch.setattr(Path, "open", refusing_file)
    with pytest.raises(KDHooksError, match="found 2 faults among 2 pictures") as caught:
        checked(tmp_path)
    assert "'a/' can't be listed (Permission denied); change its permissions" in str(caught.value)
    assert "'b/2.png' can't be opened (Permission denied)" in str(caught.value)
    with pytest.raises(KDHooksError, match=r"found 1 faults among 0 .*'\.' can't be listed"):
        PictureFiles(tmp_path / "a", "faces")


# --- zips ----------------------------------------------------------------------------------------


def test_names_outside_of_a_zip_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "a/1.png", "/etc/1.png", "../1.png", "a\\2.png", "./b/3.png")
    with pytest.raises(KDHooksError, match="found 3 faults among 2 pictures") as caught:
        checked(path)
    for name in ("/etc/1.png", "../1.png", "a\\2.png"):
        assert f"'{name}' leads out of the archive, or has \\ for /; create" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "a/1.png", "b/1.png", "./b/1.png", "c/1.png", "c/1.png")
    with pytest.raises(KDHooksError, match=r"'b/1\.png' names 2 entries.*'c/1.png' names 2"):
        checked(path)


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "a/1.png")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(KDHooksError, match=r"'a/1\.png' is encrypted; unpack the archive with its"):
        checked(path)


def test_a_damaged_entry_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "a/1.png", "b/2.png")
    content = bytearray(path.read_bytes())
    content[content.index(PICTURE) + len(PICTURE) - 4] ^= 1
    path.write_bytes(content)
    files, faults = PictureFiles(path, "faces"), dict[str, str]()
    assert [name for name, _ in read_all(files.names, files.pixels, faults)] == ["b/2.png"]
    assert re.match("can't be opened .Bad CRC-32 for file 'a/1.png'.; repair or", faults["a/1.png"])


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (0, "can't be read as a zip file (File is not a zip file)"),
        (60, "can't be read as a zip"),
    ],
)
def test_a_truncated_zip_is_refused(kept: int, said: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "a/1.png")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(KDHooksError, match=re.escape(said)):
        PictureFiles(path, "faces")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "faces must be a folder or a zip file; found an empty name"),
        ("absent", "faces must be a folder or a zip file with pictures; 'absent' does not exist"),
        ("~nobody-of-that-name/x", "'~nobody-of-that-name/x' does not exist"),
        ("pipe", "'pipe' is neither"),
        ("a\0b", "embedded null"),
    ],
)
def test_a_source_that_is_no_folder_or_zip_is_refused(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(KDHooksError, match=re.escape(said)):
        PictureFiles(source, "faces")
