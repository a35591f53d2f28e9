"""Options of arcface_torch's commands: the help explains each, and wrong ones are refused."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

from benchmarks.recordio_files import people
from kdhooks.cli import main
from kdhooks.pictures import encode
from kdhooks_integrations.arcface_torch.commands import cache, doctor, export, taps
from kdhooks_integrations.arcface_torch.commands.evaluate_options import evaluate_parser
from kdhooks_integrations.arcface_torch.commands.parsing import print_json
from tests.trainer_folder import CLASSES, WIDTH, imports_undone, write_teacher, write_trainer

Captured = pytest.CaptureFixture[str]
DOCS = Path(__file__).parents[1] / "docs" / "arcface_torch.md"
RECIPE = """methods = ["fcd"]
[teacher]
network = "tiny"
checkpoint = "model.pt"
cache = "cache"
"""
DOCTOR = ("doctor", "--recipe", "kd.toml", "--network", "wide", "--embedding-size", "16")
BUILD = ("cache", "build", "--recipe", "kd.toml", "--data", "faces")
EXPORT = ("export", "model.pt", "--network", "tiny")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_teacher(write_trainer(tmp_path))
    Path("kd.toml").write_text(RECIPE)
    for index, (pixels, who) in enumerate(people(CLASSES, 1)):
        person = Path("faces", f"person{who}")
        person.mkdir(parents=True)
        (person / f"{index}.png").write_bytes(encode(pixels))
    with imports_undone():
        yield tmp_path


def parsers() -> dict[str, argparse.ArgumentParser]:
    found = {name: module._parser() for name, module in (("doctor", doctor), ("taps", taps))}
    found |= {"export": export._parser(), "evaluate": evaluate_parser(None)}
    (choices,) = [a.choices for a in cache._parser()._actions if a.dest == "command"]
    assert isinstance(choices, dict)
    return {**found, **{f"cache {name}": parser for name, parser in choices.items()}}


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", list(parsers()))
def test_every_option_states_its_default_or_that_it_is_required(command: str) -> None:
    for action in parsers()[command]._actions:
        if action.dest == "help":
            continue
        said = action.help or ""
        assert "(default: " in said or "(required)" in said or "default: none" in said, action
        required = action.required or not action.option_strings
        assert required == ("required" in said and "default" not in said), action
        numbers = isinstance(action.default, int) and not isinstance(action.default, bool)
        if numbers:
            assert f"(default: {action.default})" in said, action


@pytest.mark.parametrize("command", ["run", "doctor", "taps", "cache", "export", "evaluate"])
def test_help_starts_with_a_sentence_about_the_command_and_has_examples(
    command: str, capsys: Captured
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: kdhooks {command} ")
    assert f"\n    kdhooks {command} " in printed
    first = printed[printed.index("\n\n") + 2 :].splitlines()[0]
    assert first.startswith(f"`kdhooks {command}` ")
    assert first[-1] in ".,"


# --- wrong options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((*DOCTOR, "--device", "cuda"), "--device: must be a device of this machine"),
        ((*DOCTOR, "--device", "cuda:99"), "found 'cuda:99', and "),
        ((*DOCTOR, "--device", "tpu"), "found 'tpu' ("),
        ((*DOCTOR, "--device", "meta"), "found 'meta' ("),
        ((*DOCTOR, "--device", ""), "found '' ("),
        ((*BUILD, "--device", "cuda"), "--device: must be a device of this machine"),
        ((*DOCTOR, "--batch-size", "0"), "--batch-size: must be a whole number, at least 2"),
        ((*DOCTOR, "--batch-size", "-8"), "at least 2; found -8"),
        ((*DOCTOR, "--batch-size", "eight"), "at least 2; found eight"),
        ((*DOCTOR, "--num-classes", "0"), "--num-classes: must be a whole number, at least 1"),
        ((*DOCTOR, "--num-classes", "-1"), "at least 1; found -1"),
        ((*DOCTOR, "--threads", "0"), "unrecognized arguments: --threads 0"),
        ((*DOCTOR, "--recipe", "~nosuchuser/kd.toml"), "must be a path; found '~nosuchuser/kd"),
        ((*DOCTOR, "--recipe", "."), "doctor: there is no recipe '.'"),
        ((*DOCTOR, "--trainer", "kd.toml"), "--trainer must be a folder; found 'kd.toml'"),
        ((*DOCTOR, "--trainer", "~nosuchuser"), "whose home directory is unknown"),
        (("doctor", "--network", "wide"), "the following arguments are required: --recipe"),
        ((*DOCTOR, "--recip", "kd.toml"), "unrecognized arguments: --recip kd.toml"),
        ((*DOCTOR, "--network"), "argument --network: expected one argument"),
        (("taps", "tiny", "--json", "--depth", "x"), "--depth: must be a whole number"),
        (
            ("taps", "tiny", "--input-shape", "3", "10000000", "10000000"),
            "(3, 10000000, 10000000); found RuntimeError: ",
        ),
        (("taps", "tiny", "--input-shape", "3", "112"), "--input-shape: expected 3 arguments"),
        (("cache",), "the following arguments are required: command"),
        (("cache", "fill"), "invalid choice: 'fill'"),
        (("cache", "info"), "the following arguments are required: folder"),
        (("cache", "info", "absent", "--json"), "'absent' holds no teacher.json"),
        (("cache", "info", "~nosuchuser"), "whose home directory is unknown"),
        ((*BUILD, "--recipe", "absent.toml"), "'absent.toml' does not exist"),
        ((*BUILD, "--batch-size", "-1"), "--batch-size: must be a whole number, at least 1"),
        (("cache", "verify", "c", "--recipe", "kd.toml"), "given together; found only one of them"),
        (("cache", "verify", "c", "--sample", "5"), "--sample, the number of pictures to compare"),
        (("cache", "verify", "c", "--sample", "0"), "--sample: must be a whole number, at least 1"),
        ((*EXPORT, "--out", "kd.toml"), "export: --out must be a folder, where model.pt"),
        ((*EXPORT, "--network", "r19"), "network 'r19' is unknown to the trainer's get_model"),
        (("export", "absent.pt", "--network", "tiny"), "absent.pt"),
        (("export", "model.pt"), "the following arguments are required: --network"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line_and_status_2(
    argv: tuple[str, ...], said: str, capsys: Captured
) -> None:
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(list(argv)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("kdhooks: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


# --- JSON ----------------------------------------------------------------------------------------


def printed_json(capsys: Captured, *argv: str, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(list(argv)) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_doctor_prints_its_report_as_json(capsys: Captured) -> None:
    found = printed_json(capsys, *DOCTOR, "--json")
    assert list(found) == ["status", "settings", "gradients", "cost", "checks"]
    assert found["status"] == "ok"
    assert {check["status"] for check in found["checks"]} == {"ok", "unchecked"}
    assert list(found["checks"][0]) == ["name", "status", "text"]
    assert found["settings"]["network"] == {"value": "wide", "source": "--network"}
    assert found["gradients"]["terms"]["fcd"]["gradient"] > 0
    assert found["gradients"]["conclusions"] == []
    assert found["cost"]["device"] == "cpu"


def test_doctor_prints_a_fault_as_json(capsys: Captured) -> None:
    found = printed_json(capsys, *DOCTOR, "--json", "--network", "r19", status=1)
    assert found["status"] == "fault"
    assert (found["gradients"], found["cost"]) == (None, None)
    assert [check["status"] for check in found["checks"]].count("fault") == 1


def test_doctor_warns_and_ends_with_status_0(capsys: Captured) -> None:
    weights = '[{ name = "fcd", weight = 1e9 }, { name = "rkd", weight = 1e-9 }]'
    Path("kd.toml").write_text(RECIPE.replace('["fcd"]', weights))
    found = printed_json(capsys, *DOCTOR, "--json")
    assert found["status"] == "warning"
    fcd, rkd = found["gradients"]["conclusions"]
    assert fcd.startswith("fcd: its gradient is ")
    assert rkd.startswith("rkd: its gradient is 1/")
    assert found["gradients"]["clipped"]
    main([*DOCTOR])
    line = next(x for x in capsys.readouterr().out.splitlines() if "gradients" in x)
    assert line.startswith("WARN   gradients ")
    assert line.endswith(f"{fcd}; {rkd}")


def test_the_task_counts_with_the_weight_of_a_term_that_the_head_computes(
    capsys: Captured,
) -> None:
    lengths = []
    for weight in (1.0, 4.0):
        method = f'[{{ name = "proxylesskd", weight = {weight} }}]'
        text = RECIPE.replace('["fcd"]', method).replace("cache =", 'classifier = "rows.pt"\n#')
        Path("kd.toml").write_text(text)
        task = printed_json(capsys, *DOCTOR, "--json")["gradients"]["task"]
        assert task["weight"] == weight
        lengths.append(task["gradient"])
    assert lengths[1] == pytest.approx(4 * lengths[0], rel=1e-4)


def test_taps_prints_its_points_as_json(capsys: Captured) -> None:
    found = printed_json(capsys, "taps", "tiny", "--json", "--embedding-size", "8")
    assert list(found) == ["network", "input_shape", "points"]
    assert (found["network"], found["input_shape"]) == ("tiny", [3, 112, 112])
    points = {point.pop("path"): point for point in found["points"]}
    assert points["layer3"] == {
        "shape": [16, 4, 4],
        "stage": 3,
        "names": ["stage3"],
        "notes": [],
    }
    assert points[""] == {"shape": [8], "stage": None, "names": ["embedding"], "notes": []}


def test_cache_info_prints_json(capsys: Captured) -> None:
    assert main(list(BUILD)) == 0
    found = printed_json(capsys, "cache", "info", "cache", "--json")
    views = 2 * CLASSES
    counts = {"folder": "cache", "views": views, "records": views, "files": 1}
    assert found == {**found, **counts, "bytes": views * (12 + 2 * WIDTH), "embedding_dim": WIDTH}
    assert list(found)[6:] == ["images", "weights", "input", "dtype"]


def test_the_documentation_names_every_key(capsys: Captured) -> None:
    main(list(BUILD))
    objects = [
        printed_json(capsys, *DOCTOR, "--json"),
        printed_json(capsys, "taps", "tiny", "--json"),
        printed_json(capsys, "cache", "info", "cache", "--json"),
    ]
    text = DOCS.read_text(encoding="utf-8")
    for key in {key for one in objects for key in keys(one)}:
        assert f"`{key}`" in text, key


def keys(content: object) -> Iterator[str]:
    """Yield the keys at any depth, except names of settings and of terms."""
    if isinstance(content, list):
        for one in content[:1]:
            yield from keys(one)
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key
            named = key in ("settings", "terms")
            inner = list(value.values())[:1] if named else value
            yield from keys(inner if key != "input" else None)


def test_numbers_that_json_does_not_have_become_null(capsys: Captured) -> None:
    print_json({"a": [float("nan"), 1.5], "b": (float("inf"), True, None)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None, True, None]}
