"""Reads files of tensors without running code that they contain, and writes them atomically."""

import codecs
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdhooks.errors import KDHooksError, listed, near_miss

CONVERT = "python -m kdhooks.tensors_only"
_SIGNATURES = {  # the first bytes of files that are mistaken for checkpoints
    b"version https://git-lfs": "is a Git LFS pointer and not the file itself; run git lfs pull",
    b"\x93NUMPY": "is a numpy array; save torch.from_numpy(numpy.load(…)) with torch.save",
    b"\x89HDF": "is an HDF5 file; save its weights as a state dict with torch.save",
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"BZh": "is compressed (bzip2); unpack it first",
    b"\xfd7zXZ": "is compressed (xz); unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it first",
    b"7z\xbc\xaf": "is a 7z archive; unpack it first",
    b"Rar!": "is a RAR archive; unpack it first",
}
_OF_OTHER_OBJECTS = ("GLOBAL", "Can only", "reduce", "Unsupported class")  # in torch's errors
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a Windows drive has one letter
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")
_EXPORTED = (
    "is an exported program; give torch.export.load(…) as the teacher's module, or save its "
    "state_dict() with torch.save"
)
_IN_ARCHIVES = {  # a file inside a zip archive -> what the archive is
    "constants.pkl": "is a TorchScript archive; give torch.jit.load(…) as the teacher's module, or "
    "save its state_dict() with torch.save",
    "archive_format": _EXPORTED,
    "serialized_exported_program.json": _EXPORTED,
}
_OTHER_FORMATS = (".npy", ".npz", ".onnx", ".safetensors", ".h5", ".csv", ".json", ".txt", ".toml")


def user_path(path: object, subject: str) -> Path:
    """Return a path on this machine with ~ resolved, whether or not it exists."""
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise KDHooksError(f"{subject} must be a path; found {path!r}")
    if _ADDRESS.match(str(path)):
        raise KDHooksError(f"{subject}: '{path}' is a URL; download the file, and name its path")
    try:
        found = Path(path).expanduser()
        found.exists()
    except (RuntimeError, OSError) as error:  # unknown user, no permission, name too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise KDHooksError(f"{subject}: '{path}' can't be looked up ({reason})") from error
    return found


def read_tensors(path: Path, subject: str, *, mmap: bool = False) -> object:
    """Read a file that torch.save or safetensors wrote.

    subject: for errors, such as "teacher checkpoint". mmap: leave large tensors on the disk.
    """
    head = first_bytes(path, subject)
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        return _safetensors(path, subject)
    if reason := _foreign(path, head, whole=not mmap):
        raise KDHooksError(f"{subject}: '{path}' {reason}")
    try:
        # Only the zip archives of torch 1.6 and later can be mapped into memory.
        mapped = mmap and head.startswith(b"PK")
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if not any(word in str(error) for word in _OF_OTHER_OBJECTS):
            raise KDHooksError(_broken(path, subject, error)) from error
        raise KDHooksError(
            f"{subject}: '{path}' holds other objects than tensors ({_reason(error)}), and reading "
            "them can run any code in the file; if you trust whoever made it, write its tensors to "
            f"a new file: {CONVERT} {path} NEW.pt"
        ) from error
    except Exception as error:
        raise KDHooksError(_broken(path, subject, error)) from error
    return content


