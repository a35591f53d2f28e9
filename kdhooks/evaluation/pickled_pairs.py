"""Verification files such as lfw.bin, read without running code that they carry.

They are pickles of two lists: encoded pictures, two for each pair, and flags, whether each pair is
of one person. Python 2, Python 3 and numpy have written these in several ways. Everything else is
refused. No name in a file is ever imported, so no code of the file can run.
"""

import codecs
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError, in_one_line
from kdhooks.tensor_files import first_bytes, user_path

_FLAGS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
_ENTRIES = "lists of encoded pictures (bytes, or arrays of uint8) and of flags"


class PickledPairs(NamedTuple):
    pictures: list[bytes]  # encoded; 2i and 2i + 1 are those of pair i
    same: NDArray[np.bool_]  # (p)


def read_pickled_pairs(path: str | Path, subject: str) -> PickledPairs:
    """Read the pictures and flags of a file.

    subject: the name of the option, with which each error message starts.
    """
    path = user_path(path, subject)
    first_bytes(path, subject)
    try:
        with path.open("rb") as file:
            content: object = _Reader(file, encoding="bytes").load()
    except _Refused as error:
        raise KDHooksError(
            f"{subject}: '{path}' must hold {_ENTRIES}, and nothing else is read, since it could "
            f"run code; found {error}; write it again as a pickle of lists"
        ) from error
    except Exception as error:  # a damaged file can cause any
        raise KDHooksError(
            f"{subject}: '{path}' must be a verification file such as lfw.bin, a pickle of "
            f"{_ENTRIES}; it can't be read ({in_one_line(error)}); fetch it again"
        ) from error
    try:
        pictures, same = _opened(content)
    except _Refused as error:
        raise KDHooksError(
            f"{subject}: '{path}' must hold {_ENTRIES}; found {error}; write it again as a pickle "
            "of the two lists"
        ) from error
    if not len(same) or len(pictures) != 2 * len(same):
        raise KDHooksError(
            f"{subject}: '{path}' must hold two pictures for each flag; found {len(pictures)} "
            f"pictures and {len(same)} flags; fetch it again, or write it again"
        )
    return PickledPairs(pictures, same)


class _Refused(Exception):
    """Something else was found in place of an entry; the message names it."""


# --- the reader, which creates a stand-in for every name -----------------------------------------


class _Name:
    """Stands in for a function or class that the file names, which is not imported."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, *arguments: object) -> "_Made":
        return _Made(self.text, arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise _Refused(f"changes to {self.text}")


class _Made:
    """Stands in for the object that a call of the name would return."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[object, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Name:
        text = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if text not in _KNOWN and text not in _ARGUMENTS:
            raise _Refused(f"the name {text}")
        return _Name(text)


# --- the entries, converted from stand-ins -------------------------------------------------------


def _opened(content: object) -> PickledPairs:
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise _Refused(_kind(content))
    pictures, flags = _entry(content[0]), content[1]
    if not isinstance(pictures, list | tuple):
        raise _Refused(f"{_kind(pictures)} in place of the pictures")
    known = _entry(flags)
    if isinstance(known, np.ndarray) and known.ndim == 1:
        given = list(known)
    elif isinstance(known, list | tuple):
        given = [_entry(flag) for flag in known]
    else:
        raise _Refused(f"{_kind(flags)} in place of the flags")
    return PickledPairs(
        [_picture(_entry(picture), number) for number, picture in enumerate(pictures)],
        np.array([_flag(flag, number) for number, flag in enumerate(given)], dtype=np.bool_),
    )


def _picture(found: object, number: int) -> bytes:
    if isinstance(found, np.ndarray):
        if found.dtype == np.uint8 and found.size == max(found.shape, default=0):
            return found.tobytes()
        raise _Refused(
            f"an array {found.dtype} {found.shape} as picture {number}, where the content of an "
            "encoded picture is needed, uint8 (n,)"
        )
    if isinstance(found, bytes | bytearray):
        return bytes(found)
    raise _Refused(f"{_kind(found)} as picture {number}")


def _flag(found: object, number: int) -> bool:
    if isinstance(found, bool | int | np.bool_ | np.integer) and found in (0, 1):
        return bool(found)
    shown = found if isinstance(found, int | np.integer) else _kind(found)
    raise _Refused(f"{shown} as flag {number}")


def _entry(found: object) -> object:
    """Convert a stand-in to the array, number or bytes that it describes; keep anything else."""
    if not isinstance(found, _Made):
        return found
    try:
        return _KNOWN[found.name](found)
    except _Refused:
        raise
    except Exception as error:  # the name does not accept these arguments
        raise _Refused(f"{found.name} with other arguments than numpy writes ({error})") from error


def _array(found: _Made) -> object:
    _, shape, kind, fortran, content = found.state
    if isinstance(content, list) and len(shape) == 1:  # an array of objects
        return content
    return _shaped(content, kind, shape, "F" if fortran else "C")


def _array_of_buffer(found: _Made) -> NDArray[Any]:
    content, kind, shape, order = found.arguments
    return _shaped(content, kind, shape, _text(order))


def _shaped(content: Any, kind: object, shape: Any, order: Any) -> NDArray[Any]:
    content = _entry(content)
    if not isinstance(content, bytes | bytearray):
        raise _Refused(f"an array of {_kind(content)}")
    return np.frombuffer(content, _dtype(kind)).reshape(shape, order=order)


def _number(found: _Made) -> object:
    kind, content = found.arguments
    content = _entry(content)
    if not isinstance(content, bytes):
        raise _Refused(f"a number of {_kind(content)}")
    (number,) = np.frombuffer(content, _dtype(kind))
    return number


def _dtype(found: object) -> np.dtype[Any]:
    if not isinstance(found, _Made) or found.name != "numpy.dtype":
        raise _Refused(f"{_kind(found)} as the type of an array")
    code = _text(found.arguments[0])
    if code not in _FLAGS:
        raise _Refused(f"an array of type {code}")
    order = _text(found.state[1]) if found.state else "|"
    return np.dtype(f"{order}{code}")


def _bytes(found: _Made) -> bytes:
    """Read bytes as Python 3 writes them in older protocols: as text in Latin-1, or no argument."""
    if not found.arguments:
        return b""
    text, *encodings = found.arguments
    if not encodings and isinstance(content := _entry(text), bytes):
        return content
    (encoding,) = encodings
    if not isinstance(text, str) or codecs.lookup(_text(encoding)).name != "iso8859-1":
        raise _Refused(f"text in the encoding {encoding!r}")
    return text.encode("latin-1")


def _text(found: Any) -> str:
    """Return a text; the reader returns Python 2's text as bytes."""
    text: str = found.decode("ascii") if isinstance(found, bytes) else found
    return text


def _kind(found: object) -> str:
    if isinstance(found, _Made):
        return "an array" if found.name in _ARRAYS else f"an object of {found.name}"
    if isinstance(found, list | tuple):
        return f"a {type(found).__name__} of {len(found)}"
    return f"an object of class {type(found).__name__}"


_KNOWN: dict[str, Callable[[_Made], object]] = {
    "numpy.core.multiarray._reconstruct": _array,
    "numpy.core.numeric._frombuffer": _array_of_buffer,
    "numpy.core.multiarray.scalar": _number,
    "_codecs.encode": _bytes,
    "builtins.bytes": _bytes,
    "__builtin__.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "__builtin__.bytearray": _bytes,
}
_ARRAYS = [name for name, made in _KNOWN.items() if made in (_array, _array_of_buffer)]
_ARGUMENTS = ("numpy.dtype", "numpy.ndarray")
