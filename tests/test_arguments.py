"""Options that no machine can follow are refused while the command line is read."""

from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from kdhooks import KDHooksError
from kdhooks.arguments import at_least, usable_device
from kdhooks.cli import main

Captured = pytest.CaptureFixture[str]


def test_a_device_is_one_that_holds_tensors() -> None:
    assert usable_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99", "cpu:x", ""):
        with pytest.raises(KDHooksError, match=rf"must be one that this machine has.*'{name}' "):
            usable_device(name)
    with pytest.raises(KDHooksError, match="must hold numbers; found 'meta'"):
        usable_device("meta")


def test_numbers_have_a_least_value() -> None:
    assert at_least(0)("0") == 0
    for text in ("-1", "0.5", "two", ""):
        with pytest.raises(ArgumentTypeError, match=f"whole number, at least 0; found '{text}'"):
            at_least(0)(text)


@pytest.mark.parametrize(
    "argv",
    [
        ["taps", "r50", "--depth", "-1"],
        ["taps", "r50", "--input-shape", "3", "0", "112"],
        ["taps", "r50", "--embedding-size", "0"],
        ["export", "model.pt", "--network", "r50", "--embedding-size", "-5"],
        ["doctor", "--recipe", "kd.toml", "--network", "r50", "--num-classes", "0"],
    ],
)
def test_commands_refuse_numbers_that_are_too_small(argv: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "must be a whole number, at least" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--threads", "--seeds", "--views", "--images-seen"])
def test_the_demo_refuses_none_of_them(option: str, capsys: Captured) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="2"):
        main(["demo", option, "0"])
    assert f"{option}: must be a whole number, at least 1; found 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["doctor", "--network", "r50"], ["cache", "build", "--data", "x"]]
)
def test_commands_refuse_a_device_that_is_not_there(command: list[str], capsys: Captured) -> None:
    assert main([*command, "--recipe", "kd.toml", "--device", "cuda:99"]) == 2
    assert "--device must be one that this machine has" in capsys.readouterr().err


def test_the_demo_needs_a_folder(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "demo: --out must be a folder that can be written; found" in capsys.readouterr().err
