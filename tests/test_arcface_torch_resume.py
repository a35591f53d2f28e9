"""The methods' parameters are trained, saved and resumed with the trainer's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arcface_runs import (
    COUPLEFACE,
    FCD,
    PROJECTED,
    TOGETHER,
    install,
    outcome,
    resumed_as_straight,
    same,
    saved,
)
from tests.standin import Trainer


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (PROJECTED[0], 1),
        (PROJECTED[1], 1),
        ({"name": "proxylesskd", "head": "own", "projector": True}, 4),
    ],
)
def test_auxiliaries_join_the_optimizer_and_learn(
    one: Trainer, wide: dict[str, str], method: dict[str, object], parameters: int
) -> None:
    ask = {"first": "opt.param_groups[-1]['params'][0] is module_partial_fc.weight"}
    (report,) = one.run(install(wide, method), ask=ask)
    assert report["groups"] == [34, parameters, 1]
    assert report["extra"] == {"first": True}  # forks rely on it
    assert report["auxiliaries"] != report["first_auxiliaries"]


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_resume_equals_the_straight_run(
    request: pytest.FixtureRequest, wide: dict[str, str], ranks: str
) -> None:
    trainer: Trainer = request.getfixturevalue(ranks)
    banks = {**PROJECTED[1], "relations": "bank"}, {"name": "icdface", "projector": True}
    line = install(wide, PROJECTED[0], *banks)  # each rank has banks for its own classes
    resumed_as_straight(trainer, line)


@pytest.mark.parametrize("methods", TOGETHER)
def test_resume_equals_the_straight_run_with_every_method(
    one: Trainer, teacher: dict[str, str], methods: str
) -> None:
    resumed_as_straight(one, install(teacher, *TOGETHER[methods]), gradient_acc=3)


def test_a_plain_checkpoint_can_be_resumed_with_a_method(
    one: Trainer, teacher: dict[str, str]
) -> None:
    whole: dict[str, Any] = {"sample_rate": 1.0, "num_epoch": 2}
    (plain,) = one.run(**whole, before_loop="cfg.num_epoch = 1")
    (idle,) = one.run(install(teacher, {**FCD, "weight": 0.0}), **whole, resume=plain["output"])
    (resumed,) = one.run(install(teacher, FCD, COUPLEFACE), **whole, resume=plain["output"])
    assert outcome(idle) == outcome(one.run(**whole, resume=plain["output"])[0])
    assert resumed["losses"] != idle["losses"]


def test_a_plain_checkpoint_can_be_resumed_with_auxiliaries(
    one: Trainer, wide: dict[str, str]
) -> None:
    whole: dict[str, Any] = {"num_epoch": 2, "sample_rate": 1.0}
    (plain,) = one.run(**whole, before_loop="cfg.num_epoch = 1")
    (straight,) = one.run(**whole, resume=plain["output"])
    ask = {"rates": "[group['lr'] for group in opt.param_groups]"}
    idle = [{**method, "weight": 0.0} for method in PROJECTED]
    (resumed,) = one.run(install(wide, *idle), **whole, resume=plain["output"], ask=ask)
    assert {**outcome(resumed), "groups": [34, 1]} == outcome(straight)
    assert len(set(resumed["extra"]["rates"])) == 1
    (moved,) = one.run(install(wide, *PROJECTED), **whole, resume=plain["output"])
    assert moved["auxiliaries"] != moved["first_auxiliaries"]
    assert moved["backbone"] != straight["backbone"]


def test_a_run_without_kdhooks_resumes_a_checkpoint_with_it(
    one: Trainer, wide: dict[str, str]
) -> None:
    whole: dict[str, Any] = {"num_epoch": 2, "sample_rate": 1.0}
    idle = install(wide, *({**method, "weight": 0.0} for method in PROJECTED))
    (distilled,) = one.run(idle, **whole, before_loop="cfg.num_epoch = 1")
    (plain,) = one.run(**whole, before_loop="cfg.num_epoch = 1")
    without = {key: value for key, value in saved(distilled).items() if key != "state_optimizer"}
    same(without, {key: value for key, value in saved(plain).items() if key in without})
    optimizer = saved(distilled)["state_optimizer"]
    assert set(optimizer.pop("kdhooks")["distiller"]) > {"losses.fcd.projector.weight"}
    same(optimizer, saved(plain)["state_optimizer"])
    (resumed,) = one.run(**whole, resume=distilled["output"])
    assert outcome(resumed) == outcome(one.run(**whole, resume=plain["output"])[0])


def test_a_checkpoint_of_other_methods_is_refused(one: Trainer, wide: dict[str, str]) -> None:
    (report,) = one.run(install(wide, PROJECTED[0]), num_epoch=2, before_loop="cfg.num_epoch = 1")
    (other,) = one.run(install(wide, *PROJECTED), num_epoch=2, resume=report["output"])
    assert other["error"] == "KDHooksError"
    assert (
        "written with other methods than the recipe's; resume with the checkpoint's"
        in other["message"]
    )


def test_a_checkpoint_of_another_number_of_ranks_is_refused(
    one: Trainer, two: Trainer, teacher: dict[str, str]
) -> None:
    folder = two.run(install(teacher, FCD), num_epoch=2)[0]["output"]
    (report,) = one.run(install(teacher, FCD), num_epoch=2, resume=folder)
    assert report["error"] == "KDHooksError"
    assert "holds 3 classes for this rank, but this run has 6" in report["message"]


def test_accumulation_comes_from_the_trainers_config(one: Trainer, teacher: dict[str, str]) -> None:
    (report,) = one.run(
        below_imports=install(teacher, FCD),
        gradient_acc=2,
        ask={"accumulation": "installed.attachment.distiller.accumulation"},
    )
    assert report["extra"] == {"accumulation": 2}


def test_checkpoints_of_two_ages_are_refused(two: Trainer, teacher: dict[str, str]) -> None:
    line = install(teacher, FCD)
    early = two.run(line, num_epoch=3, before_loop="cfg.num_epoch = 1")[0]["output"]
    late = two.run(line, num_epoch=3, before_loop="cfg.num_epoch = 2")[0]["output"]
    mixed = two.folder / "mixed"
    mixed.mkdir()
    for rank, source in enumerate((early, late)):
        name = f"checkpoint_gpu_{rank}.pt"
        (mixed / name).write_bytes(Path(source, name).read_bytes())
    for report in two.run(line, num_epoch=3, resume=str(mixed)):
        assert report["error"] == "KDHooksError"
        assert "must be of the same step; found [3, 6], by rank" in report["message"]


DIES_IN_ITS_SECOND_SAVE = (
    "import collections, os, signal\n"
    "class Killer:\n"
    "    calls = 0\n"
    "    def __deepcopy__(self, memo):\n"
    "        return self\n"
    "    def __reduce__(self):\n"
    "        Killer.calls += 1\n"
    "        if Killer.calls == 2:\n"
    "            os.kill(os.getpid(), signal.SIGKILL)\n"
    "        return collections.OrderedDict, ()\n"
    "opt.param_groups[0]['killer'] = Killer()\n"
)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_kill_during_a_save_loses_at_most_the_epoch(
    one: Trainer, teacher: dict[str, str], tmp_path: Path, distilled: bool
) -> None:
    line = install(teacher, COUPLEFACE) if distilled else ""
    whole: dict[str, Any] = {"num_epoch": 3, "sample_rate": 1.0}
    doomed = Trainer(1, tmp_path)
    with pytest.raises(AssertionError, match="the stand-in exited"):
        doomed.run(line, **whole, before_loop=DIES_IN_ITS_SECOND_SAVE)
    doomed.close()
    (resumed,) = one.run(line, **whole, resume=str(tmp_path / "run1"))
    if not distilled:  # the companion: the trainer's own file is damaged
        assert "error" in resumed
        return
    (straight,) = one.run(line, **whole)
    assert resumed["losses"] == straight["losses"][3:]
    assert resumed["backbone"] == straight["backbone"]


def test_a_ranks_checkpoint_keeps_the_one_before(one: Trainer, teacher: dict[str, str]) -> None:
    (report,) = one.run(install(teacher, FCD), num_epoch=2)
    previous = torch.load(Path(report["output"], "checkpoint_gpu_0.pt.previous"))
    assert (previous["epoch"], saved(report)["epoch"]) == (1, 2)
    assert not list(Path(report["output"]).glob("*.part"))
