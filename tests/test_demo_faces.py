"""The demo's faces and pairs: people for training and for testing, and files that are refused."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from kdhooks import KDHooksError
from kdhooks_demo.faces import read_faces
from kdhooks_demo.pairs import (
    make_pairs,
    read_pairs,
    split_by_pairs,
    split_by_people,
    splits_by_people,
)
from tests.demo_faces import made_faces, written

# --- reading ---------------------------------------------------------------------------------


def test_folder_and_zip_read_alike(tmp_path: Path) -> None:
    faces = made_faces()
    folder = written(faces, tmp_path / "faces")
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, f"top/{path.relative_to(folder)}")
        archive.writestr("top/readme.txt", "no face")
    for source in (folder, tmp_path / "faces.zip"):
        found = read_faces(source)
        assert found.names == faces.names
        assert torch.equal(found.images, faces.images)
    assert found.labels.tolist() == [person for person in range(6) for _ in range(4)]


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    for person in "ab":
        (tmp_path / person).mkdir()
        Image.new("L", (112, 112), 77).save(tmp_path / person / "1.png")
    assert (read_faces(tmp_path).images == 77).all()


def picture(path: Path, size: tuple[int, int] = (112, 112)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def test_unreadable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match="must be a folder or a zip file with pictures"):
        read_faces(tmp_path / "absent")
    picture(tmp_path / "a" / "1.png")
    with pytest.raises(KDHooksError, match="of two people at least; found 1 images"):
        read_faces(tmp_path)
    picture(tmp_path / "b" / "2.png", (100, 90))
    (tmp_path / "b" / "3.png").write_bytes(b"no image")
    with pytest.raises(KDHooksError, match="found 2 faults among 3 pictures") as caught:
        read_faces(tmp_path)
    assert "'b/2.png' is 100x90 (width x height), but 112x112 is needed" in str(caught.value)
    assert "'b/3.png' can't be read as an image" in str(caught.value)


def test_pictures_cut_short_are_all_named(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg"):
        picture(tmp_path / name)
        if name != "a/1.jpg":
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
    with pytest.raises(
        KDHooksError, match=r"found 2 faults .*'b/1\.jpg' can't be .*'b/2\.jpg' can"
    ):
        read_faces(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["p1/day/1.png", "p2/day/2.png"],
            "one folder per person; found 'p1/day' and 'p2/day'; ren",
        ),
        (["p1/1.png", "p1/day/2.png"], "not hold another one; found 'p1/day' in 'p1' of"),
        (["p1/1.png", "p1/1.jpg", "p2/1.png"], "holds two images 'p1/1'; rename one"),
    ],
)
def test_people_are_not_guessed_from_nested_folders(
    names: list[str], said: str, tmp_path: Path
) -> None:
    for name in names:
        picture(tmp_path / name)
    with pytest.raises(KDHooksError, match=said):
        read_faces(tmp_path)


def test_pictures_of_nobody_are_skipped_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("p1/1.png", "p2/2.png", "sheet.png"):
        picture(tmp_path / name)
    assert read_faces(tmp_path).names == ("p1/1", "p2/2")
    assert "faces: skipped 1 images in no person's folder: sheet.png" in caplog.text


# --- people for training and for testing -----------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nobody_tested_is_trained_on(seed: int) -> None:
    faces = made_faces(people=8)
    split = split_by_people(faces, 0.25, seed)
    assert not set(split.train.people) & set(split.test.people)
    assert len(set(split.test.people)) == 2
    again = split_by_people(faces, 0.25, seed)
    assert again.pairs.names == split.pairs.names


@pytest.mark.parametrize("seed", [0, 1])
def test_each_part_of_the_people_is_tested_on_once(seed: int) -> None:
    faces = made_faces(people=9)
    alone = np.array([name != "p8" for name in faces.people]) | (np.arange(len(faces)) % 4 == 0)
    faces = faces.where(alone)  # p8 has one image, so that there is no pair of it
    splits = splits_by_people(faces, 3, seed)
    tested = [person for split in splits for person in sorted(set(split.test.people))]
    assert sorted(tested) == [f"p{number}" for number in range(8)]
    for split in splits:
        assert {*split.train.people} == {*faces.people} - {*split.test.people}
    assert splits_by_people(faces, 3, seed)[1].pairs.names == splits[1].pairs.names


def test_pairs_are_balanced_and_true() -> None:
    faces = made_faces()
    pairs = make_pairs(faces, 0)
    assert pairs.same.sum() == (~pairs.same).sum() == 36
    for (one, other), same in zip(pairs.names, pairs.same, strict=True):
        assert one != other
        assert (one.split("/")[0] == other.split("/")[0]) == same
    assert len(set(map(frozenset, pairs.names))) == len(pairs.names)


def test_lfw_pairs_are_read_from_the_last_fifth_of_the_folds(tmp_path: Path) -> None:
    lines = ["10 1"]
    for fold in range(10):
        lines += [f"p{fold % 6} 1 2", f"p{fold % 6} 1 p{(fold + 1) % 6} 3"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs.names[0] == ("p2/p2_0001", "p2/p2_0002")
    assert pairs.names[1] == ("p2/p2_0001", "p3/p3_0003")
    assert pairs.same.tolist() == [True, False, True, False]
    split = split_by_pairs(made_faces(), pairs)
    assert set(split.train.people) == {"p0", "p1", "p5"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "pairs.txt' is empty; name a file such as LFW's pairs.txt"),
        (" \n\n", "pairs.txt' is empty"),
        ("ten", "must start with the number of folds"),
        ("1" * 5000 + " 1", "must start with the number of folds"),
        ("\u0662 1", "must start with the number of folds"),
        ("1 1\np1 1 2\np1 1 p2 2", "must hold two folds or more"),
        ("2 0", "must hold two folds or more.*found 0 pairs"),
        ("2 1\np1 1 2\np1 1 p2 2\np1 1 2\np1 1 3", "found 2 of one person among the 2 of fold 2"),
        ("2 1\np1 1 p3 2\np1 1 p2 2\np1 1 2\np1 1 3", "found 0 of one person among the 2 of fo"),
        ("2 1\n\np1 1 1\np1 1 p2 2\np1 1 2\np1 1 p2 2", 'found "p1 1 1" in line 3'),
        (
            "2 1\np1 1 2\np1 1 p1 2\np1 1 2\np1 1 p2 2",
            'four words two people; found "p1 1 p1 2" in li',
        ),
        ("2 1\np1 1 2 4 5\np1 1 p2 2\np1 1 2\np1 1 p2 2", 'found "p1 1 2 4 5" in line 2'),
        ("10 1\np1 1 2", "specifies, 10 folds of 2 x 1; found 1 pairs"),
        ("2 1\np1 1 2\np1 1 p2 2\np1 1 2\np1 one 2", 'must be "person 1 4" or "person 1 other 2"'),
    ],
)
def test_malformed_pairs_files_are_refused(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(KDHooksError, match=match):
        read_pairs(tmp_path / "pairs.txt")


def test_the_lines_of_folds_that_are_not_tested_are_checked_too(tmp_path: Path) -> None:
    lines = ["10 1", "p1 1", *["p1 1 2", "p1 1 p2 2"] * 9, "p1 1 p2 2"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    with pytest.raises(KDHooksError, match='found "p1 1" in line 2'):
        read_pairs(tmp_path / "pairs.txt")


@pytest.mark.parametrize(
    "changed",
    [
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: b"\n" + content.replace(b" ", b"\t") + b"\n\n",
    ],
    ids=["windows", "byte order mark", "tabs"],
)
def test_pairs_files_of_other_systems_are_read(
    changed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    content = "2 1\nJos\u00e9 1 2\np1 1 p2 2\np2 1 3\np1 1 p2 2".encode()
    (tmp_path / "plain.txt").write_bytes(content)
    (tmp_path / "other.txt").write_bytes(changed(content))
    plain, other = (read_pairs(tmp_path / name) for name in ("plain.txt", "other.txt"))
    assert plain.names == other.names
    assert plain.names[0] == ("Jos\u00e9/Jos\u00e9_0001", "Jos\u00e9/Jos\u00e9_0002")
    assert plain.same.tolist() == other.same.tolist()


def test_pairs_in_another_encoding_or_a_folder_of_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_bytes("2 1\nJos\u00e9 1 2".encode("latin-1"))
    with pytest.raises(
        KDHooksError, match=r"must be text in UTF-8; found 'utf-8' codec .*save it in"
    ):
        read_pairs(tmp_path / "pairs.txt")
    (tmp_path / "pairs.txt").write_bytes("2 1\n".encode("utf-16"))
    with pytest.raises(KDHooksError, match="must be text in UTF-8"):
        read_pairs(tmp_path / "pairs.txt")
    with pytest.raises(KDHooksError, match=r"can't be read \(Is a directory\); name a text file"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.txt").write_text("2 1\np 1 2\na 1 b 1\nq 1 2\nc 1 d 1\n")
    with pytest.raises(KDHooksError, match="has no fifth number 6 of two folds; found 2 folds"):
        read_pairs(tmp_path / "pairs.txt", 6)
    with pytest.raises(KDHooksError, match="pairs must be a path; found None"):
        read_pairs(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 25])
def test_a_share_of_people_is_a_share(share: float) -> None:
    with pytest.raises(KDHooksError, match=f"between 0 and 1; found {share}"):
        split_by_people(made_faces(), share, 0)


def test_pairs_are_balanced_if_there_are_few_pairs_of_two_people() -> None:
    """Most images are of one person: there are 45 pairs of one person, and 10 of two people."""
    faces = made_faces(people=2, images=10)
    few = faces.where(np.arange(20) < 11)
    pairs = make_pairs(few, 0)
    assert pairs.same.sum() == (~pairs.same).sum() == 10


def test_pairs_of_unknown_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("2 1\np0 1 2\np0 1 p1 2\nzoe 1 2\np1 1 p2 2")
    with pytest.raises(KDHooksError, match=r"2 of 8 are not, the first is 'zoe/zoe_0001'"):
        split_by_pairs(made_faces(), read_pairs(tmp_path / "pairs.txt"))
    with pytest.raises(KDHooksError, match="there is no file"):
        read_pairs(tmp_path / "absent.txt")


def test_too_few_people_are_refused() -> None:
    with pytest.raises(KDHooksError, match="found 2 and 0 of 2 people; add faces"):
        split_by_people(made_faces(people=2), 0.5, 0)
    with pytest.raises(KDHooksError, match="found 2 and 1 of 3 people; add faces"):
        splits_by_people(made_faces(people=3), 2, 0)[1]
