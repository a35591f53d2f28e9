"""examples/walkthrough.ipynb runs from top to bottom, and its stored outputs are small."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("onnx")

from kdhooks import KDHooksError
from kdhooks_demo.packages import orl_files, sface_file
from tests.notebooks import WALK, read, run


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Run all cells, and return the names that they define."""
    try:
        orl_files()
        sface_file()
    except KDHooksError as error:
        pytest.skip(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib and torch's schedulers warn
        return run(read())


def test_the_distilled_student_is_nearer_to_its_teacher(names: dict[str, Any]) -> None:
    alone = names["log_alone"]["cosine to the teacher"]
    distilled = names["log_distilled"]["cosine to the teacher"]
    assert np.mean(distilled[-5:]) > 0.5 > 0.2 > np.mean(alone[-5:])
    assert len(distilled) == names["STEPS"]


def test_only_distillation_improves_cross(names: dict[str, Any]) -> None:
    eer, tar, cross = zip(*(names["results"][name] for name in names["embedded"]), strict=True)
    assert cross[2] < min(cross[1], 0.42)
    assert cross[0] == eer[0] < 0.02 < eer[2]
    assert tar[0] > 0.98


def test_no_person_is_both_trained_and_tested(names: dict[str, Any]) -> None:
    people = names["faces"].people
    assert not set(people[names["train"].numpy()]) & set(people[names["test"].numpy()])
    assert len(names["train"]) == 150


def test_the_outputs_are_kept_and_small() -> None:
    notebook = read()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = [cell for cell in cells if "plt.show()" in "".join(cell["source"])]
    assert len(shown) == 5
    assert all(cell["outputs"] for cell in shown)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert WALK.stat().st_size < 150_000
    assert json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" == WALK.read_text("utf-8")


def test_the_targets_of_its_links_exist() -> None:
    text = "".join("".join(cell["source"]) for cell in read()["cells"])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert (WALK.parent / Path(link)).exists(), link
