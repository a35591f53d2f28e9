"""Verification files of every known form are read, and code in a file is never run."""

import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytest

from kdhooks import KDHooksError
from kdhooks.evaluation.pickled_pairs import read_pickled_pairs

PICTURES = [b"one", b"\xff\xd8\x00two", b"three", b"four\n"]
SAME = [True, False]
FLAGS: dict[str, object] = {
    "bools": SAME,
    "tuple": (True, False),
    "numbers": [1, 0],
    "numpy bools": list(np.array(SAME)),
    "array": np.array(SAME),
    "array of numbers": np.array([1, 0]),
    "array of the other byte order": np.array([1, 0], ">i4"),
    "array of objects": np.array(SAME, dtype=object),
}
CONTENTS: dict[str, Callable[[bytes], object]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "array": lambda content: np.frombuffer(content, np.uint8),
    "column": lambda content: np.frombuffer(content, np.uint8)[:, None],
}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "lfw.bin"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("contents", "flags"),
    [
        *((each, "bools") for each in CONTENTS),
        *(("bytes", each) for each in FLAGS if each != "bools"),
    ],
)
def test_every_form_is_read(contents: str, flags: str, protocol: int, tmp_path: Path) -> None:
    given = [CONTENTS[contents](content) for content in PICTURES]
    found = read_pickled_pairs(
        write(tmp_path, pickle.dumps((given, FLAGS[flags]), protocol)), "data"
    )
    assert found.pictures == PICTURES
    assert found.same.tolist() == SAME


@pytest.mark.parametrize("protocol", range(6))
def test_an_array_of_pictures_is_read(protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps((np.array(PICTURES, dtype=object), SAME), protocol)
    found = read_pickled_pairs(write(tmp_path, content), "data")
    assert (found.pictures, found.same.tolist()) == (PICTURES, SAME)


def test_text_of_python_2_is_read(tmp_path: Path) -> None:
    """Python 2 wrote pictures as str, by opcodes that Python 3 no longer writes."""
    strings = b"".join(b"U" + bytes([len(one)]) + one for one in PICTURES)
    content = b"\x80\x02](" + strings + b"e](\x88\x89e\x86."
    assert {"SHORT_BINSTRING"} <= {code.name for code, _, _ in pickletools.genops(content)}
    found = read_pickled_pairs(write(tmp_path, content), "data")
    assert (found.pictures, found.same.tolist()) == (PICTURES, SAME)
    with pytest.raises(UnicodeDecodeError):  # shows that the file is one of Python 2
        pickle.loads(content)


class Runs:
    """Unpickling calls the function with the arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "place",
    [
        lambda runs: runs,
        lambda runs: (runs, SAME),
        lambda runs: ([runs] * 4, SAME),
        lambda runs: (PICTURES, [True, runs]),
        lambda runs: (PICTURES, SAME, runs),
        lambda runs: (np.array([runs], dtype=object), SAME),
    ],
)
def test_code_in_a_file_is_not_run(place: Callable[[object], object], tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content = pickle.dumps(place(Runs(Path.touch, trap)))
    with pytest.raises(KDHooksError, match="since it could run code; found the name "):
        read_pickled_pairs(write(tmp_path, content), "data")
    assert not trap.exists()
    pickle.loads(content)
    assert trap.exists()  # plain pickle runs the code


def test_a_file_cannot_change_an_allowed_name(tmp_path: Path) -> None:
    """Opcode BUILD sets attributes of a named object, such as the defaults of a function."""
    content = b"\x80\x02c_codecs\nencode\n}X\x01\x00\x00\x00aK\x01sb."
    with pytest.raises(KDHooksError, match=r"found changes to _codecs\.encode"):
        read_pickled_pairs(write(tmp_path, content), "data")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (7, "found an object of class int"),
        ((PICTURES, SAME, 1), "found a tuple of 3"),
        (({"a": 1}, SAME), "found an object of class dict in place of the pictures"),
        ((PICTURES, "yes"), "found an object of class str in place of the flags"),
        ((["text"] * 4, SAME), "found an object of class str as picture 0"),
        ((PICTURES, [1, 2]), "found 2 as flag 1"),
        ((PICTURES, [1.0, 0.0]), "found an object of class float as flag 0"),
        ((PICTURES, np.array([1.0, 0.0])), "found an array of type f8"),
        ((PICTURES, np.array([None, None])), "found an object of class NoneType as flag 0"),
        (([np.zeros((2, 2, 3), np.uint8)] * 4, SAME), "uint8 (2, 2, 3) as picture 0, where the"),
        (([np.zeros(5, np.int16)] * 4, SAME), "found an array int16 (5,) as picture 0"),
        ((PICTURES[:3], SAME), "two pictures for each flag; found 3 pictures and 2 flags"),
        ((np.array(PICTURES), SAME), "found an array of type S6"),
        (([], []), "found 0 pictures and 0 flags"),
    ],
)
def test_other_content_is_refused(content: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=re.escape(said)):
        read_pickled_pairs(write(tmp_path, pickle.dumps(content)), "data")


@pytest.mark.parametrize(
    "content", [b"no pickle", pickle.dumps((PICTURES, SAME))[:-9], b"\x80\x02."]
)
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"such as lfw\.bin, a pickle of .*; it can't be read"):
        read_pickled_pairs(write(tmp_path, content), "data")


def test_a_message_of_pickle_is_joined_to_one_line(tmp_path: Path) -> None:
    content = b"\x80\x02K\x01Q."  # a persistent id
    with pytest.raises(UnpicklingError, match="\n"):
        pickle.loads(content)
    with pytest.raises(KDHooksError, match=r"^[^\n]*persistent id[^\n]*$"):
        read_pickled_pairs(write(tmp_path, content), "data")


def test_a_file_that_is_absent_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match="there is no file"):
        read_pickled_pairs(tmp_path / "absent.bin", "data")
    with pytest.raises(KDHooksError, match="is empty"):
        read_pickled_pairs(write(tmp_path, b""), "data")
