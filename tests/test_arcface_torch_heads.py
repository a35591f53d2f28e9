"""Old heads, several heads and a head that holds the teacher's classifier can be distilled."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arcface_runs import FCD, PROJECTED, install, outcome, rows_of, saved
from tests.standin import Trainer

# --- other heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_heads_that_are_called_with_the_optimizer(
    one: Trainer, wide: dict[str, str], sample_rate: float
) -> None:
    """They put the sampled rows first into the optimizer's last group, so this group must not have
    auxiliary parameters.
    """
    old: dict[str, Any] = {"old_head": True, "sample_rate": sample_rate}
    idle = [{**method, "weight": 0.0} for method in PROJECTED]
    (plain,) = one.run(**old)
    (report,) = one.run(install(wide, *idle), **old)
    assert {**outcome(report), "groups": [34, 1]} == outcome(plain)
    (distilled,) = one.run(install(wide, *PROJECTED), **old)
    assert distilled["auxiliaries"] != distilled["first_auxiliaries"]


def test_an_old_head_without_sampling_takes_the_teachers_rows(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(install(teacher, "proxylesskd"), old_head=True, sample_rate=1.0)
    weight = saved(report)["state_dict_softmax_fc"]["weight_activated"]
    assert torch.equal(weight, rows_of(Path(teacher["checkpoint"]).parent))


def test_an_old_head_that_samples_cannot_hold_the_teachers_rows(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(install(teacher, "proxylesskd"), old_head=True)
    assert "must have a parameter 'weight'" in report["message"]
    assert "set head = 'own'" in report["message"]


SEEN = (
    "from kdhooks import EmbeddingTap, hookimpl\n"
    "from kdhooks_plugins.fcd import EmbeddingDistance\n"
    "labels = []\n"
    "class Kept(EmbeddingDistance):\n"
    "    def forward(self, student, teacher, own):\n"
    "        labels.append(own.tolist())\n"
    "        return super().forward(student, teacher, own)\n"
    "class Seen:\n"
    "    @hookimpl\n"
    "    def embedding_tap(self):\n"
    "        return EmbeddingTap('seen', Kept())\n"
)


def test_several_heads_share_a_batch(one: Trainer, teacher: dict[str, str]) -> None:
    del (without := dict(teacher))["classifier"]
    line = SEEN + install(without, "METHOD").replace("'METHOD'", "Seen()")
    (report,) = one.run(
        below_imports=line,
        heads=2,
        ask={"seen": "labels[-1]", "given": "local_labels[:, 0].tolist()"},
    )
    first, second = report["extra"]["given"][:6], report["extra"]["given"][6:]
    assert report["extra"]["seen"] == first + [label + 6 for label in second]
    idle = install(without, {**FCD, "weight": 0.0})
    assert outcome(one.run(idle, heads=2)[0]) == outcome(one.run(heads=2)[0])


def test_several_heads_share_no_classifier(one: Trainer, teacher: dict[str, str]) -> None:
    (report,) = one.run(install(teacher, "proxylesskd"), heads=2)
    assert "uses one classifier, and the trainer has 2 heads" in report["message"]


def test_a_head_that_is_not_used_is_noticed(one: Trainer, teacher: dict[str, str]) -> None:
    del (without := dict(teacher))["classifier"]
    half = (
        "heads.pop()\n"
        "cfg.heads, part = 1, slice(0, 6)\n"
        "heads[0].register_forward_pre_hook(lambda h, given: (given[0][part], given[1][part]))\n"
    )
    (report,) = one.run(below_imports=install(without, FCD), before_loop=half, heads=2)
    assert report["error"] == "KDHooksError"
    assert "before kd computed the terms of that forward" in report["message"]
    assert "each batch must go through all attached heads" in report["message"]


# --- ProxylessKD: the head's own classifier ------------------------------------------------------


def test_the_head_holds_the_teachers_rows_and_keeps_them(
    one: Trainer, teacher: dict[str, str]
) -> None:
    ask = {"frozen": "not module_partial_fc.weight.requires_grad"}
    (report,) = one.run(install(teacher, "proxylesskd"), ask=ask)
    weight = saved(report)["state_dict_softmax_fc"]["weight"]
    assert torch.equal(weight, rows_of(Path(teacher["checkpoint"]).parent))
    assert report["extra"] == {"frozen": True}
    assert report["losses"][0] != one.run()[0]["losses"][0]


@pytest.mark.parametrize("name", ["weight", "weight_activated"])
def test_a_plain_checkpoint_does_not_replace_the_teachers_rows(
    one: Trainer, teacher: dict[str, str], name: str
) -> None:
    whole: dict[str, Any] = {"num_epoch": 2, "sample_rate": 1.0}
    whole["old_head"] = name == "weight_activated"
    (plain,) = one.run(**whole, before_loop="cfg.num_epoch = 1")
    (report,) = one.run(install(teacher, "proxylesskd"), **whole, resume=plain["output"])
    weight = saved(report)["state_dict_softmax_fc"][name]
    assert torch.equal(weight, rows_of(Path(teacher["checkpoint"]).parent))


def test_a_schedule_of_its_weight_is_refused(one: Trainer, teacher: dict[str, str]) -> None:
    """The head is frozen, so with weight 0 nothing would be trained."""
    later = {"name": "proxylesskd", "weight": {"value": 1.0, "start": 2}}
    (report,) = one.run(install(teacher, later))
    assert "proxylesskd: its weight must be a number" in report["message"]


def test_the_log_has_its_loss(one: Trainer, teacher: dict[str, str]) -> None:
    (report,) = one.run(install(teacher, {"name": "proxylesskd", "weight": 0.5}), steps=2)
    logged = {tag: value for _, tag, value in report["logged"]}
    assert logged["kdhooks/proxylesskd/weighted"] == pytest.approx(sum(report["losses"]) / 2)
    assert logged["kdhooks/proxylesskd"] == pytest.approx(sum(report["losses"]))


def test_its_weight_scales_the_trainers_loss(one: Trainer, teacher: dict[str, str]) -> None:
    (whole,) = one.run(install(teacher, "proxylesskd"), steps=1)
    (half,) = one.run(install(teacher, {"name": "proxylesskd", "weight": 0.5}), steps=1)
    assert half["losses"][0] == pytest.approx(whole["losses"][0] / 2)
