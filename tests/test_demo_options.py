"""Numbers and folders on the demo's command line, refused before anything runs."""

import argparse
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("onnxruntime")

from kdhooks import KDHooksError
from kdhooks.cli import main
from kdhooks_demo.options import device, factor, make_folder, share, whole
from kdhooks_demo.training import Row, Settings, train
from tests.test_demo import lesson


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--threads 0", "--threads: must be a whole number of at least 1; found '0'"),
        ("--threads=-1", "--threads: must be a whole number of at least 1; found '-1'"),
        ("--seeds 0", "--seeds: must be a whole number of at least 1; found '0'"),
        ("--seed=-1", "--seed: must be a whole number of at least 0; found '-1'"),
        ("--views 0", "--views: must be a whole number of at least 1; found '0'"),
        ("--couples x", "--couples: must be a whole number of at least 0; found 'x'"),
        ("--images-seen 59", "--images-seen: must be a whole number of at least 60; found '59'"),
        ("--images-seen 1e4", "--images-seen: must be a whole number of at least 60; found '1e4'"),
        ("--held-out 1", "--held-out: must lie between 0 and 1; found '1'"),
        ("--held-out nan", "--held-out: must lie between 0 and 1; found 'nan'"),
        ("--held-out some", "--held-out: must lie between 0 and 1; found 'some'"),
    ],
)
def test_a_number_out_of_range_is_refused(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments.split()])
    assert stopped.value.code == 2
    assert f"kdhooks demo: error: argument {said}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "-1", "1.5", "\u0663", "0x1", "1_0"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"of at least 0; found '{text}'"):
        whole(0)(text)


def test_a_number_has_nine_digits_at_most() -> None:
    assert whole(0)("999999999") == 999999999
    assert whole(60)("60") == 60
    with pytest.raises(argparse.ArgumentTypeError, match="must have 9 digits at most; found '10"):
        whole(1)("1000000000")


@pytest.mark.parametrize("text", ["-0.5", "nan", "inf", "x"])
def test_a_factor_is_a_number(text: str) -> None:
    assert (factor("0"), factor("2.5"), share("0.25")) == (0, 2.5, 0.25)
    with pytest.raises(argparse.ArgumentTypeError, match=f"at least 0; found '{text}'"):
        factor(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("tpu", "must be cpu, cuda or cuda:N; found 'tpu'"), ("cuda:900", "torch finds . CUDA dev")],
)
def test_a_device_that_is_not_there_is_refused(text: str, said: str) -> None:
    assert device("cpu") == torch.device("cpu")
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        device(text)


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(KDHooksError, match=r"--out must be a folder .*can't be made \(File exists"):
        make_folder(tmp_path / "file")
    with pytest.raises(KDHooksError, match=r"can't be made \(Not a directory"):
        make_folder(tmp_path / "file" / "inside")


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_short_trainings_have_a_schedule(steps: int) -> None:
    """OneCycleLR divides by 0 for a tenth of 10 steps."""
    trained = train(lesson(), Row("labels"), Settings(images_seen=4 * steps, batch=4), 0)
    assert len(trained.losses) == steps
