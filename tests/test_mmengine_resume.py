"""An MMEngine run resumes and loads checkpoints that were written with and without kdhooks."""

import copy
import pickle
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdhooks import KDHooksError

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, MODELS
from torch.distributed.optim import ZeroRedundancyOptimizer

from kdhooks_integrations import mmengine
from tests.mmengine_runs import (
    DOORS,
    FCD,
    PROJECTED,
    QUIET,
    SCHEDULED,
    Run,
    both,
    distilled,
    each_door,
    each_runner,
    made,
    same,
    saved,
    students,
    train,
)

pytestmark = QUIET


RESUME = {"type": "kdhooks.ResumeHook"}


@each_door
@each_runner
@pytest.mark.parametrize("ema", [False, True])
def test_kill_and_resume_equals_the_straight_run(
    tmp_path: Path, safe_globals: None, door: str, kind: str, ema: bool
) -> None:
    if ema and kind == "FlexibleRunner":
        pytest.skip("its EMAHook can't resume with or without kdhooks")
    options = both(door, methods=[SCHEDULED])
    options["hooks"] = [*options.get("hooks", []), RESUME, *([{"type": "EMAHook"}] * ema)]
    straight = train(tmp_path / "straight", kind, **options)
    killed = made(tmp_path / "killed", kind, **copy.deepcopy(options), kill=4)
    with pytest.raises(InterruptedError):
        killed.train()
    resumed = train(tmp_path / "killed", kind, **copy.deepcopy(options), resume=True)
    assert resumed.logs == straight.logs[3:]
    assert same(resumed.state, straight.state)
    if ema:
        for key in ("state_dict", "ema_state_dict"):
            one, other = (saved(tmp_path / name)[key] for name in ("straight", "killed"))
            assert same(one, other)


@pytest.mark.parametrize("first", DOORS)
def test_a_checkpoint_of_one_door_is_resumed_by_the_other(
    tmp_path: Path, safe_globals: None, first: str
) -> None:
    second = DOORS[1 - DOORS.index(first)]
    options = {door: both(door, methods=[SCHEDULED]) for door in DOORS}
    options["hook"]["hooks"].append(RESUME)
    options["model"]["hooks"] = [RESUME]
    straight = train(tmp_path / "straight", **options[first])
    with pytest.raises(InterruptedError):
        made(tmp_path / "killed", **options[first], kill=4).train()
    resumed = train(tmp_path / "killed", **options[second], resume=True)
    assert resumed.logs == straight.logs[3:]


def test_torch_refuses_mmengines_checkpoints_until_allowed(
    tmp_path: Path, safe_globals: None
) -> None:
    torch.serialization.clear_safe_globals()
    train(tmp_path, **both("model"))
    with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer"):
        train(tmp_path, **both("model"), load_from=str(tmp_path / "epoch_2.pth"))
    mmengine.allow_resume()
    train(tmp_path, **both("model"), load_from=str(tmp_path / "epoch_2.pth"))


class Getattr:
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (HistoryBuffer, "__init__")


def test_a_checkpoint_may_name_only_the_historys_own_methods(
    tmp_path: Path, safe_globals: None
) -> None:
    mmengine.allow_resume()
    torch.save(Getattr(), tmp_path / "bad.pth")
    with pytest.raises(KDHooksError, match="found '__init__' of <class"):
        torch.load(tmp_path / "bad.pth")


@each_door
def test_a_run_can_start_from_a_plain_checkpoint(
    tmp_path: Path, safe_globals: None, door: str, caplog: pytest.LogCaptureFixture
) -> None:
    mmengine.allow_resume()
    train(tmp_path)
    plain = str(tmp_path / "epoch_1.pth")
    train(tmp_path / "loaded", **both(door, methods=[PROJECTED]), load_from=plain)
    assert "written without kdhooks: the methods start from their first step; to res" in caplog.text
    resumed = train(tmp_path / "resumed", **both(door), load_from=plain, resume=True)
    assert len(resumed.logs) == 3


