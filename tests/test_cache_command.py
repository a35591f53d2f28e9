"""`kdhooks cache` fills a cache before a training, and the training finds it."""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from benchmarks.recordio_files import people, write_records
from kdhooks import KDHooksError
from kdhooks.cli import main
from kdhooks.pictures import encode
from kdhooks.recipe import Recipe, build_teacher, build_teachers
from kdhooks.teacher.cache_files import Parts
from kdhooks.teacher.fingerprints import HEADER
from kdhooks.teacher.session import TeacherSession
from kdhooks_integrations.arcface_torch.commands.networks import enter_trainer
from kdhooks_integrations.arcface_torch.commands.pictures import Pictures
from kdhooks_integrations.arcface_torch.networks import teacher_factories
from tests.trainer_folder import CLASSES, WIDTH, faces, imports_undone, write_teacher, write_trainer

Captured = pytest.CaptureFixture[str]
RECIPE = """methods = ["fcd"]
[teacher]
network = "tiny"
checkpoint = "model.pt"
cache = "cache"
"""
BUILD = ("build", "--recipe", "kd.toml", "--batch-size", "10", "--data")
VIEWS = 2 * 4 * CLASSES


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_trainer(tmp_path)
    write_teacher(tmp_path)
    Path("kd.toml").write_text(RECIPE)
    write_pictures(tmp_path)
    with imports_undone():
        enter_trainer(".")
        yield tmp_path


def write_pictures(folder: Path) -> None:
    """Write the same pictures into a folder, into a zip file and as records."""
    pictures = people(CLASSES, 4)
    write_records(folder / "records", pictures)
    with zipfile.ZipFile(folder / "faces.zip", "w") as archive:
        for index, (pixels, who) in enumerate(pictures):
            name = f"person{who}/{index:03}.png"
            (folder / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "folders" / name).write_bytes(encode(pixels))
            archive.writestr(name, encode(pixels))


def cache(*argv: str, status: int = 0) -> None:
    assert main(["cache", *argv]) == status


def teacher() -> TeacherSession:
    recipe = Recipe.read("kd.toml")
    made = build_teacher(recipe, teacher_factories(None, recipe))
    return TeacherSession(made, like=faces()[0])


@pytest.mark.parametrize("data", ["folders", "faces.zip", "records"])
def test_a_training_finds_the_embeddings_of_build(data: str, capsys: Captured) -> None:
    cache(*BUILD, data)
    printed = capsys.readouterr()
    assert (
        printed.out
        == f"cache: {VIEWS} views of 24 pictures, of which 0 were already in the cache\n"
    )
    assert printed.err.split("\r")[-1] == "24 of 24 pictures\n"
    found, images = teacher(), faces()[0]
    for seen in (images, images.flip(-1), (((images + 1) / 2) - 0.5) / 0.5):
        found(seen)
    assert found.cache is not None
    assert found.cache.hits == found.cache.asked == 72


def test_build_resumes_after_a_stop(capsys: Captured) -> None:
    """Only the first ten pictures were written, without their mirror images."""
    found = teacher()
    found(faces()[0][:10])
    found.close()
    cache(*BUILD, "folders")
    assert capsys.readouterr().out.endswith(
        f"cache: {VIEWS} views of 24 pictures, of which 10 were already in the cache\n"
    )
    assert sum(len(keys) for _, _, keys in Parts(Path("cache"), WIDTH).read_on()) == VIEWS


def test_build_again_embeds_nothing(capsys: Captured) -> None:
    cache(*BUILD, "folders")
    files = sorted(path.name for path in Path("cache").iterdir())
    cache(*BUILD, "faces.zip")
    assert capsys.readouterr().out.endswith(f"of which {VIEWS} were already in the cache\n")
    assert sorted(path.name for path in Path("cache").iterdir()) == files


