"""Mining the nearest other classes of each class: in chunks, resumed, and for the same rows."""

import json
import os
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdhooks import KDHooksError
from kdhooks.classes.rows import Rows
from kdhooks_plugins import neighbours
from kdhooks_plugins.neighbours import main, mine_into, mined, nearest_classes
from tests.maps import normal
from tests.references import coupleface as reference

ROWS = Rows.open(normal(0, 6, 4))
Disk = namedtuple("Disk", "free")


@pytest.mark.parametrize("chunk", [(1, 1), (3, 2), (2, 5), (4096, 4096)])
@pytest.mark.parametrize("max_sim", [None, 0.9, 0.3, 0.0])
@pytest.mark.parametrize(("c", "d", "k"), [(2, 3, 1), (5, 2, 4), (9, 4, 3), (12, 3, 11)])
def test_mining_agrees_with_the_equation(
    c: int, d: int, k: int, max_sim: float | None, chunk: tuple[int, int]
) -> None:
    prototypes = normal(c, c, d)
    found = nearest_classes(Rows.open(prototypes), k, max_sim, chunk=chunk)
    assert found.index.tolist() == reference.neighbours(prototypes.numpy(), k, max_sim)


@given(
    st.integers(2, 9),
    st.integers(1, 5),
    st.integers(0, 99),
    st.one_of(st.none(), st.floats(-0.9, 0.9)),
)
def test_a_class_is_never_its_own_neighbour_and_no_neighbour_repeats(
    c: int, d: int, seed: int, max_sim: float | None
) -> None:
    rows = Rows.open(normal(seed, c, d))
    for k in range(1, c):
        index = nearest_classes(rows, k, max_sim, chunk=(2, 3)).index
        for own, row in enumerate(index.tolist()):
            others = [m for m in row if m >= 0]
            assert own not in others
            assert len(set(others)) == len(others)
            assert row == others + [-1] * (k - len(others))


def test_a_class_is_not_its_own_neighbour_if_others_are_equal() -> None:
    index = nearest_classes(Rows.open(torch.ones(4, 3)), 3).index
    assert [sorted(row) for row in index.tolist()] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_classes_with_other_classes_too_close_are_counted() -> None:
    unit = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0]])
    assert nearest_classes(Rows.open(unit), 1, 0.9).passed_over == 2
    assert nearest_classes(Rows.open(unit), 1).passed_over == 0


@pytest.mark.parametrize("k", [0, 5, 9])
def test_k_must_be_among_the_other_classes(k: int) -> None:
    with pytest.raises(KDHooksError, match=f"between 1 and 4, the other classes; found {k}"):
        nearest_classes(Rows.open(normal(0, 5, 3)), k)


# --- in a folder -----------------------------------------------------------------------------


def stopped_after(count: int) -> object:
    def progress(chunks: Sequence[int], what: str) -> Iterator[int]:
        yield from chunks[:count]
        raise KeyboardInterrupt

    return progress


def test_a_stopped_run_resumes_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows.open(normal(0, 11, 4))
    monkeypatch.setattr(neighbours, "progress", stopped_after(3))
    with pytest.raises(KeyboardInterrupt):
        mine_into(tmp_path, rows, 3, 0.5, chunk=(2, 4))
    with pytest.raises(KDHooksError, match="it holds 3 of 6 among 11 classes"):
        mined(tmp_path, rows, 3, 0.5)
    left: list[int] = []

    def progress(chunks: Sequence[int], what: str) -> Sequence[int]:
        left.extend(chunks)
        return chunks

    monkeypatch.setattr(neighbours, "progress", progress)
    found = mine_into(tmp_path, rows, 3, 0.5, chunk=(2, 4))
    monkeypatch.undo()
    straight = nearest_classes(rows, 3, 0.5)
    assert left == [6, 8, 10]
    assert found.index.tolist() == straight.index.tolist()
    assert found.passed_over == straight.passed_over > 0
    assert mined(tmp_path, rows, 2, 0.5).index.tolist() == straight.index[:, :2].tolist()


def test_a_folder_is_refused_for_other_rows_or_another_bound(tmp_path: Path) -> None:
    rows, others = Rows.open(normal(0, 6, 4)), Rows.open(normal(1, 6, 4))
    mine_into(tmp_path, rows, 3)
    with pytest.raises(KDHooksError, match="was created from other rows than these; name another"):
        mined(tmp_path, others, 3, None)
    with pytest.raises(KDHooksError, match="was created from other rows than these; name another"):
        mine_into(tmp_path, others, 3)
    with pytest.raises(KDHooksError, match=r"was created with max_sim None, not 0\.7"):
        mined(tmp_path, rows, 3, 0.7)
    with pytest.raises(KDHooksError, match="was created with k 3, not 2"):
        mine_into(tmp_path, rows, 2)
    with pytest.raises(KDHooksError, match="must hold 5 of each class; it holds 3"):
        mined(tmp_path, rows, 5, None)


def test_an_empty_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"holds no mining\.json; create it with python -m"):
        mined(tmp_path, Rows.open(normal(0, 6, 4)), 3, None)


@pytest.fixture
def mining(tmp_path: Path) -> Path:
    mine_into(tmp_path, ROWS, 3)
    return tmp_path


def changed(folder: Path, edit: Callable[[NDArray[np.int32]], Any]) -> None:
    index = np.load(folder / "index.npy")
    edited = edit(index)
    np.save(folder / "index.npy", index if edited is None else edited)


