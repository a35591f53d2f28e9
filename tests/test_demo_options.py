"""Wrong numbers on the demo's command line are refused before anything runs."""

import pytest

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("onnxruntime")

from kdhooks.cli import main
from kdhooks_demo.training import Row, Settings, train
from tests.test_demo import lesson


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--threads 0", "--threads: must be a whole number, at least 1; found 0"),
        ("--threads=-1", "--threads: must be a whole number, at least 1; found -1"),
        ("--seeds 0", "--seeds: must be a whole number, at least 1; found 0"),
        ("--seed=-1", "--seed: must be a whole number, at least 0; found -1"),
        ("--views 0", "--views: must be a whole number, at least 1; found 0"),
        ("--couples x", "--couples: must be a whole number, at least 0; found x"),
        ("--images-seen 29", "--images-seen: must be a whole number, at least 30; found 29"),
        (
            "--images-seen 1e4",
            "--images-seen: must be a whole number, at least 30; found 1e4",
        ),
        ("--parts 1", "--parts: must be a whole number, at least 2; found 1"),
    ],
)
def test_a_number_out_of_range_is_refused(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments.split()])
    assert stopped.value.code == 2
    assert f"kdhooks demo: error: argument {said}" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_short_trainings_have_a_schedule(steps: int) -> None:
    """OneCycleLR divides by 0 if its warm-up, a tenth of the steps, has one step."""
    trained = train(lesson(), Row("labels"), Settings(images_seen=4 * steps, batch=4), 0)
    assert len(trained.losses) == steps
