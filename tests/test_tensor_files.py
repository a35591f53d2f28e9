"""Files without tensors are recognised by kind, and each error names the file."""

import codecs
import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks.tensor_files import check_target, named_tensors, read_tensors, user_path, write_tensors

PAGE = b"\n<!DOCTYPE html><html><body>Too many requests</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"


def read(path: Path) -> object:
    return read_tensors(path, "teacher checkpoint", mmap=True)


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "content")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_files_of_old_and_new_torch_are_read(legacy: bool, mmap: bool, tmp_path: Path) -> None:
    content = {"a": torch.arange(5.0), "b": [torch.ones(2), 3]}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    found = read_tensors(tmp_path / "m.pt", "teacher checkpoint", mmap=mmap)
    assert [(name, tensor.tolist()) for name, tensor in named_tensors(found)] == [
        ("a", [0, 1, 2, 3, 4]),
        ("b.0", [1, 1]),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"m\.pt' is empty; copy or download it again"),
        (b"just some words\n", r"m\.pt' is a text file; name a file of tensors"),
        ("Größe,Höhe\n".encode(), r"m\.pt' is a text file"),
        (codecs.BOM_UTF8 + PAGE, r"m\.pt' is a web page"),
        (PAGE, r"m\.pt' is a web page, probably from a failed download"),
        (POINTER, r"m\.pt' is a Git LFS pointer and not the file itself; run git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file"),
        (gzip.compress(b"x", mtime=0), r"is compressed \(gzip\); unpack it first"),
        (b"\x08\x07\x12\x07pytorch\x1a\x03" + bytes(99), "is an ONNX file; name it as teacher.onn"),
        (bytes(range(256)), "is damaged, or is not a file that torch.save wrote"),
        (b"\x80\x02}q\x00.", "is not a file that torch.save wrote"),
        (b"PK\x03\x04" + bytes(50), "is cut short: its end is missing"),
        (b"\x10\0\0\0\0\0\0\0{", "safetensors"),
    ],
)
def test_the_kind_of_another_file_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(KDHooksError, match=said):
        read(tmp_path / "m.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.2, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_named(part: float, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    content = {"a": torch.rand(200, 20)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    os.truncate(path, int(part * path.stat().st_size))
    with pytest.raises(KDHooksError, match=r"m\.pt' (is cut short|can't be read).*download it aga"):
        read(path)


@pytest.mark.parametrize("checked", [False, True])
def test_a_damaged_number_is_found_by_its_checksum(checked: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checked)
    try:
        torch.save({"a": torch.zeros(5000)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    read_tensors(path, "teacher checkpoint")  # also without checksums
    if checked:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] = 1
        path.write_bytes(content)
        with pytest.raises(KDHooksError, match=r"m\.pt' is damaged \(Bad CRC-32 for file 'm/dat"):
            read_tensors(path, "teacher checkpoint")


def test_the_kind_of_another_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    zipped(path, "m/data.pkl", "m/code/x.py", "m/constants.pkl")
    with pytest.raises(KDHooksError, match=r"is a TorchScript archive; give torch\.jit\.load"):
        read(path)
    np.savez(path.with_suffix(".npz"), a=np.ones(2))
    with pytest.raises(KDHooksError, match=r"m\.npz' is an archive of numpy arrays"):
        read(path.with_suffix(".npz"))
    zipped(path, "face.jpg", "notes.txt")
    with pytest.raises(KDHooksError, match=r"zip archive of other files \(face\.jpg, notes\.txt\)"):
        read(path)
    zipped(path, "m/archive_format")
    with pytest.raises(KDHooksError, match=r"is an exported program; give torch\.export\.load"):
        read(path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "teacher checkpoint must be a path; found ''"),
        ("a\0b", "must be a path; found 'a.x00b'"),
        (3, "must be a path; found 3"),
        ("~nosuchuser/m.pt", "'~nosuchuser/m.pt' can't be looked up"),
        ("x" * 300, "can't be looked up .File name too long"),
        ("https://host/m.pt", "'https://host/m.pt' is a URL; download the file, and name"),
        ("s3://bucket/m.pt", "is a URL"),
    ],
)
def test_a_value_that_is_no_path_is_refused(path: object, said: str) -> None:
    with pytest.raises(KDHooksError, match=said):
        user_path(path, "teacher checkpoint")


def test_paths_are_not_interpreted() -> None:
    for path in ("m.pt", "a:b", "./50%/[1].pt", "/absent/m.pt"):
        assert user_path(path, "teacher checkpoint") == Path(path)
    assert user_path("~/m.pt", "teacher checkpoint") == Path.home() / "m.pt"


def test_errors_for_folders_and_missing_files_list_alternatives(tmp_path: Path) -> None:
    torch.save(torch.ones(1), tmp_path / "model.pt")
    with pytest.raises(KDHooksError, match=r"is a folder; name the file in it; it holds: model\."):
        read(tmp_path)
    with pytest.raises(KDHooksError, match=r"there is no file .*modle\.pt'; did you mean 'model\."):
        read(tmp_path / "modle.pt")
    with pytest.raises(KDHooksError, match=r"there is no file .*no/model\.pt'; name the file"):
        read(tmp_path / "no" / "model.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(KDHooksError, match=r"link\.pt' is a link to a file that does not exist"):
        read(tmp_path / "link.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(KDHooksError, match=r"pipe\.pt' is not a regular file"):
        read(tmp_path / "pipe.pt")


def test_a_file_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torch.ones(1), tmp_path / "model.pt")

    def refuse(*arguments: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        KDHooksError, match=r"model\.pt' can't be read \(Permission denied\); check"
    ):
        read(tmp_path / "model.pt")


def test_safetensors_are_read_if_the_package_is_installed(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    save({"a.weight": torch.arange(4.0)}, path)
    found = read(path)
    assert isinstance(found, dict)
    assert_close(found["a.weight"], torch.arange(4.0))
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(KDHooksError, match=r"model\.safetensors' can't be read as safetensors"):
        read(path)


# --- writing ---------------------------------------------------------------------------------


def test_targets_are_checked_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, said in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "no" / "a.pt", r"there is no folder '.*no' to write 'a\.pt' in"),
        (tmp_path / "a.npy", "its suffix is of another format; use a suffix such as .pt"),
    ):
        with pytest.raises(KDHooksError, match=said):
            check_target(path, "class means")
    check_target(tmp_path / "a.pt", "class means")
    assert not list(tmp_path.iterdir())

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(KDHooksError, match=r"a\.pt' can't be written \(Read-only file system\)"):
        check_target(tmp_path / "a.pt", "class means")


def test_a_failed_write_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(torch.ones(2), tmp_path / "a.pt", "class means")

    def fail(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KDHooksError, match=r"a\.pt' can't be written \(Pytorch.*free disk space"):
        write_tensors(torch.zeros(2), tmp_path / "a.pt", "class means")
    assert torch.equal(torch.load(tmp_path / "a.pt"), torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
