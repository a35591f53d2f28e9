"""The cache of one teacher and one image size is refused for all others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdhooks import InputTransform, KDHooksError, Teacher
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.fingerprints import HEADER
from kdhooks.teacher.session import TeacherSession
from tests.cache_samples import Counting, Mean, filled, started, views
from tests.test_recipe import export


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"module": Counting(gain=1.001)},
            r"was filled with weights '[0-9a-f]{64}', but this teacher has",
        ),
        (
            {"transform": InputTransform(order="bgr")},
            "was filled with input .InputTransform.*'rgb'",
        ),
        ({"dtype": torch.bfloat16}, "with dtype 'torch.float32', but this teacher has 'torch.b"),
        ({"module": Counting(dim=8)}, "was filled with dim 12, but this teacher has 8"),
        (
            {"embedding": "inner.fc"},
            "was filled with embedding '', but this teacher has 'inner.fc'",
        ),
    ],
)
def test_another_teacher_is_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    filled(tmp_path)
    started(tmp_path)  # the same teacher is accepted
    with pytest.raises(KDHooksError, match=match):
        started(tmp_path, **options)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    teacher = Teacher(Mean(), cache=CacheOptions(path=tmp_path))
    TeacherSession(teacher, like=torch.zeros(1, 3, 8, 8))
    with pytest.raises(KDHooksError, match=r"filled with images \[3, 8, 8\], .* has \[3, 4, 4\]"):
        TeacherSession(teacher, like=torch.zeros(1, 3, 4, 4))


def test_functions_are_identified_by_their_embeddings(tmp_path: Path) -> None:
    started(tmp_path, lambda images: images.mean(dim=(2, 3)))
    started(tmp_path, lambda images: images.mean(dim=(2, 3)) * 1.001)
    with pytest.raises(KDHooksError, match=r"another teacher: embeddings of one fixed batch are 9"):
        started(tmp_path, lambda images: images.mean(dim=(2, 3)) * 1.1)


class Named:
    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def test_a_file_that_runs_as_a_function_is_identified_by_its_hash(tmp_path: Path) -> None:
    for _ in range(2):
        started(tmp_path, Named("1f"))
    with pytest.raises(KDHooksError, match="with weights '1f', but this teacher has '2e'"):
        started(tmp_path, Named("2e"))


@pytest.mark.parametrize("convert", [False, True])
def test_an_onnx_file_has_the_same_fingerprint_in_each_run(convert: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export(Counting().inner, views(0, 4), tmp_path / "teacher.onnx")
    spec = {"onnx": tmp_path / "teacher.onnx", "convert": convert, "cache": tmp_path / "cache"}
    recipe = Recipe.read({"teacher": spec, "methods": ["fcd"]})
    for hits in (0, 4):
        teacher = TeacherSession(build_teacher(recipe), like=views(0, 1))
        teacher(views(0, 4))
        assert teacher.cache is not None
        assert teacher.cache.hits == hits
        teacher.close()
    assert '"weights": null' not in (tmp_path / "cache" / HEADER).read_text()


def test_embeddings_of_length_zero_match(tmp_path: Path) -> None:
    for _ in range(2):
        teacher = started(tmp_path, lambda images: images.mean(dim=(2, 3)).clamp(1, 2) - 1)
        assert not teacher(views(0, 4)).embedding.any()
        teacher.close()


def test_a_users_own_transform_is_identified_by_the_embeddings(tmp_path: Path) -> None:
    for _ in range(2):
        started(tmp_path, transform=lambda images: images.flip(1))
    with pytest.raises(KDHooksError, match="embeddings of one fixed batch are"):
        started(tmp_path, transform=lambda images: images.flip(-1))


def test_the_first_of_two_processes_that_create_a_folder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    before = (tmp_path / HEADER).read_text()
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # the second process saw no header
    with pytest.raises(KDHooksError, match="was filled with weights"):
        started(tmp_path, Counting(gain=2.0))
    assert (tmp_path / HEADER).read_text() == before
    assert list(tmp_path.glob(f"{HEADER}.*")) == []


def test_an_edited_forward_is_noticed_even_with_the_same_weights(tmp_path: Path) -> None:
    filled(tmp_path)
    module = Counting()
    module.inner.register_forward_hook(lambda _, args, output: output.flip(1))
    with pytest.raises(KDHooksError, match="embeddings of one fixed batch are"):
        started(tmp_path, module)


def test_rows_of_another_teacher_are_noticed_on_the_first_batch(tmp_path: Path) -> None:
    """This happens if files are copied from one cache to another."""
    filled(tmp_path / "one")
    other = started(tmp_path / "other", Counting(gain=2.0))
    other(views(0, 8))
    other.close()
    for path in (tmp_path / "other").glob("*.[kr]*s"):
        path.replace(tmp_path / "one" / path.name)
    with pytest.raises(
        KDHooksError, match=r"another teacher: its rows for the first batch are 100"
    ):
        started(tmp_path / "one")(views(0, 8))


@pytest.mark.parametrize("content", ["", "{", "[1"])
def test_a_header_that_cannot_be_read_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / HEADER).write_text(content)
    with pytest.raises(KDHooksError, match=r"teacher\.json' can't be read .*; remove the folder"):
        started(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 2}'])
def test_a_header_of_another_format_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / HEADER).write_text(content)
    with pytest.raises(KDHooksError, match=r"must have format 1, as .*; remove the folder"):
        started(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": None},
        {"dim": "12"},
        {"dim": 11},
        {"probe": None},
        {"probe": 3},
        {"probe": [[1.0], [1.0, 2.0]]},
        {"probe": [["x"] * 12] * 2},
        {"probe": [[1.0] * 12]},
        {"probe": [[float("nan")] * 12] * 2},
        {"dim": 0, "probe": [[], []]},
    ],
)
def test_a_damaged_header_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    filled(tmp_path)
    header = json.loads((tmp_path / HEADER).read_text())
    (tmp_path / HEADER).write_text(json.dumps(header | changes))
    with pytest.raises(KDHooksError, match=r"must hold dim, and probe with two.*remove the folder"):
        started(tmp_path)


def test_a_header_without_a_key_is_refused_as_damaged(tmp_path: Path) -> None:
    filled(tmp_path)
    header = json.loads((tmp_path / HEADER).read_text())
    del header["input"]
    (tmp_path / HEADER).write_text(json.dumps(header))
    with pytest.raises(KDHooksError, match="and images, weights, input, dtype; it is damaged"):
        started(tmp_path)


def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        KDHooksError, match=r"can't be created .*; free some space, or specify another"
    ):
        started(tmp_path / "file" / "cache")