def test_build_stops_at_max_gb(capsys: Captured, caplog: pytest.LogCaptureFixture) -> None:
    text = RECIPE.replace('"cache"', f'{{ path = "cache", max_gb = {25 * (12 + 2 * WIDTH)}e-9 }}')
    Path("kd.toml").write_text(text)
    cache(*BUILD, "folders", status=1)
    assert "has reached max_gb" in caplog.text
    ((_, _, keys),) = Parts(Path("cache"), WIDTH).read_on()
    assert len(keys) == 20


def test_info_describes_the_cache(capsys: Captured) -> None:
    cache(*BUILD, "folders")
    capsys.readouterr()
    cache("info", "cache")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"views      {VIEWS}, in 1 files with {VIEWS} records"
    assert lines[1] == f"size       {VIEWS * (12 + 2 * WIDTH) / 1e9:.3g} GB"
    assert lines[2] == f"embedding  {WIDTH} numbers in float16"
    assert [line.split()[0] for line in lines[3:]] == ["images", "weights", "input", "dtype"]


@pytest.mark.parametrize(
    "change", [{"dim": None}, {"dim": "16"}, {"dim": 0}, {"dim": 2.5}, {"weights": None}]
)
def test_a_header_that_lacks_something_is_refused(
    change: dict[str, object], capsys: Captured
) -> None:
    cache(*BUILD, "folders")
    header = json.loads(Path("cache", HEADER).read_text())
    kept = {name: value for name, value in {**header, **change}.items() if value is not None}
    Path("cache", HEADER).write_text(json.dumps(kept))
    for command in ("info", "verify"):
        cache(command, "cache", status=2)
        assert "must hold dim, and probe with two embeddings" in capsys.readouterr().err


def test_verify_counts_damaged_records(capsys: Captured) -> None:
    cache(*BUILD, "folders")
    capsys.readouterr()
    cache("verify", "cache")
    assert capsys.readouterr().out == f"{VIEWS} records in 1 files, 0 damaged\n"
    (rows,) = Path("cache").glob("*.rows")
    content = bytearray(rows.read_bytes())
    content[5] ^= 1
    content[2 * WIDTH * 7] ^= 128
    rows.write_bytes(content)
    cache("verify", "cache", status=1)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{VIEWS} records in 1 files, 2 damaged\na training embeds the views")


@pytest.mark.parametrize(
    ("suffix", "cut", "status", "said"),
    [
        ("rows", 24 * 2 * WIDTH, 1, "records in 1 files, 0 damaged\n{}.rows is cut short: 24 rows"),
        ("rows", 5, 1, "{}.rows is cut short: 47.84375 rows for 48 keys"),
        ("keys", 12, 0, "{}.keys has 47 keys for 48 rows: the last write was interrupted"),
        ("keys", 3, 0, "{}.keys has 47.75 keys for 48 rows: the last write was interrupted"),
        ("keys", None, 0, "{}.rows has no {}.keys"),
        ("rows", None, 1, "{}.rows is cut short: 0 rows for 48 keys"),
    ],
)
def test_verify_names_incomplete_files(
    suffix: str, cut: int | None, status: int, said: str, capsys: Captured
) -> None:
    cache(*BUILD, "folders")
    (path,) = Path("cache").glob(f"*.{suffix}")
    if cut is None:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - cut)
    capsys.readouterr()
    cache("verify", "cache", status=status)
    printed = capsys.readouterr().out
    assert said.format(path.stem, path.stem) in printed
    assert ("damaged and lost records again" in printed) == bool(status)


def test_a_part_that_cannot_be_read_is_named(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(*BUILD, "folders")
    (path,) = Path("cache").glob("*.rows")

    def refuse(name: Path, *arguments: object, **options: object) -> object:
        if name.suffix == ".rows":
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, *arguments, **options)

    real: Any = np.memmap
    monkeypatch.setattr(np, "memmap", refuse)
    for argv in (("verify", "cache"), ("info", "cache"), (*BUILD, "folders")):
        cache(*argv, status=2)
        said = capsys.readouterr().err
        assert f"{path}' can't be read (Permission denied); check its permissions" in said
        assert "kdhooks cache verify cache checks all files" in said


