"""The added line has the same effect at each place in arcface_torch's script, and harms no run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdhooks import KDHooksError
from kdhooks_integrations import arcface_torch
from tests.arcface_runs import (
    COUPLEFACE,
    EVERY,
    FCD,
    METHODS,
    PROJECTED,
    attach,
    install,
    outcome,
    recipe,
    saved,
)
from tests.standin import Trainer

PREAMBLE = "from tests.standin.utils import PolynomialWarmup\n"


# --- the place of the line -----------------------------------------------------------------------


def test_a_run_repeats_to_the_last_bit(one: Trainer) -> None:
    """The companion of the tests below: the results that they compare are deterministic."""
    (first,), (again,) = one.run(), one.run(fresh=True)
    assert outcome(again) == outcome(first)
    assert outcome(one.run(seed=7)[0]) != outcome(first)


@pytest.mark.parametrize("method", METHODS)
def test_the_line_has_the_same_effect_at_each_place(
    one: Trainer, teacher: dict[str, str], method: str
) -> None:
    line = install(teacher, METHODS[method])
    (in_config,) = one.run(line)
    (below_imports,) = one.run(below_imports=line)
    (attached,) = one.run(after_schedule=attach(teacher, METHODS[method]))
    assert outcome(in_config) == outcome(below_imports) == outcome(attached)
    assert in_config["losses"] != one.run()[0]["losses"]


def test_a_toml_file_has_the_same_effect(
    one: Trainer, teacher: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "kd.toml"
    table = "\n".join(f"{key} = '{value}'" for key, value in teacher.items())
    file.write_text(f"methods = ['fcd']\ninput_shape = [3, 32, 32]\n[teacher]\n{table}\n")
    line = f"from kdhooks_integrations import arcface_torch\narcface_torch.install({str(file)!r})"
    assert outcome(one.run(line)[0]) == outcome(one.run(install(teacher, "fcd"))[0])


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_cached_run_repeats_the_run_that_filled_the_cache(
    ranks: str, teacher: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """They agree to the last bit; a run without a cache differs only by rounding."""
    trainer: Trainer = request.getfixturevalue(ranks)
    cached = install({**teacher, "cache": str(tmp_path / "cache")}, FCD)
    filling, repeating = (trainer.run(cached, fresh=True) for _ in range(2))
    assert [outcome(report) for report in filling] == [outcome(report) for report in repeating]
    files = list((tmp_path / "cache").glob("*.keys"))
    assert len(files) == len(filling)  # one per rank; the second run added none
    plain = trainer.run(install(teacher, FCD))
    assert filling[0]["losses"] != plain[0]["losses"]
    assert filling[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-3)


def test_two_installs_count_once(one: Trainer, teacher: dict[str, str]) -> None:
    line = install(teacher, FCD)
    (once,) = one.run(below_imports=line)
    (twice,) = one.run(line, below_imports=line)
    assert outcome(twice) == outcome(once)


def test_remove_restores_the_trainer(one: Trainer, teacher: dict[str, str]) -> None:
    (removed,) = one.run(
        below_imports="plain = get_model\n" + install(teacher, FCD, COUPLEFACE),
        before_loop="installed.remove()",
        ask={
            "names": "get_model is plain and isinstance(PartialFC_V2, type)",
            "head hooks": "len(module_partial_fc._forward_hooks)",
            "backbone hooks": "sum(len(m._forward_hooks) for m in raw.modules())",
            "children": "[name for name, _ in module_partial_fc.named_children()]",
        },
    )
    assert outcome(removed) == outcome(one.run()[0])
    assert removed["extra"] == {
        "names": True, "head hooks": 0, "backbone hooks": 0, "children": ["margin_softmax"],
    }  # fmt: skip


def test_a_head_is_distilled_once(one: Trainer, teacher: dict[str, str]) -> None:
    line = attach(teacher, FCD)
    (report,) = one.run(after_schedule=line + line)
    assert "this head is distilled already" in report["message"]


def test_install_expects_backbone_and_head_before_the_schedule(
    one: Trainer, teacher: dict[str, str]
) -> None:
    early = "import torch\nPolynomialWarmup(torch.optim.SGD([torch.zeros(1)]), 2, 9)"
    (report,) = one.run(below_imports=PREAMBLE + install(teacher, FCD) + early)
    assert "to call get_model and create a PartialFC before its LR schedule" in report["message"]


def test_install_refuses_another_main_program() -> None:
    given = {"teacher": nn.Identity(), "methods": ["fcd"]}
    with pytest.raises(KDHooksError, match="no get_model and no PartialFC_V2 and no class of"):
        arcface_torch.install(given)


def scheduled(
    backbone: nn.Module,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)


def test_attach_refuses_a_head_without_rows() -> None:
    given = {"teacher": nn.Identity(), "methods": ["fcd"]}
    backbone = nn.Linear(2, 2)
    with pytest.raises(KDHooksError, match="found none in Identity"):
        arcface_torch.attach(backbone, nn.Identity(), *scheduled(backbone), given)


def test_attach_needs_the_trainers_factory_for_a_named_network(teacher: dict[str, str]) -> None:
    given = recipe(teacher, "fcd")
    backbone = nn.Linear(2, 2)
    with pytest.raises(
        KDHooksError, match=r"'backbones' can't be imported; run in its folder, .* as --trainer"
    ):
        arcface_torch.attach(backbone, nn.Linear(2, 2), *scheduled(backbone), given)


def test_a_schedule_that_install_does_not_see_is_noticed(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(
        install(teacher, FCD) + "import __main__\nfrom tests.standin import utils\n"
        "__main__.PolynomialWarmup = utils.PolynomialWarmup\n"
    )
    assert "the head runs, but distillation is not attached" in report["message"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("lr_scheduler.step()", "the schedule has taken or resumed steps"),
        ("opt.state[raw.conv1.weight]['x'] = 1", "the optimizer has taken or resumed steps"),
        ("opt = torch.optim.SGD([torch.zeros(1)], lr=1)", "the schedule is of another optimizer"),
        (
            "opt = torch.optim.SGD([torch.zeros(1)], lr=1); lr_scheduler.optimizer = opt",
            "the optimizer does not train the backbone",
        ),
    ],
)
def test_attaching_late_or_elsewhere_is_refused(
    one: Trainer, teacher: dict[str, str], change: str, found: str
) -> None:
    (report,) = one.run(after_schedule=f"{change}\n" + attach(teacher, FCD))
    assert f"arcface_torch: {found}; attach right after" in report["message"]


def test_a_fork_may_subclass_what_the_line_wraps(one: Trainer, teacher: dict[str, str]) -> None:
    fork = "class Mine(PartialFC_V2):\n    pass\nPartialFC_V2 = Mine\n"
    (report,) = one.run(
        below_imports="plain = PartialFC_V2\n" + install(teacher, FCD) + fork,
        ask={"head": "isinstance(module_partial_fc, plain)"},
    )
    assert outcome(report) == outcome(one.run(install(teacher, FCD))[0])
    assert report["extra"] == {"head": True}


def test_a_head_with_another_call_is_refused(one: Trainer, teacher: dict[str, str]) -> None:
    line = "module_partial_fc.register_forward_hook(lambda h, given, loss: (loss, 1))\n"
    (report,) = one.run(after_schedule=line + attach(teacher, FCD))
    assert "PartialFC_V2 must be called with embeddings and labels and return" in report["message"]


def test_a_copy_of_the_head_is_left_alone(one: Trainer, teacher: dict[str, str]) -> None:
    copied = "__import__('copy').deepcopy(module_partial_fc)"
    ask = {"copy": f"{copied}(local_embeddings.detach(), local_labels).ndim"}
    (report,) = one.run(install(teacher, FCD), ask=ask)
    assert report["extra"] == {"copy": 0}


# --- do no harm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config_line", "below_imports", "after_schedule"])
def test_weight_zero_is_the_plain_run(one: Trainer, teacher: dict[str, str], where: str) -> None:
    nothing = [{**method, "weight": 0.0} for method in METHODS.values()]
    line = (attach if where == "after_schedule" else install)(teacher, *nothing)
    there: dict[str, Any] = {where: line}
    (report,) = one.run(**there)
    assert outcome(report) == outcome(one.run()[0])


@pytest.mark.parametrize("gradient_acc", [1, 2])
def test_weight_zero_of_all_methods_together_is_the_plain_run(
    one: Trainer, teacher: dict[str, str], gradient_acc: int
) -> None:
    nothing = [{**m, "weight": 0.0} for name, m in EVERY.items() if name not in ("bank", "own")]
    (report,) = one.run(install(teacher, *nothing), gradient_acc=gradient_acc)
    assert {**outcome(report), "groups": [34, 1]} == outcome(one.run(gradient_acc=gradient_acc)[0])


def test_weight_zero_with_projectors_is_the_plain_run(one: Trainer, wide: dict[str, str]) -> None:
    nothing = [{**method, "weight": 0.0} for method in PROJECTED]
    report, plain = outcome(one.run(install(wide, *nothing))[0]), outcome(one.run()[0])
    assert report.pop("groups") == [34, 2, 1]
    assert plain.pop("groups") == [34, 1]
    assert report == plain


def test_schedules_count_the_epochs_of_the_trainers_config(
    one: Trainer, teacher: dict[str, str]
) -> None:
    """An epoch has 3 steps of 12 images; the 37th image is dropped."""
    weight = {"value": 8.0, "start": 1, "warmup": 0.5, "unit": "epoch"}
    line = install(teacher, {**FCD, "weight": weight})
    distiller = "installed.attachment.distiller"
    ask = {"weight": f"{distiller}.weight({distiller}.taps[0])"}  # after the last step
    found = [
        one.run(below_imports=line, num_image=37, steps=steps, ask=ask)[0]["extra"]["weight"]
        for steps in (2, 3, 4, 5)
    ]
    assert found == pytest.approx([0.0, 0.0, 8.0 * 2 / 3, 8.0])


def test_epochs_that_the_config_does_not_know_are_refused(
    one: Trainer, teacher: dict[str, str]
) -> None:
    weight = {"value": 8.0, "start": 1, "unit": "epoch"}
    (report,) = one.run(install(teacher, {**FCD, "weight": weight}))
    assert report["error"] == "KDHooksError"
    assert "the number of steps in an epoch is not known" in report["message"]


@pytest.mark.parametrize("method", METHODS)
def test_model_pt_has_only_the_students_keys(
    one: Trainer, teacher: dict[str, str], wide: dict[str, str], method: str
) -> None:
    plain = set(saved(one.run()[0], "model.pt"))
    (report,) = one.run(install(teacher, METHODS[method]))
    (projected,) = one.run(install(wide, *PROJECTED))
    assert set(saved(report, "model.pt")) == plain
    assert set(saved(projected, "model.pt")) == plain
    keys = [key for key in saved(report)["state_dict_softmax_fc"] if "_teacher" in key]
    assert not keys


def test_evaluation_runs_no_teacher_and_keeps_nothing(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(
        below_imports="calls = []\n" + install(teacher, FCD, COUPLEFACE),
        before_loop=(
            "teacher = installed.attachment.distiller._session.teacher.module\n"
            "teacher.register_forward_pre_hook(lambda *a: calls.append(1))"
        ),
        verbose=1,
        ask={
            "calls": "len(calls)",
            "pending": "installed.attachment.distiller.pending is not None",
            "records": "len(installed.attachment.distiller._student._taps._records)",
            "teacher awake": "installed.attachment.distiller._session.teacher.module.training",
        },
    )
    assert len(report["verified"]) == 3
    assert report["extra"] == {"calls": 3, "pending": False, "records": 0, "teacher awake": False}


def test_a_copy_of_the_backbone_holds_no_teacher(one: Trainer, teacher: dict[str, str]) -> None:
    ask = {
        "pickled": "len(__import__('pickle').dumps(raw))",
        "copied": "len(__import__('pickle').dumps(__import__('copy').deepcopy(raw)))",
        "run": "tuple(__import__('copy').deepcopy(raw).train()(img).shape)",
    }
    pending = {"pending": "installed.attachment.distiller.pending is not None"}
    (plain,) = one.run(ask=ask)
    (report,) = one.run(below_imports=install(teacher, FCD), ask={**ask, **pending})
    assert report["extra"]["run"] == [12, 16]
    assert not report["extra"]["pending"]
    for way in ("pickled", "copied"):
        assert report["extra"][way] < plain["extra"][way] + 2000