ONE_GROUP: dict[str, Any] = {"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}}
GROUPS = {**ONE_GROUP, "paramwise_cfg": {"custom_keys": {"kdhooks": {"lr_mult": 0.1}}}}
COSINE = [{"type": "CosineAnnealingLR", "T_max": 8, "eta_min_ratio": 0.1, "by_epoch": False}]


@each_runner
@pytest.mark.parametrize(
    ("door", "wrapper"), [("model", ONE_GROUP), ("hook", ONE_GROUP), ("model", GROUPS)]
)
def test_a_plain_runs_checkpoint_is_resumed_distilled(
    tmp_path: Path,
    safe_globals: None,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    door: str,
    wrapper: dict[str, Any],
) -> None:
    """The student continues as in the plain run, with its momentum and its schedule."""

    def run(name: str, weight: float, **changes: Any) -> Run:
        options = both(door, methods=[{**PROJECTED, "weight": weight}])
        options["hooks"] = [*options.get("hooks", []), RESUME]
        return train(tmp_path / name, kind, **options, **common, **changes)

    common = {"optim_wrapper": wrapper, "param_scheduler": COSINE}
    plain = train(tmp_path / "plain", kind, **common)
    resume = {"load_from": str(tmp_path / "plain" / "epoch_1.pth"), "resume": True}
    idle, resumed = run("idle", 0.0, **resume), run("resumed", 8.0, **resume)
    assert idle["loss_cls"] == plain["loss_cls"][3:]
    assert same(students(idle.state), plain.state)
    key = "kdhooks.distiller.losses.fcd.projector.weight"
    assert not torch.equal(resumed.state[key], idle.state[key])
    assert "initial weights and without optimizer state; the student resumes" in caplog.text
    straight = run("straight", 8.0)
    assert rates(resumed) == pytest.approx(rates(straight))
    again = run("again", 8.0, load_from=str(tmp_path / "resumed" / "epoch_2.pth"), resume=True)
    assert same(again.state, resumed.state)


def rates(run: Run) -> list[float]:
    return [group["lr"] for group in run.runner.optim_wrapper.optimizer.param_groups]


@each_door
@pytest.mark.parametrize("averaged", [False, True])
def test_a_plain_runs_checkpoint_is_resumed_with_averaged_weights(
    tmp_path: Path,
    safe_globals: None,
    caplog: pytest.LogCaptureFixture,
    door: str,
    averaged: bool,
) -> None:
    """The plain run may have had EMAHook or not."""
    ema = {"type": "EMAHook"}
    plain = train(tmp_path / "plain", hooks=[ema] * averaged)
    options = both(door, methods=[{**PROJECTED, "weight": 0.0}])
    options["hooks"] = [ema, *options.get("hooks", []), RESUME]
    load = str(tmp_path / "plain" / "epoch_1.pth")
    resumed = train(tmp_path / "resumed", **options, load_from=load, resume=True)
    assert same(students(resumed.state), plain.state)
    assert caplog.text.count("written without kdhooks") == 1
    if averaged:
        one, other = (saved(tmp_path / name)["state_dict"] for name in ("plain", "resumed"))
        assert same(students(other), one)


def test_a_plain_runs_checkpoint_needs_the_hook(
    tmp_path: Path, safe_globals: None, caplog: pytest.LogCaptureFixture
) -> None:
    mmengine.allow_resume()
    train(tmp_path)
    plain = str(tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match="parameter group"):
        train(tmp_path / "no", **both("model", methods=[PROJECTED]), load_from=plain, resume=True)
    assert "to resume from it, and not only load_from it, add custom_hooks = [" in caplog.text


def test_a_distilled_runs_checkpoint_in_a_plain_run(tmp_path: Path, safe_globals: None) -> None:
    """It can be resumed if the methods train no weights; otherwise it can only be loaded from."""
    for name, method in (("without", FCD), ("with", PROJECTED)):
        train(tmp_path / name, **both("model", methods=[method]), hooks=[RESUME])
    one, other = (str(tmp_path / name / "epoch_1.pth") for name in ("without", "with"))
    assert len(train(tmp_path / "1", hooks=[RESUME], load_from=one, resume=True).logs) == 3
    with pytest.raises(KDHooksError, match=r"other methods.*fcd.projector.weight; resume with"):
        train(tmp_path / "2", hooks=[RESUME], load_from=other, resume=True)
    assert len(train(tmp_path / "3", hooks=[RESUME], load_from=other).logs) == 6


ECKD = {"name": "eckd", "exclusivity_weight": 0}  # its one weight has the shape of fcd's


@each_runner
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("before", "after"), [([PROJECTED, ECKD], [ECKD, PROJECTED]),
                                               ([PROJECTED], [ECKD])])  # fmt: skip