def test_a_part_that_vanishes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cache(*BUILD, "folders")
    (path,) = Path("cache").glob("*.keys")
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [path, path.with_name("gone.keys")])
    with pytest.raises(KDHooksError, match=r"gone\.keys' can't be read \(No such file.*verify cac"):
        teacher()


def test_verify_compares_with_the_teacher(capsys: Captured) -> None:
    cache(*BUILD, "folders")
    compare = ("verify", "cache", "--recipe", "kd.toml", "--data", "records")
    for sample, count in (("7", 7), ("100", 24)):
        capsys.readouterr()
        cache(*compare, "--sample", sample)
        printed = capsys.readouterr().out
        said = (
            f"{count} of {count} pictures are in the cache, with the teacher's present embeddings"
        )
        assert printed.splitlines()[-1] == said
    (rows,) = Path("cache").glob("*.rows")
    for part in (rows, rows.with_suffix(".keys")):
        part.unlink()
    foreign = Parts(Path("cache"), WIDTH)
    found = teacher()
    assert found.cache is not None
    keys = found.cache.keys(faces()[0])
    foreign.append(keys, torch.ones(len(keys), WIDTH).half().numpy())
    cache(*compare, status=2)
    assert "another teacher: the rows of these pictures are" in capsys.readouterr().err


def test_verify_leaves_the_cache_as_it_is() -> None:
    cache(*BUILD, "folders")
    (rows,) = Path("cache").glob("*.rows")
    os.truncate(rows, 10 * 2 * WIDTH)
    before = sorted((path.name, path.stat().st_size) for path in Path("cache").iterdir())
    cache("verify", "cache", "--recipe", "kd.toml", "--data", "folders", status=1)
    assert sorted((p.name, p.stat().st_size) for p in Path("cache").iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("info", "absent"), f"'absent' holds no {HEADER}; specify the folder of a cache"),
        (("verify", "."), f"'.' holds no {HEADER}"),
        (
            (*BUILD, "absent"),
            "must be a folder or a zip file with pictures; 'absent' does not",
        ),
        ((*BUILD, "kd.toml"), "'kd.toml' can't be read as a zip file"),
        ((*BUILD, "small"), "'a.png' is 112x50 (width x height), but 112x112 is needed"),
        ((*BUILD, "empty"), "folder with train.rec and train.idx; found none in 'empty'"),
        (
            (*BUILD[:3], "--batch-size", "0", "--data", "folders"),
            "--batch-size: must be a whole number, at least 1; found 0",
        ),
        (("build", "--recipe", "bare.toml", "--data", "folders"), 'add cache = "cache" below'),
    ],
)
def test_a_wrong_command_is_refused_with_a_fix(
    argv: tuple[str, ...], said: str, capsys: Captured
) -> None:
    for name in ("empty", "small"):
        Path(name).mkdir()
    Path("small/a.png").write_bytes(encode(people(1, 1)[0][0][:50]))
    Path("bare.toml").write_text(RECIPE.replace('cache = "cache"\n', ""))
    cache(*argv, status=2)
    assert said in capsys.readouterr().err


def test_build_embeds_the_rest_before_it_names_unreadable_pictures(capsys: Captured) -> None:
    """Files that are no pictures are found before the pass, truncated pictures during it."""
    cut = [Path("folders", name) for name in ("person0/000.png", "person1/001.png")]
    for path in cut:
        Image.open(path).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:-300])
    cache(*BUILD, "folders", status=2)
    said = capsys.readouterr().err
    assert "found 2 faults among 24 pictures of 'folders': 'person0/000.png' can't be dec" in said
    assert "22 of 24 pictures\nkdhooks: " in said
    write_pictures(Path())
    cache(*BUILD, "folders")
    assert capsys.readouterr().out.endswith("of which 44 were already in the cache\n")
    Path("folders/person0/000.png").write_bytes(b"")
    cache("verify", "cache", "--recipe", "kd.toml", "--data", "folders", status=2)
    assert "found 1 faults among 24 pictures" in capsys.readouterr().err


