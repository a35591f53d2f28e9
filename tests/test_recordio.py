"""train.rec and train.idx: truncated, damaged or mismatched files are refused."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")

from benchmarks.recordio_files import MAGIC, labelled, people, record, write_records
from kdhooks import KDHooksError
from kdhooks.pictures import Unreadable, encode
from kdhooks_integrations.arcface_torch.commands.recordio import (
    MXIndexedRecordIO,
    Records,
    unpack,
)

Labels = list[float]


def write(folder: Path, entries: list[bytes], keys: list[int] | None = None) -> Path:
    """Write records with these contents, with keys from 0 or the keys given."""
    offset, lines = 0, []
    with (folder / "train.rec").open("wb") as file:
        for key, entry in zip(keys or range(len(entries)), entries, strict=True):
            lines.append(f"{key}\t{offset}\n")
            offset += file.write(record(entry))
    (folder / "train.idx").write_text("".join(lines))
    return folder


def opened(folder: Path, flag: str = "r") -> MXIndexedRecordIO:
    return MXIndexedRecordIO(f"{folder}/train.idx", f"{folder}/train.rec", flag)


def test_pictures_and_labels_have_their_keys_as_names(tmp_path: Path) -> None:
    samples = people(3, 2)
    write_records(tmp_path, samples)
    records = Records(tmp_path)
    assert records.names == ["1", "2", "3", "4", "5", "6"]
    for name, (pixels, who) in zip(records.names, samples, strict=True):
        np.testing.assert_array_equal(records.pixels(name), pixels)
        assert records.label(name) == who


def test_without_a_header_record_every_key_is_a_picture(tmp_path: Path) -> None:
    picture = encode(people(1, 1)[0][0])
    write(tmp_path, [labelled(label, 0, picture) for label in (2.0, 5.0)])
    records = Records(tmp_path)
    assert [(name, records.label(name)) for name in records.names] == [("0", 2), ("1", 5)]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("", "must list each key once, with an offset of at least 0; found 0 such keys in 0 lines"),
        (
            "0\t0\n0\t0\n",
            "found 1 such keys in 2 lines; the .rec and the .idx must",
        ),
        ("0\t-4\n", "found 0 such keys in 1 lines"),
        ("0 0\n", "must have a key, a tab and an offset in each line; found: invalid literal"),
        ("0\t0\t0\n", "must have a key, a tab and an offset in each line; found: too many values"),
        ("\ufeff0\t0\n", "must have a key, a tab and an offset in each line; found: 'ascii' codec"),
        (
            "0\t4\n",
            "has no record for key 0 at the offset in its index; the .rec and the .idx must",
        ),
        ("0\t0\n1\t99999\n", "has no record for key 1 at the offset in its index"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, [labelled(0.0, 0, b"content")])
    (tmp_path / "train.idx").write_text(index, encoding="utf-8")
    with pytest.raises(KDHooksError, match=re.escape(said)):
        opened(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"train\.idx' must have .*No such file"):
        opened(tmp_path)
    (tmp_path / "train.idx").write_text("0\t0\n")
    with pytest.raises(KDHooksError, match=r"train\.rec' can't be opened \(No such file"):
        opened(tmp_path)
    with pytest.raises(KDHooksError, match=r"can be read \(flag 'r'\) without mxnet; found 'w'"):
        opened(tmp_path, "w")


def test_a_file_cut_short_is_found_when_it_is_opened(tmp_path: Path) -> None:
    write_records(tmp_path, people(2, 2))
    content = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(content[:-100])
    with pytest.raises(KDHooksError, match="is truncated or damaged in the record of key 4; fetch"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", [2, 3, 5])
def test_a_record_that_begins_in_its_middle_is_refused(kind: int, tmp_path: Path) -> None:
    (tmp_path / "train.rec").write_bytes(MAGIC + struct.pack("<I", kind << 29 | 4) + b"abcd")
    (tmp_path / "train.idx").write_text("0\t0\n")
    with pytest.raises(KDHooksError, match="is truncated or damaged in the record of key 0"):
        opened(tmp_path)


def test_a_record_without_its_last_part_is_refused(tmp_path: Path) -> None:
    first = MAGIC + struct.pack("<I", 1 << 29 | 4) + b"abcd"
    (tmp_path / "train.rec").write_bytes(first + record(b"another"))
    (tmp_path / "train.idx").write_text("0\t0\n")
    with pytest.raises(KDHooksError, match="is truncated or damaged in the record of key 0"):
        opened(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    write(tmp_path, [labelled(0.0, 0, b"")], keys=[7])
    assert opened(tmp_path).keys == [7]
    with pytest.raises(KDHooksError, match=r"its index has no key 0; the \.rec and the .idx must"):
        Records(tmp_path)


@pytest.mark.parametrize("content", [b"short", struct.pack("<IfQQ", 9, 0.0, 0, 0) + b"labels"])
def test_a_record_without_a_whole_header_is_refused(content: bytes) -> None:
    with pytest.raises(
        KDHooksError, match=rf"a record of {len(content)} bytes has no complete header"
    ):
        unpack(content)


@pytest.mark.parametrize("end", [float("nan"), float("inf"), 1e30, 0.0, 1.0, 2.5, 4.0])
def test_a_header_record_with_another_end_is_refused(end: float, tmp_path: Path) -> None:
    picture = labelled([0.0, 0.0], 1, encode(people(1, 1)[0][0]))
    write(tmp_path, [labelled([end, end], 0, b""), picture, picture])
    with pytest.raises(KDHooksError, match=f"found the end {end:g} and 3 keys".replace("+", ".")):
        Records(tmp_path)


def test_a_header_record_needs_all_keys(tmp_path: Path) -> None:
    picture = labelled([0.0, 0.0], 1, encode(people(1, 1)[0][0]))
    write(tmp_path, [labelled([3.0, 3.0], 0, b""), picture, picture], keys=[0, 1, 5])
    with pytest.raises(
        KDHooksError, match="its index must have all keys before it; found the end 3 and 3"
    ):
        Records(tmp_path)


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf")])
def test_a_label_that_is_no_class_number_is_refused(label: float, tmp_path: Path) -> None:
    write(tmp_path, [labelled(label, 0, encode(people(1, 1)[0][0]))])
    with pytest.raises(Unreadable, match=f"has the label {label:g}, which must be a class number"):
        Records(tmp_path).label("0")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: labelled(0.0, 0, b"no picture"), "'1' can't be read as an image of the"),
        (lambda content: b"short", "'1' is no record: a record of 5 bytes has no complete header"),
        (
            lambda content: labelled(0.0, 0, encode(people(1, 1)[0][0][:9])),
            "'1' is 112x9 (width x h",
        ),
    ],
)
def test_records_that_are_no_pictures_are_found_before_a_pass(
    damage: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    good = labelled(0.0, 0, encode(people(1, 1)[0][0]))
    write(tmp_path, [good, damage(good), good])
    records = Records(tmp_path)
    with pytest.raises(KDHooksError, match="found 1 faults among 3 pictures") as caught:
        records.check(records.names, (112, 112))
    assert said in str(caught.value)