def named_tensors(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in dicts and lists of any depth, each with its path as a name."""
    items: Any = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    for key, value in items:
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from named_tensors(value, f"{prefix}{key}.")


def check_target(path: Path, subject: str) -> None:
    """Refuse a file that cannot be written, before long work for it starts."""
    if path.is_dir():
        raise KDHooksError(f"{subject}: '{path}' is a folder; name a file in it")
    if path.suffix.lower() in _OTHER_FORMATS:
        raise KDHooksError(
            f"{subject}: '{path}' is written by torch.save, but its suffix is of another format; "
            "use a suffix such as .pt"
        )
    if not path.parent.is_dir():
        raise KDHooksError(
            f"{subject}: there is no folder '{path.parent}' to write '{path.name}' in; create it "
            "first, or name another folder"
        )
    draft = _draft(path)
    try:
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise KDHooksError(
            f"{subject}: '{path}' can't be written ({error.strerror}); name a file in a folder of "
            "your own"
        ) from error


def write_tensors(content: object, path: Path, subject: str) -> None:
    """Write a file with torch.save, atomically: an interruption leaves the earlier file."""
    draft = _draft(path)
    try:
        torch.save(content, draft)
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        draft.unlink(missing_ok=True)
        raise KDHooksError(
            f"{subject}: '{path}' can't be written ({error}); free disk space, or name another file"
        ) from error


def _draft(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def first_bytes(path: Path, subject: str) -> bytes:
    """Return the first bytes of a file; refuse one that is missing, unreadable or empty."""
    try:
        if path.is_dir():
            files = sorted(p.name for p in path.iterdir() if p.is_file())
            raise KDHooksError(
                f"{subject}: '{path}' is a folder; name the file in it; it holds: "
                f"{listed(files[:8])}"
            )
        if not path.is_file():
            if path.is_symlink():
                raise KDHooksError(f"{subject}: '{path}' is a link to a file that does not exist")
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            if path.exists():
                raise KDHooksError(f"{subject}: '{path}' is not a regular file; name one")
            start = "" if path.is_absolute() else f" from '{Path.cwd()}'"
            raise KDHooksError(
                f"{subject}: there is no file '{path}'{start}; {near_miss(path.name, beside)}"
                "name the file"
            )
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise KDHooksError(
            f"{subject}: '{path}' can't be read ({error.strerror}); check its permissions and "
            "those of its folders"
        ) from error
    if not head:
        raise KDHooksError(f"{subject}: '{path}' is empty; copy or download it again")
    return head


def _foreign(path: Path, head: bytes, whole: bool) -> str:
    """Describe a file that torch.save did not write, and the way out; "" if it may have written it.

    whole: whether to verify the checksums of the whole file, which torch does not do.
    """
    for signature, reason in _SIGNATURES.items():
        if head.startswith(signature):
            return reason
    if head.startswith(b"PK"):
        return _of_archive(path, whole)
    if head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(_MARKUP):
        return "is a web page, probably from a failed download; download the file again"
    if path.suffix.lower() == ".onnx" or (head[0] == 8 and b"pytorch" in head[:32]):
        return 'is an ONNX file; name it as teacher.onnx, as in teacher = { onnx = "…" }'
    if _is_text(head):
        return "is a text file; name a file of tensors, such as one that torch.save wrote"
    return ""


def _is_text(head: bytes) -> bool:
    if any(byte < 32 and byte not in b"\t\r\n" for byte in head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def _of_archive(path: Path, whole: bool) -> str:
    if not zipfile.is_zipfile(path):
        return "is cut short: its end is missing; copy or download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
            for entry in archive.infolist() if whole else ():
                if entry.CRC:  # 0: torch was told to write no checksums
                    with archive.open(entry) as file:
                        while file.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError) as error:
        return f"is damaged ({error}); copy or download it again"
    for name, reason in _IN_ARCHIVES.items():
        if name in names:
            return reason
    if "data.pkl" in names:
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return "is an archive of numpy arrays; save them as a dict of tensors with torch.save"
    return f"is a zip archive of other files ({listed(names[:4])}); unpack it first"


def _broken(path: Path, subject: str, error: Exception) -> str:
    return (
        f"{subject}: '{path}' can't be read: it is damaged, or is not a file that torch.save wrote "
        f"({_reason(error)}); copy or download it again, or save model.state_dict() with torch.save"
    )


def _reason(error: Exception) -> str:
    """Extract what torch found from its long message, without its advice."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0]


def _safetensors(path: Path, subject: str) -> object:
    try:
        load: Callable[[Path], dict[str, Tensor]] = import_module("safetensors.torch").load_file
    except ImportError as error:
        raise KDHooksError(
            f"{subject}: '{path}' is a safetensors file, which needs the package safetensors; "
            "pip install safetensors"
        ) from error
    try:
        return load(path)
    except Exception as error:
        raise KDHooksError(
            f"{subject}: '{path}' can't be read as safetensors ({error}); copy or download it again"
        ) from error