def test_pictures_of_another_number_of_channels_are_refused() -> None:
    with pytest.raises(KDHooksError, match=r"pictures have 3 channels; input_shape .* has 1"):
        next(Pictures("folders").batches(["person0/000.png"], 1, (1, 112, 112)))


def test_recipe_and_data_go_together(capsys: Captured) -> None:
    cache(*BUILD, "folders")
    cache("verify", "cache", "--data", "folders", status=2)
    assert "--recipe and --data must be given together; found only one" in capsys.readouterr().err


# --- several teachers ----------------------------------------------------------------------------

TABLE = '[[teacher]]\nnetwork = "tiny"\ncheckpoint = "model.pt"\n'
SECOND = f'{TABLE}input = {{ order = "bgr" }}\n'


def write_several(first: str = 'cache = "cache"\n', second: str = 'cache = "other"\n') -> None:
    Path("kd.toml").write_text(f'methods = ["sp"]\n{TABLE}{first}{SECOND}{second}')


def test_build_fills_the_cache_of_each_teacher(capsys: Captured) -> None:
    write_several()
    cache(*BUILD, "folders")
    said = f"{VIEWS} views of 24 pictures, of which 0 were already in the cache\n"
    assert capsys.readouterr().out == f"cache: {said}other: {said}"
    recipe = Recipe.read("kd.toml")
    images = faces()[0]
    for made in build_teachers(recipe, teacher_factories(None, recipe)):
        with TeacherSession(made, like=images) as found:
            found(images)
            assert found.cache is not None
            assert found.cache.hits == len(images)
    for folder in ("cache", "other"):
        cache("verify", folder, "--recipe", "kd.toml", "--data", "records")
        assert "24 of 24 pictures are in the cache" in capsys.readouterr().out


def test_build_names_the_teacher_without_a_cache(capsys: Captured) -> None:
    write_several(first="")
    cache(*BUILD, "folders")
    printed = capsys.readouterr()
    assert "teacher 0 has no cache and is skipped" in printed.err
    assert printed.out.startswith("other: ")
    write_several(first="", second="")
    cache(*BUILD, "folders", status=2)
    assert 'has no teacher.cache; add cache = "cache"' in capsys.readouterr().err


def test_build_continues_for_one_teacher_if_the_cache_of_another_is_full(
    capsys: Captured,
) -> None:
    write_several(first='cache = { path = "cache", max_gb = 1e-6 }\n')
    cache(*BUILD, "folders", status=1)
    assert f"other: {VIEWS} views of 24 pictures" in capsys.readouterr().out


def test_verify_compares_with_the_teacher_whose_cache_it_is(capsys: Captured) -> None:
    write_several()
    cache(*BUILD, "folders")
    Path("cache").rename("moved")
    cache("verify", "moved", "--recipe", "kd.toml", "--data", "records", status=2)
    said = capsys.readouterr().err
    assert "one of the recipe's 2 teachers; found 'moved', which is none of them" in said


# --- in place of the teacher ---------------------------------------------------------------------


def test_the_embeddings_of_build_replace_the_teacher(capsys: Captured) -> None:
    cache(*BUILD, "folders")
    expected, images = teacher(), faces()[0]
    wanted = [expected(seen).embedding for seen in (images, images.flip(-1))]
    Path("model.pt").unlink()
    Path("kd.toml").write_text('methods = ["fcd"]\nteacher = { embeddings = "cache" }\n')
    with TeacherSession(build_teacher(Recipe.read("kd.toml"))) as found:
        for seen, embedding in zip((images, images.flip(-1)), wanted, strict=True):
            assert torch.equal(found(seen).embedding, embedding)
        with pytest.raises(KDHooksError, match="24 of 24 images of this batch are missing"):
            found(images.flip(-2))
    cache(*BUILD, "folders", status=2)
    assert "has no teacher.cache" in capsys.readouterr().err
