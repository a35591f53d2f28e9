"""Options, teachers and classifiers that would train the wrong thing are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arcface_runs import (
    COUPLEFACE,
    FCD,
    METHODS,
    attach,
    described,
    install,
    outcome,
    rows_of,
    trained,
)
from tests.standin import Trainer
from tests.standin.backbones import get_model


def refused(one: Trainer, teacher: dict[str, str], method: object, **changed: Any) -> str:
    """The message of a run that must not come to an end.

    changed: keys of the trainer's config, of the recipe, and else of its teacher.
    """
    config = {key: changed.pop(key) for key in ("embedding_size", "num_classes") if key in changed}
    more = {key: changed.pop(key) for key in ("taps", "metods") if key in changed}
    (report,) = one.run(install({**teacher, **changed}, method, **more), **config)
    assert report.get("error") == "KDHooksError", report
    return str(report["message"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("margin_type", "cosface"), ("m", 0.3), ("scale", 32.0), ("extra_fcd_weight", 1.0)],
)
def test_options_that_the_trainers_head_would_ignore(
    one: Trainer, teacher: dict[str, str], option: str, value: object
) -> None:
    message = refused(one, teacher, {"name": "proxylesskd", option: value})
    assert "proxylesskd: the trainer's own head can't compute it" in message
    assert f"its options {option} ask for kdhooks' own (head = 'own')" in message


def test_a_refused_method_leaves_no_hooks(one: Trainer, teacher: dict[str, str]) -> None:
    conflict = attach(teacher, {"name": "proxylesskd", "m": 0.3})
    indented = "".join(f"    {row}\n" for row in conflict.splitlines())
    (report,) = one.run(
        below_imports="from kdhooks import KDHooksError",
        after_schedule=f"try:\n{indented}except KDHooksError:\n    pass\n",
        ask={"hooks": "sum(len(m._forward_hooks) for m in raw.modules())"},
    )
    assert report["extra"] == {"hooks": 0}
    assert outcome(report) == outcome(one.run()[0])


@pytest.mark.parametrize("method", ["proxylesskd", COUPLEFACE])
def test_classes_in_another_order(
    one: Trainer, teacher: dict[str, str], tmp_path: Path, method: object
) -> None:
    rows = rows_of(Path(teacher["checkpoint"]).parent)
    torch.save(rows.roll(1, dims=0), tmp_path / "rows.pt")
    message = refused(one, teacher, method, classifier=str(tmp_path / "rows.pt"))
    assert "its classes must be in the order of the training labels" in message


def test_another_number_of_classes(one: Trainer, teacher: dict[str, str]) -> None:
    message = refused(one, teacher, "proxylesskd", num_classes=7)
    assert "teacher classifier has 6 classes, the trainer 7" in message


@pytest.mark.parametrize("method", METHODS)
def test_another_width(one: Trainer, teacher: dict[str, str], method: str) -> None:
    message = refused(one, teacher, METHODS[method], embedding_size=24)
    assert message.startswith(method)
    assert "wide" in message
    assert "projector = true" in message


def test_a_classifier_of_another_network(
    one: Trainer, teacher: dict[str, str], wide: dict[str, str]
) -> None:
    message = refused(one, teacher, "proxylesskd", classifier=wide["classifier"])
    assert "rows of width 24, its embedding is 16 wide" in message


def test_an_untrained_teacher(one: Trainer, teacher: dict[str, str], tmp_path: Path) -> None:
    state = get_model("tiny", 0.0, False, 16).state_dict()
    torch.save(state, tmp_path / "fresh.pt")
    message = refused(one, teacher, "fcd", checkpoint=str(tmp_path / "fresh.pt"))
    assert "teacher was never trained" in message


def test_a_teacher_of_another_network_than_said(one: Trainer, teacher: dict[str, str]) -> None:
    message = refused(one, teacher, "fcd", network="plain")
    assert "does not fit the specified network" in message


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"checkpoint": "nowhere/model.pt"}, "there is no file 'nowhere/model.pt'"),
        ({"classifier": "nowhere/checkpoint_gpu_*.pt"}, "no file matches 'nowhere/checkpoint_gpu_"),
        ({"network": "r5000"}, "teacher network 'r5000' is unknown to arcface_torch's get_model"),
        (
            {"dtype": "bfloat16"},
            "'bfloat16' would have no effect; found 'bfloat16'; take dtype = 'float16'",
        ),
        (
            {"chekpoint": "model.pt"},
            "teacher has no option 'chekpoint'; did you mean 'checkpoint'?",
        ),
        ({"metods": []}, "recipe has no option 'metods'; did you mean 'methods'?"),
        ({"taps": {"student": {"stages": ["layer9"]}}}, "student has no submodule 'layer9'"),
        ({"taps": {"teacher": {"stages": ["layer9"]}}}, "teacher has no submodule 'layer9'"),
    ],
)
def test_what_is_misspelt_or_missing(
    one: Trainer, teacher: dict[str, str], changed: dict[str, object], found: str
) -> None:
    assert found in refused(one, teacher, "fcd", **changed)


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("coupelface", "did you mean 'coupleface'?"),
        ({"name": "fcd", "distence": "l2"}, "distence"),
        ({"name": "fcd", "weight": -1.0}, "fcd: weight must be at least 0"),
    ],
)
def test_a_misspelt_method_or_option(
    one: Trainer, teacher: dict[str, str], method: object, found: str
) -> None:
    assert found in refused(one, teacher, method)


def test_a_teacher_of_another_family_may_teach(one: Trainer) -> None:
    other = described(trained(one, network="plain"), "plain")
    (report,) = one.run(install(other, FCD, COUPLEFACE, "proxylesskd"))
    assert report["losses"] != one.run()[0]["losses"]