def put(row: int, place: int, value: int) -> Callable[[NDArray[np.int32]], Any]:
    return lambda index: index.__setitem__((row, place), value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (put(2, 1, 6), r"0 to 5, each once, and -1 after them; class 2 has 6 at place 1; remove"),
        (put(2, 0, -2), "class 2 has -2 at place 0"),
        (put(4, 2, 4), "class 4 has 4 at place 2"),
        (lambda index: np.repeat(index[:, :1], 3, axis=1), "class 0 has . at place 1"),
        (put(1, 1, -1), "class 1 has .* at place 2"),
        (lambda index: index[:5], r"must hold \(6, 3\) of int32; found \(5, 3\) of int32"),
        (lambda index: index[:, :2], r"must hold \(6, 3\) of int32; found \(6, 2\) of int32"),
        (lambda index: index.astype(np.int64), r"found \(6, 3\) of int64"),
        (lambda index: index.astype(np.float32), r"found \(6, 3\) of float32"),
        (lambda index: np.asfortranarray(index), r"must hold \(6, 3\) of int32"),
        (lambda index: index.ravel(), r"found \(18,\) of int32"),
        (lambda index: np.array([None]), "can't be read .*damaged or truncated"),
    ],
)
def test_a_damaged_index_is_refused(
    edit: Callable[[NDArray[np.int32]], Any], said: str, mining: Path
) -> None:
    mined(mining, ROWS, 3, None)  # the unchanged index is accepted
    changed(mining, edit)
    before = (mining / "index.npy").read_bytes()
    with pytest.raises(KDHooksError, match=said):
        mined(mining, ROWS, 3, None)
    with pytest.raises(KDHooksError, match=said):
        mine_into(mining, ROWS, 3)
    assert (mining / "index.npy").read_bytes() == before


@pytest.mark.parametrize("length", [-1, -70, -200, 1, 12, None])
def test_an_index_of_another_length_is_refused_and_never_extended(
    length: int | None, mining: Path
) -> None:
    path = mining / "index.npy"
    content = path.read_bytes()
    path.write_bytes(
        b"" if length is None else content[:length] if length < 0 else content + bytes(length)
    )
    before = path.read_bytes()
    with pytest.raises(
        KDHooksError, match=r"index\.npy' (can't be read|must have \d+ bytes; found)"
    ):
        mined(mining, ROWS, 3, None)
    with pytest.raises(
        KDHooksError, match=r"index\.npy' (can't be read|must have \d+ bytes; found)"
    ):
        mine_into(mining, ROWS, 3)
    assert path.read_bytes() == before


def test_a_complete_index_is_only_read(mining: Path) -> None:
    for path in mining.iterdir():
        os.utime(path, (1, 1))
    mined(mining, ROWS, 2, None)
    assert {path.stat().st_mtime for path in mining.iterdir()} == {1}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{", "can't be read"),
        ("[]", "must contain classes, k, done, passed_over"),
        ('{"classes": 6, "k": 3, "done": -1, "passed_over": 0}', "must contain classes, k, done"),
        ('{"classes": 6, "k": 3, "done": "6", "passed_over": 0}', "must contain classes, k, done"),
        ('{"classes": 6, "k": 3, "done": 6, "passed_over": 0}', "must contain digests as rows"),
    ],
)
def test_a_damaged_state_is_refused(state: str, said: str, mining: Path) -> None:
    (mining / "mining.json").write_text(state)
    with pytest.raises(KDHooksError, match=said):
        mined(mining, ROWS, 3, None)


def test_a_folder_that_cannot_hold_an_index_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KDHooksError, match="file' must be a folder that can be written; found 'Fi"):
        mine_into(tmp_path / "file", ROWS, 3)
    (tmp_path / "index.npy").write_bytes(b"of something else")
    with pytest.raises(KDHooksError, match=r"index\.npy' exists without mining\.json; remove it"):
        mine_into(tmp_path, ROWS, 3)
    assert (tmp_path / "index.npy").read_bytes() == b"of something else"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Disk(free=71))
    with pytest.raises(KDHooksError, match=r"no room for .*index\.npy', \(6, 3\) of int32"):
        mine_into(tmp_path / "full", ROWS, 3)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Disk(free=72))
    mine_into(tmp_path / "full", ROWS, 3)


@pytest.mark.parametrize("max_sim", [float("nan"), 70.0, -1.1])
def test_a_bound_that_is_no_cosine_is_refused(max_sim: float) -> None:
    with pytest.raises(KDHooksError, match=r"max_sim is a cosine, from -1 to 1.*; found"):
        nearest_classes(ROWS, 3, max_sim)


def test_a_missing_device_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(normal(0, 6, 4).float(), tmp_path / "rows.pt")
    for device in ("gpu", "cuda:99", "meta"):
        argv = [str(tmp_path / "rows.pt"), "--k", "2", "--out", str(tmp_path), "--device", device]
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        said = capsys.readouterr().err
        assert "--device: must " in said
        assert device in said


def test_the_command_mines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(normal(0, 6, 4).float(), tmp_path / "rows.pt")
    out = tmp_path / "mined"
    assert main([str(tmp_path / "rows.pt"), "--k", "2", "--out", str(out), "--device", "cpu"]) == 0
    assert "2 neighbours of 6 classes" in capsys.readouterr().out
    assert json.loads((out / "mining.json").read_text())["done"] == 6
    assert main([str(tmp_path / "absent.pt"), "--out", str(out)]) == 2
    assert "no file matches" in capsys.readouterr().err
