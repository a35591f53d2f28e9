"""Impossible options are refused while the command line is parsed."""

import re
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from kdhooks import KDHooksError
from kdhooks.arguments import at_least, factor, make_folder, share, usable_device
from kdhooks.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "\u0663", "0x1", "1_0"])
def test_only_a_whole_number_is_accepted(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"at least 0; found {re.escape(text)}$"):
        at_least(0)(text)


def test_a_number_has_nine_digits_at_most() -> None:
    assert at_least(0)("999999999") == 999999999
    assert at_least(60)("60") == 60
    with pytest.raises(ArgumentTypeError, match="must have at most 9 digits; found 10"):
        at_least(1)("1000000000")


@pytest.mark.parametrize("text", ["-0.5", "nan", "inf", "x"])
def test_a_factor_is_a_number(text: str) -> None:
    assert (factor("0"), factor("2.5"), share("0.25")) == (0, 2.5, 0.25)
    with pytest.raises(ArgumentTypeError, match=f"at least 0; found '{text}'"):
        factor(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tpu", "must be a device of this machine, such as cpu, cuda or cuda:0; found 'tpu'"),
        ("cuda:900", "found 'cuda:900', and . CUDA devices"),
        ("cpu:x", "must be a device of this machine"),
        ("meta", "must be a device of this machine"),
        ("", "must be a device of this machine"),
    ],
)
def test_a_device_that_is_not_there_is_refused(text: str, said: str) -> None:
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(ArgumentTypeError, match=said):
        usable_device(text)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(
        KDHooksError, match=r"--out must be a writable folder.*can't be created \(File exists"
    ):
        make_folder(tmp_path / "file")
    with pytest.raises(KDHooksError, match=r"can't be created \(Not a directory"):
        make_folder(tmp_path / "file" / "inside")


@pytest.mark.parametrize(
    "argv",
    [
        ["taps", "r50", "--depth", "-1"],
        ["taps", "r50", "--input-shape", "3", "0", "112"],
        ["taps", "r50", "--embedding-size", "0"],
        ["export", "model.pt", "--network", "r50", "--embedding-size", "-5"],
    ],
)
def test_commands_refuse_numbers_that_are_too_small(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 2
    assert "must be a whole number, at least" in capsys.readouterr().err


def test_the_demo_needs_a_folder(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "--out must be a writable folder" in capsys.readouterr().err
