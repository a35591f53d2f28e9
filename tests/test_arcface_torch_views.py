"""arcface_torch's student sees views of the trainer's images."""

from pathlib import Path
from typing import Any

import pytest

from tests.arcface_runs import FCD, PROJECTED, attach, install, outcome, resumed_as_straight
from tests.standin import Trainer

TABLE: dict[str, Any] = {"mask": {"p": 0.5}, "low_resolution": {"sizes": [4, 8], "p": 0.7}}
VIEW: dict[str, Any] = {"student_view": TABLE, "seed": 3}
IDLE = {**FCD, "weight": 0.0}

# A plain run whose backbone gets the views. It counts the step and the position of the first sample
# independently, from the documentation.
BY_HAND = f"""
from kdhooks import StudentView, viewed
counted, view = [], StudentView(**{TABLE!r})
def look(module, args):
    if not (module.training and torch.is_grad_enabled()):
        return None
    step, part = divmod(len(counted), cfg.gradient_acc)
    counted.append(1)
    first = (part * world_size + rank) * len(args[0])
    return viewed(view, args[0], seed=3, step=step, first=first)
raw.register_forward_pre_hook(look)
"""


@pytest.mark.parametrize("ranks", ["one", "two"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("way", ["install", "attach"])
def test_weight_0_equals_the_plain_run_on_the_viewed_images(
    request: pytest.FixtureRequest,
    teacher: dict[str, str],
    way: str,
    accumulation: int,
    ranks: str,
) -> None:
    trainer: Trainer = request.getfixturevalue(ranks)
    given: dict[str, Any] = {"gradient_acc": accumulation}
    if way == "install":
        viewed = trainer.run(install(teacher, IDLE, **VIEW), **given)
    else:
        viewed = trainer.run(after_schedule=attach(teacher, IDLE, **VIEW), **given)
    by_hand = trainer.run(after_schedule=BY_HAND, **given)
    plain = trainer.run(**given)
    for found, expected, other in zip(viewed, by_hand, plain, strict=True):
        assert outcome(found) == outcome(expected)
        assert found["losses"] != other["losses"]


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_resume_equals_the_straight_run(
    request: pytest.FixtureRequest, wide: dict[str, str], ranks: str
) -> None:
    trainer: Trainer = request.getfixturevalue(ranks)
    whole: dict[str, Any] = {"sample_rate": 1.0, "num_epoch": 2, "gradient_acc": 3}
    straight = resumed_as_straight(trainer, install(wide, *PROJECTED, **VIEW), **whole)
    unviewed = trainer.run(install(wide, *PROJECTED), **whole)
    for report, other in zip(straight, unviewed, strict=True):
        assert report["losses"] != other["losses"]


def test_cached_equals_uncached(one: Trainer, teacher: dict[str, str], tmp_path: Path) -> None:
    """The second run fills the cache; the third one finds all its embeddings there."""
    losses = []
    for cache in ({}, {"cache": str(tmp_path)}, {"cache": str(tmp_path)}):
        ask = {"hits": "getattr(installed.attachment.distiller._session.cache, 'hits', None)"}
        line = install({**teacher, **cache}, FCD, **VIEW)
        (report,) = one.run(below_imports=line, ask=ask, fresh=True)
        assert "error" not in report, report
        losses.append(report["losses"])
    hits = report["extra"]["hits"]
    assert hits is not None
    assert hits >= 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == losses[1]


@pytest.mark.parametrize("compiled", ["module", "before DDP", "after DDP"])
def test_a_compiled_backbone_gets_the_views(
    one: Trainer, teacher: dict[str, str], compiled: str
) -> None:
    line = install(teacher, IDLE, **VIEW)
    (report,) = one.run(line, compile="eager", compiled=compiled)
    (plain,) = one.run(line)
    assert "error" not in report
    assert report["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def test_a_wrong_view_is_refused_before_the_run(one: Trainer, teacher: dict[str, str]) -> None:
    wrong = {"student_view": {"low_resolution": {"sizes": [14, 64]}}}
    (report,) = one.run(install(teacher, FCD, **wrong))
    assert report["error"] == "KDHooksError"
    assert "sizes must be at most the shorter side of the images, 32 pixels" in report["message"]
