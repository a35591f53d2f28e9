"""The arguments of a Distiller and of a Teacher are checked before they are used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdhooks import Distiller, KDHooksError, Teacher
from kdhooks.testing import TinyFaceNet, tiny_teacher
from kdhooks_plugins.fcd import FCD
from tests.small_distiller import SMALL, distil, student


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"student_embedding": None}, "Distiller: student_embedding must be a string; found None"),
        ({"student_stages": "layer1"}, r"student_stages must be a list .* write \['layer1'\]"),
        ({"teacher_stages": [3]}, r"Distiller: teacher_stages\[0\] must be a string; found 3"),
        ({"input_shape": 112}, "input_shape must be a list of 3 whole numbers; found 112"),
        ({"input_shape": (3, 32.0, 32)}, r"input_shape\[1\] must be a whole number; found 32.0"),
        ({"input_shape": (3, -1, 32)}, r"input_shape\[1\] must be at least 1; found -1"),
        ({"seed": -1}, "seed must be at least 0 and at most 9223372036854775807; found -1"),
        ({"seed": "0"}, "seed must be a whole number; found '0'; write 0, without quotes"),
        ({"seed": 1.5}, "seed must be a whole number; found 1.5"),
        ({"head": nn.Linear(12, 5)}, "head must be an object of class ClassShard; found Linear"),
        ({"host_head": "own"}, "host_head must be 'margin'; found 'own'"),
        ({"host_head": True}, "host_head must be 'margin'; found True"),
        ({"plugins": None}, "plugins must be a list; found None"),
        ({"run_student": 3}, "run_student must be a function; found 3"),
    ],
)
def test_a_distiller_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(KDHooksError, match=words):
        Distiller(student(), tiny_teacher(), ["fcd"], **{"input_shape": SMALL, **options})


@pytest.mark.parametrize("found", [None, "r50", TinyFaceNet, [nn.Identity()]])
def test_a_student_is_a_module(found: Any) -> None:
    with pytest.raises(KDHooksError, match="Distiller: student must be a module; found"):
        Distiller(found, tiny_teacher(), ["fcd"])


@pytest.mark.parametrize("methods", [None, 3, "fcd", {"fcd"}, {"name": "fcd"}, [], FCD()])
def test_methods_are_a_list(methods: Any) -> None:
    with pytest.raises(KDHooksError, match="methods must be a list of at least one method; found"):
        Distiller(student(), tiny_teacher(), methods, input_shape=SMALL)


def methods_of(methods: Any) -> list[str]:
    return list(Distiller(student(), tiny_teacher(), methods, input_shape=SMALL).losses)


def test_an_array_or_an_iterator_of_names_is_accepted() -> None:
    assert methods_of(np.array(["fcd", "sp"])) == ["fcd", "sp"]
    assert methods_of(iter(["fcd", "sp"])) == ["fcd", "sp"]


def test_the_same_object_twice_is_refused_in_one_line() -> None:
    method = FCD()
    with pytest.raises(KDHooksError, match=r"^each method .* the same object twice in methods$"):
        distil(method, method)


@pytest.mark.parametrize("found", [None, "r50.onnx", {"onnx": "x"}, Path("x"), TinyFaceNet])
def test_a_teacher_is_a_module_or_a_function(found: Any) -> None:
    with pytest.raises(KDHooksError, match="teacher must be a module or a function"):
        Teacher(found)
    with pytest.raises(KDHooksError, match="teacher must be a module or a function"):
        Teacher(tiny_teacher())  # type: ignore[arg-type]


def embed(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :12]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"run": "forward"}, "Teacher: run must be a function; found 'forward'"),
        ({"transform": 3}, "Teacher: transform must be a function; found 3"),
        ({"embedding": None}, "Teacher: embedding must be a string; found None"),
        ({"dtype": "float16"}, "Teacher: dtype must be an object of class dtype"),
        ({"dtype": torch.float64}, "dtype must be torch.float16 or torch.bfloat16; found torch.f"),
        ({"channels_last": "no"}, "channels_last must be true or false; found 'no'"),
        ({"side_stream": 1}, "side_stream must be true or false; found 1"),
        ({"cache": 3}, "teacher.cache must be a table; found 3"),
        ({"cache": {"folder": "x"}}, "teacher.cache has no option 'folder'"),
    ],
)
def test_a_teacher_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(KDHooksError, match=words):
        Teacher(embed, **options)


def test_a_folder_is_a_cache(tmp_path: Path) -> None:
    given: list[Any] = [tmp_path, str(tmp_path), {"path": tmp_path}]
    for cache in given:
        kept = Teacher(embed, cache=cache).cache
        assert kept is not None
        assert kept.path == tmp_path
