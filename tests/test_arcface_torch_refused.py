"""Options, teachers and classifiers that would train the wrong thing are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arcface_runs import (
    COUPLEFACE,
    FCD,
    attach,
    described,
    install,
    outcome,
    rows_of,
    trained,
)
from tests.standin import Trainer


def refused(one: Trainer, teacher: dict[str, str], method: object, **changed: Any) -> str:
    """Return the message of a run that must be refused.

    changed: embedding_size of the trainer's config, or keys of the recipe's teacher.
    """
    config = {key: changed.pop(key) for key in ("embedding_size",) if key in changed}
    (report,) = one.run(install({**teacher, **changed}, method), **config)
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


def test_classes_in_another_order(one: Trainer, teacher: dict[str, str], tmp_path: Path) -> None:
    rows = rows_of(Path(teacher["checkpoint"]).parent)
    torch.save(rows.roll(1, dims=0), tmp_path / "rows.pt")
    message = refused(one, teacher, "proxylesskd", classifier=str(tmp_path / "rows.pt"))
    assert "its classes must be in the order of the training labels" in message


def test_another_width(one: Trainer, teacher: dict[str, str]) -> None:
    message = refused(one, teacher, "proxylesskd", embedding_size=24)
    assert message.startswith("proxylesskd")
    assert "wide" in message
    assert "projector = true" in message


def test_the_advice_for_another_width_works(one: Trainer, teacher: dict[str, str]) -> None:
    message = refused(one, teacher, "proxylesskd", embedding_size=24)
    assert message.endswith("or set projector = true and head = 'own'")
    advised = {"name": "proxylesskd", "projector": True, "head": "own"}
    (report,) = one.run(install(teacher, advised), embedding_size=24, sample_rate=1.0)
    assert len(report["losses"]) == 3


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"network": "r5000"}, "teacher network 'r5000' is unknown to arcface_torch's get_model"),
        (
            {"dtype": "bfloat16"},
            "'bfloat16' would have no effect; found 'bfloat16'; use dtype = 'float16'",
        ),
        (
            {"chekpoint": "model.pt"},
            "teacher has no option 'chekpoint'; did you mean 'checkpoint'?",
        ),
    ],
)
def test_a_wrong_teacher(
    one: Trainer, teacher: dict[str, str], changed: dict[str, object], found: str
) -> None:
    assert found in refused(one, teacher, "fcd", **changed)


def test_a_teacher_of_another_family_may_teach(one: Trainer) -> None:
    other = described(trained(one, network="plain"), "plain")
    (report,) = one.run(install(other, FCD, COUPLEFACE, "proxylesskd"))
    assert report["losses"] != one.run()[0]["losses"]