def test_other_methods_cannot_resume_this_state(
    tmp_path: Path,
    safe_globals: None,
    kind: str,
    told: bool,
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
) -> None:
    """The refusal comes with ResumeHook, or after allow_resume, by the first step at the latest."""
    mmengine.allow_resume()
    hooks = [RESUME] * told
    train(tmp_path / "a", kind, **both("model", methods=before), hooks=hooks)
    given: dict[str, Any] = {"hooks": hooks, "load_from": str(tmp_path / "a" / "epoch_1.pth")}
    with pytest.raises(KDHooksError, match=r"other methods.*it holds: kdhooks.*fcd.projector"):
        train(tmp_path / "b", kind, **both("model", methods=after), **given, resume=True)
    train(tmp_path / "c", kind, **both("model", methods=after), **given)
    train(tmp_path / "d", kind, **both("model", methods=before), **given, resume=True)


def test_the_state_of_the_optimizer_needs_the_same_methods(
    tmp_path: Path, safe_globals: None
) -> None:
    train(tmp_path / "a", **both("model", methods=[PROJECTED]), hooks=[RESUME])
    given: dict[str, Any] = {
        "hooks": [RESUME],
        "load_from": str(tmp_path / "a" / "epoch_1.pth"),
        "resume": True,
    }
    for methods in ([PROJECTED, ECKD], [FCD]):
        with pytest.raises(KDHooksError, match="or use load_from without resume"):
            train(tmp_path / "b", **both("model", methods=methods), **given)
    train(tmp_path / "c", **both("model", methods=["rkd", PROJECTED]), **given)


@each_runner
@each_door
def test_a_schedule_starts_again_after_load_from(
    tmp_path: Path, safe_globals: None, kind: str, door: str
) -> None:
    mmengine.allow_resume()
    table = both(door, methods=[{**FCD, "weight": {"value": 8.0, "warmup": 6}}])
    first = train(tmp_path / "a", kind, **copy.deepcopy(table))
    again = train(tmp_path / "b", kind, **table, load_from=str(tmp_path / "a" / "epoch_2.pth"))
    for run in (first, again):
        weights = [log["loss_kd_fcd"] / log["kd/fcd"] for log in run.logs]
        assert weights == pytest.approx([8 * step / 6 for step in range(6)])


@pytest.mark.parametrize("several", [False, True])
def test_an_optimizer_whose_state_cannot_be_extended_is_refused(several: bool) -> None:
    model = MODELS.build(distilled(methods=[PROJECTED]))
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    if several:
        wrapper = OptimWrapperDict(a=wrapper)
    else:
        wrapper.optimizer = object.__new__(ZeroRedundancyOptimizer)
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, _resume=True)
    found = "OptimWrapperDict" if several else "ZeroRedundancyOptimizer"
    with pytest.raises(
        KDHooksError, match=f"can't be added to the state of a {found}; use load_from"
    ):
        HOOKS.build(RESUME).after_load_checkpoint(runner, {"state_dict": {}, "optimizer": {}})
