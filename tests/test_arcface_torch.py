"""The adapter of InsightFace's arcface_torch, through a stand-in trainer in its own processes."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdhooks import KDHooksError
from kdhooks_integrations import arcface_torch
from tests.standin import Report, Trainer
from tests.standin.backbones import get_model

FCD = {"name": "fcd", "weight": 8.0}
COUPLEFACE: dict[str, object] = {"name": "coupleface", "k": 2}
METHODS: dict[str, dict[str, object]] = {
    "fcd": dict(FCD),
    "coupleface": COUPLEFACE,
    "proxylesskd": {"name": "proxylesskd"},
}
EVERY: dict[str, dict[str, object]] = {  # with whatever each of them keeps from step to step
    **METHODS,
    "acsr": {"name": "acsr", "warmup_steps": 4},
    "adadistill": {"name": "adadistill"},
    "at": {"name": "at"},
    "bank": {**COUPLEFACE, "relations": "bank", "bank_momentum": 0.5, "warmup_steps": 4},
    "cakd": {"name": "cakd", "width": 8, "heads": 2, "centres": 4, "prompts": 0},
    "eckd": {"name": "eckd"},
    "gkd": {"name": "gkd", "largest": 5},
    "kd": {"name": "kd"},
    "margindistillation": {"name": "margindistillation"},
    "own": {"name": "proxylesskd", "head": "own", "margin_warmup_steps": 4},
    "reviewkd": {"name": "reviewkd", "warmup_steps": 4},
    "rkd": {"name": "rkd"},
    "sp": {"name": "sp"},
    "thkd": {"name": "thkd"},
}
PROJECTED = [{**FCD, "projector": True}, {**COUPLEFACE, "projector": True}]
OUTCOME = ("losses", "verified", "backbone", "head", "generator", "groups", "files")
NOT_COMPRESSED: dict[str, Any] = {"compress": False, "sample_rate": 1.0, "lr": 0.02}


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    trainer = Trainer(1, tmp_path_factory.mktemp("one"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    trainer = Trainer(2, tmp_path_factory.mktemp("two"))
    yield trainer
    trainer.close()


def trained(trainer: Trainer, **config: Any) -> Path:
    """The output of a plain run that has learnt its identities."""
    (report, *_) = trainer.run(steps=60, sample_rate=1.0, seed=1, verbose=100, **config)
    assert sum(report["losses"][-10:]) < 0.2 * sum(report["losses"][:10])
    return Path(report["output"])


@pytest.fixture(scope="session")
def teacher(one: Trainer) -> dict[str, str]:
    return described(trained(one))


@pytest.fixture(scope="session")
def wide(one: Trainer) -> dict[str, str]:
    """A teacher of another network and another width."""
    return described(trained(one, network="wide", embedding_size=24), "wide")


def described(folder: Path, network: str = "tiny") -> dict[str, str]:
    return {
        "network": network,
        "checkpoint": str(folder / "model.pt"),
        "classifier": str(folder / "checkpoint_gpu_*.pt"),
    }


def recipe(teacher: dict[str, str], *methods: object, **more: object) -> dict[str, object]:
    return {"teacher": teacher, "methods": list(methods), "input_shape": [3, 32, 32], **more}


def install(teacher: dict[str, str], *methods: object, **more: object) -> str:
    """The line a user adds."""
    given = recipe(teacher, *methods, **more)
    return (
        "from kdhooks_integrations import arcface_torch\n"
        f"installed = arcface_torch.install({given!r})\n"
    )


def attach(teacher: dict[str, str], *methods: object, **more: object) -> str:
    given = recipe(teacher, *methods, **more)
    return (
        "from kdhooks_integrations import arcface_torch\n"
        "attached = arcface_torch.attach(\n"
        f"    backbone, module_partial_fc, opt, lr_scheduler, {given!r}, get_model=get_model\n"
        ")\n"
    )


def outcome(report: Report) -> dict[str, object]:
    """What a run came to; two runs that agree here agree to the last bit."""
    assert "error" not in report, report
    return {key: report[key] for key in OUTCOME}


def saved(report: Report, file: str = "checkpoint_gpu_0.pt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(Path(report["output"]) / file)
    return content


PREAMBLE = "from tests.standin.utils import PolynomialWarmup\n"


def rows_of(folder: Path) -> Tensor:
    shards = sorted(folder.glob("checkpoint_gpu_*.pt"))
    return torch.cat([torch.load(shard)["state_dict_softmax_fc"]["weight"] for shard in shards])


# --- where the line stands -----------------------------------------------------------------------


def test_a_run_repeats_to_the_last_bit(one: Trainer) -> None:
    """The twin of the tests below: what they compare does not vary by itself."""
    (first,), (again,) = one.run(), one.run(fresh=True)
    assert outcome(again) == outcome(first)
    assert outcome(one.run(seed=7)[0]) != outcome(first)


@pytest.mark.parametrize("method", METHODS)
def test_the_line_does_the_same_wherever_it_stands(
    one: Trainer, teacher: dict[str, str], method: str
) -> None:
    line = install(teacher, METHODS[method])
    (in_config,) = one.run(line)
    (below_imports,) = one.run(below_imports=line)
    (attached,) = one.run(after_schedule=attach(teacher, METHODS[method]))
    assert outcome(in_config) == outcome(below_imports) == outcome(attached)
    assert in_config["losses"] != one.run()[0]["losses"]


def test_a_toml_file_says_the_same(one: Trainer, teacher: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "kd.toml"
    table = "\n".join(f"{key} = '{value}'" for key, value in teacher.items())
    file.write_text(f"methods = ['fcd']\ninput_shape = [3, 32, 32]\n[teacher]\n{table}\n")
    line = f"from kdhooks_integrations import arcface_torch\narcface_torch.install({str(file)!r})"
    assert outcome(one.run(line)[0]) == outcome(one.run(install(teacher, "fcd"))[0])


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_cached_run_repeats_the_run_that_filled_the_cache(
    ranks: str, teacher: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To the last bit; and without a cache but for the rounding."""
    trainer: Trainer = request.getfixturevalue(ranks)
    cached = install({**teacher, "cache": str(tmp_path / "cache")}, FCD)
    filling, repeating = (trainer.run(cached, fresh=True) for _ in range(2))
    assert [outcome(report) for report in filling] == [outcome(report) for report in repeating]
    files = list((tmp_path / "cache").glob("*.keys"))
    assert len(files) == len(filling)  # each rank filled one, and the second run added nothing
    plain = trainer.run(install(teacher, FCD))
    assert filling[0]["losses"] != plain[0]["losses"]
    assert filling[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-3)


def test_two_installs_count_once(one: Trainer, teacher: dict[str, str]) -> None:
    line = install(teacher, FCD)
    (once,) = one.run(below_imports=line)
    (twice,) = one.run(line, below_imports=line)
    assert outcome(twice) == outcome(once)


def test_remove_gives_the_trainer_back(one: Trainer, teacher: dict[str, str]) -> None:
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
    assert "expects a get_model and a PartialFC before the schedule" in report["message"]


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
    with pytest.raises(KDHooksError, match="'backbones' can't be imported; run in its folder"):
        arcface_torch.attach(backbone, nn.Linear(2, 2), *scheduled(backbone), given)


def test_a_schedule_that_install_does_not_see_is_noticed(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(
        install(teacher, FCD) + "import __main__\nfrom tests.standin import utils\n"
        "__main__.PolynomialWarmup = utils.PolynomialWarmup\n"
    )
    assert "the head runs, and nothing distils" in report["message"]


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


def test_a_head_called_otherwise_is_refused(one: Trainer, teacher: dict[str, str]) -> None:
    line = "module_partial_fc.register_forward_hook(lambda h, given, loss: (loss, 1))\n"
    (report,) = one.run(after_schedule=line + attach(teacher, FCD))
    assert "PartialFC_V2 must be called with embeddings and labels and return" in report["message"]


def test_a_copy_of_the_head_is_left_alone(one: Trainer, teacher: dict[str, str]) -> None:
    copied = "__import__('copy').deepcopy(module_partial_fc)"
    ask = {"copy": f"{copied}(local_embeddings.detach(), local_labels).ndim"}
    (report,) = one.run(install(teacher, FCD), ask=ask)
    assert report["extra"] == {"copy": 0}


# --- do no harm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [["fcd"], ["coupleface"], ["proxylesskd"], list(METHODS)])
@pytest.mark.parametrize("where", ["config_line", "below_imports", "after_schedule"])
def test_weight_zero_is_the_plain_run(
    one: Trainer, teacher: dict[str, str], methods: list[str], where: str
) -> None:
    nothing = [{**METHODS[method], "weight": 0.0} for method in methods]
    line = (attach if where == "after_schedule" else install)(teacher, *nothing)
    there: dict[str, Any] = {where: line}
    (report,) = one.run(**there)
    assert outcome(report) == outcome(one.run()[0])


@pytest.mark.parametrize("gradient_acc", [1, 2])
def test_weight_zero_of_every_method_at_once_is_the_plain_run(
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


@pytest.mark.parametrize("method", METHODS)
def test_model_pt_has_the_students_keys_alone(
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


# --- methods with parameters of their own --------------------------------------------------------


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
    assert report["extra"] == {"first": True}  # forks count on it
    assert report["auxiliaries"] != report["first_auxiliaries"]


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_resume_equals_the_straight_run(
    request: pytest.FixtureRequest, wide: dict[str, str], ranks: str
) -> None:
    trainer: Trainer = request.getfixturevalue(ranks)
    line = install(wide, *PROJECTED)
    whole: dict[str, Any] = {"sample_rate": 1.0, "num_epoch": 2}
    straight = trainer.run(line, **whole)
    stopped = trainer.run(line, **whole, before_loop="cfg.num_epoch = 1")
    resumed = trainer.run(line, **whole, resume=stopped[0]["output"])
    for whole_run, first, second in zip(straight, stopped, resumed, strict=True):
        assert first["losses"] + second["losses"] == whole_run["losses"]
        for what in ("backbone", "head", "auxiliaries"):
            assert second[what] == whole_run[what]


@pytest.mark.parametrize("method", EVERY)
def test_resume_equals_the_straight_run_with_every_method(
    one: Trainer, teacher: dict[str, str], method: str
) -> None:
    line, whole = install(teacher, EVERY[method]), {"num_epoch": 2, "gradient_acc": 3}
    fixed: dict[str, Any] = {**whole, "sample_rate": 1.0}
    (straight,) = one.run(line, **fixed)
    (stopped,) = one.run(line, **fixed, before_loop="cfg.num_epoch = 1")
    (resumed,) = one.run(line, **fixed, resume=stopped["output"])
    assert stopped["losses"] + resumed["losses"] == straight["losses"]
    for what in ("backbone", "head", "auxiliaries"):
        assert resumed[what] == straight[what]


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


def test_a_run_without_kdhooks_goes_on_from_a_checkpoint_with_it(
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


def same(found: Any, expected: Any) -> None:
    """Two checkpoints, entry by entry, to the last bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_a_checkpoint_of_other_methods_is_refused(one: Trainer, wide: dict[str, str]) -> None:
    (report,) = one.run(install(wide, PROJECTED[0]), num_epoch=2, before_loop="cfg.num_epoch = 1")
    (other,) = one.run(install(wide, *PROJECTED), num_epoch=2, resume=report["output"])
    assert other["error"] == "KDHooksError"
    assert "written with other methods than the recipe's; resume with those" in other["message"]


def test_a_checkpoint_of_another_number_of_ranks_is_refused(
    one: Trainer, two: Trainer, teacher: dict[str, str]
) -> None:
    folder = two.run(install(teacher, FCD), num_epoch=2)[0]["output"]
    (report,) = one.run(install(teacher, FCD), num_epoch=2, resume=folder)
    assert report["error"] == "KDHooksError"
    assert "holds 3 classes for this rank, the run has 6" in report["message"]


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
        assert "must be of one step; found [3, 6], by rank" in report["message"]


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
def test_a_kill_while_it_saves_loses_no_more_than_the_epoch(
    one: Trainer, teacher: dict[str, str], tmp_path: Path, distilled: bool
) -> None:
    line = install(teacher, COUPLEFACE) if distilled else ""
    whole: dict[str, Any] = {"num_epoch": 3, "sample_rate": 1.0}
    doomed = Trainer(1, tmp_path)
    with pytest.raises(AssertionError, match="the stand-in died"):
        doomed.run(line, **whole, before_loop=DIES_IN_ITS_SECOND_SAVE)
    doomed.close()
    (resumed,) = one.run(line, **whole, resume=str(tmp_path / "run1"))
    if not distilled:  # the twin: the trainer's own file is spoilt
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


# --- what it logs --------------------------------------------------------------------------------


def test_the_trainers_logger_gets_every_term_at_its_own_interval(
    one: Trainer, teacher: dict[str, str]
) -> None:
    (report,) = one.run(
        below_imports="values = []\n" + install(teacher, FCD, COUPLEFACE),
        before_loop=(
            "installed.attachment.distiller.register_forward_hook(\n"
            "    lambda module, args, terms: values.append(float(module.metrics['fcd']))\n"
            ")"
        ),
        steps=5,
        ask={"values": "values"},
    )
    logged = {(step, tag): value for step, tag, value in report["logged"]}
    first, second, third, fourth, _ = report["extra"]["values"]
    assert logged[2, "kdhooks/fcd"] == pytest.approx((first + second) / 2)
    assert logged[4, "kdhooks/fcd"] == pytest.approx((third + fourth) / 2)
    assert logged[4, "kdhooks/fcd/weighted"] == pytest.approx(8 * (third + fourth) / 2)
    assert {step for step, _ in logged} == {2, 4}
    assert (4, "kdhooks/coupleface/active") in logged


def test_steps_that_the_optimizer_skipped_are_counted(
    one: Trainer, teacher: dict[str, str]
) -> None:
    skip = (
        "calls, taken = [], opt.step\n"
        "opt.step = lambda: calls.append(1) or (taken() if len(calls) != 2 else None)"
    )
    ask = {"skipped": "installed.attachment.skipped"}
    line = install(teacher, FCD)
    (report,) = one.run(below_imports=line, before_loop=skip, ask=ask)
    assert report["extra"] == {"skipped": 1}
    assert one.run(below_imports=line, ask=ask)[0]["extra"] == {"skipped": 0}


def test_a_term_that_fails_in_the_last_step_is_noticed_before_the_student_is_saved(
    one: Trainer, teacher: dict[str, str]
) -> None:
    third = (
        "kd = installed.attachment.distiller\n"
        "kd._session.teacher.module.register_forward_hook(\n"
        "    lambda m, given, out, kd=kd, bad=torch.nan: out * bad if kd.step == 2 else out\n"
        ")\n"
    )
    (report,) = one.run(below_imports=install(teacher, FCD), before_loop=third)
    assert report["error"] == "KDHooksError"
    assert "step 3: fcd not finite and the teacher's embedding not finite" in report["message"]
    assert not (Path(report["output"]) / "model.pt").exists()


def test_the_whole_run_is_summed_up(one: Trainer, teacher: dict[str, str]) -> None:
    ask = {
        "whole": "installed.attachment._interval.overall()['fcd']",
        "fcd": "[v for _, tag, v in callback_logging.writer.logged if tag == 'kdhooks/fcd']",
    }
    (report,) = one.run(below_imports=install(teacher, FCD), steps=4, ask=ask)
    assert report["extra"]["whole"] == pytest.approx(sum(report["extra"]["fcd"]) / 2)


# --- other heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_heads_that_are_called_with_the_optimizer(
    one: Trainer, wide: dict[str, str], sample_rate: float
) -> None:
    """They put the sampled rows first into the last group, where no auxiliary may be."""
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
    assert "must train a parameter 'weight'" in report["message"]
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
    assert "shares one classifier, and the trainer has 2 heads" in report["message"]


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
    """The head is frozen: with weight 0 nothing would train."""
    later = {"name": "proxylesskd", "weight": {"value": 1.0, "start": 2}}
    (report,) = one.run(install(teacher, later))
    assert "proxylesskd: its weight must be a number" in report["message"]


def test_it_shows_in_the_log(one: Trainer, teacher: dict[str, str]) -> None:
    (report,) = one.run(install(teacher, {"name": "proxylesskd", "weight": 0.5}), steps=2)
    logged = {tag: value for _, tag, value in report["logged"]}
    assert logged["kdhooks/proxylesskd/weighted"] == pytest.approx(sum(report["losses"]) / 2)
    assert logged["kdhooks/proxylesskd"] == pytest.approx(sum(report["losses"]))


def test_its_weight_scales_the_trainers_loss(one: Trainer, teacher: dict[str, str]) -> None:
    (whole,) = one.run(install(teacher, "proxylesskd"), steps=1)
    (half,) = one.run(install(teacher, {"name": "proxylesskd", "weight": 0.5}), steps=1)
    assert half["losses"][0] == pytest.approx(whole["losses"][0] / 2)


# --- what would train the wrong thing ------------------------------------------------------------


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
    assert "does not fit the network named for it" in message


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
        ({"chekpoint": "model.pt"}, "teacher has no key 'chekpoint'; did you mean 'checkpoint'?"),
        ({"metods": []}, "recipe has no key 'metods'; did you mean 'methods'?"),
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
        ({"name": "fcd", "weight": -1.0}, "fcd: weight must be finite and at least 0"),
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


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "compiled", "backend"),
    [
        ("config_line", "before DDP", "eager"),
        ("config_line", "before DDP", "aot_eager"),
        ("config_line", "after DDP", "eager"),
        ("config_line", "module", "aot_eager"),
        ("after_schedule", "after DDP", "eager"),
    ],
)
def test_a_compiled_backbone_gives_the_same_losses(
    one: Trainer, teacher: dict[str, str], where: str, compiled: str, backend: str
) -> None:
    line = (attach if where == "after_schedule" else install)(teacher, FCD, {"name": "at"})
    there: dict[str, Any] = {where: line}
    (report,) = one.run(**there, compile=backend, compiled=compiled)
    (uncompiled,) = one.run(**there)
    torch.testing.assert_close(report["losses"], uncompiled["losses"], rtol=1e-6, atol=1e-6)
    assert report["groups"] == uncompiled["groups"]


@pytest.mark.slow
def test_a_backbone_compiled_by_inductor_gives_the_same_losses(
    one: Trainer, teacher: dict[str, str]
) -> None:
    if not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    line = install(teacher, FCD, {"name": "at"})
    (report,) = one.run(line, compile="inductor")
    torch.testing.assert_close(report["losses"], one.run(line)[0]["losses"], rtol=1e-4, atol=1e-4)


FIRST_CALL = (
    "module_partial_fc(backbone(torch.rand(12, 3, 32, 32)), torch.arange(12) % 6).backward()\n"
)


def test_an_inner_tap_of_a_compiled_backbone_that_ran_already_is_refused(
    one: Trainer, teacher: dict[str, str]
) -> None:
    line = attach(teacher, FCD, taps={"student": {"embedding": "features"}})
    (report,) = one.run(after_schedule=FIRST_CALL + line, compile="eager")
    assert report["error"] == "KDHooksError"
    assert "attach before the first call of a compiled model" in report["message"]


def test_the_output_of_a_compiled_backbone_can_be_tapped_late(
    one: Trainer, teacher: dict[str, str]
) -> None:
    """torch.compile heeds later hooks of the outermost module alone."""
    line = FIRST_CALL + attach(teacher, FCD)
    (report,) = one.run(after_schedule=line, compile="eager")
    torch.testing.assert_close(report["losses"], one.run(after_schedule=line)[0]["losses"])
    assert report["losses"] != one.run(after_schedule=FIRST_CALL)[0]["losses"]


EQUAL_ROWS = (
    "whole = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))\n"
    "start = module_partial_fc.class_start\n"
    "own = whole[start : start + module_partial_fc.num_local]\n"
    "if module_partial_fc.weight.requires_grad: module_partial_fc.weight.data.copy_(own)\n"
)


# --- two processes -------------------------------------------------------------------------------


def test_auxiliaries_stay_equal_on_two_ranks_with_uneven_classes(
    one: Trainer, two: Trainer
) -> None:
    few = described(trained(one, network="wide", embedding_size=24, num_classes=5), "wide")
    own = {"name": "proxylesskd", "head": "own", "projector": True}
    first, second = two.run(install(few, *PROJECTED, own), num_classes=5, gradient_acc=2)
    assert first["auxiliaries"] == second["auxiliaries"] != first["first_auxiliaries"]
    assert first["parameters"] == second["parameters"]


@pytest.mark.parametrize("method", EVERY)
def test_every_method_stays_equal_on_two_ranks(
    two: Trainer, teacher: dict[str, str], method: str
) -> None:
    first, second = two.run(install(teacher, EVERY[method]), gradient_acc=2)
    assert first["auxiliaries"] == second["auxiliaries"]
    assert first["parameters"] == second["parameters"]


def test_auxiliaries_begin_equal_on_two_ranks(one: Trainer, two: Trainer) -> None:
    """Even where a method's own weights were drawn before, from generators that differ by rank."""
    method = (
        "import torch\n"
        "from kdhooks import EmbeddingTap, hookimpl\n"
        "from kdhooks_plugins.fcd import EmbeddingDistance\n"
        "class Drawn:\n"
        "    @hookimpl\n"
        "    def embedding_tap(self):\n"
        "        return EmbeddingTap('drawn', loss)\n"
        "torch.manual_seed(int(__import__('os').environ['RANK']))\n"
        "loss = EmbeddingDistance(projector=torch.nn.Linear(16, 16))\n"
        "loss.projector.bias.requires_grad_(False)\n"
    )
    line = install(described(trained(one)), "METHOD").replace("'METHOD'", "Drawn()")
    first, second = two.run(method + line)
    assert first["first_auxiliaries"] == second["first_auxiliaries"]
    assert first["auxiliaries"] == second["auxiliaries"]


@pytest.mark.parametrize("classes", [5, 6])
def test_rows_are_split_anew_for_two_ranks(one: Trainer, two: Trainer, classes: int) -> None:
    folder = trained(one, num_classes=classes)
    reports = two.run(install(described(folder), "proxylesskd"), num_classes=classes)
    assert torch.equal(rows_of(Path(reports[0]["output"])), rows_of(folder))


def test_rows_of_two_ranks_are_joined_for_one(one: Trainer, two: Trainer) -> None:
    folder = trained(two, num_classes=5)
    (report,) = one.run(install(described(folder), "proxylesskd"), num_classes=5)
    assert torch.equal(rows_of(Path(report["output"])), rows_of(folder))


@pytest.mark.parametrize("methods", [[], ["fcd"], ["coupleface"], ["proxylesskd"], ["own"]])
def test_two_ranks_equal_one_on_the_same_global_batch(
    one: Trainer, two: Trainer, teacher: dict[str, str], wide: dict[str, str], methods: list[str]
) -> None:
    """Without batch statistics, where the trainer itself agrees; the losses' mean over ranks."""
    projected = {
        "fcd": PROJECTED[0],
        "coupleface": PROJECTED[1],
        "own": {"name": "proxylesskd", "head": "own", "margin_type": "cosface"},
        "proxylesskd": {"name": "proxylesskd"},
    }
    chosen = [projected[method] for method in methods]
    used = wide if {"fcd", "coupleface"} & set(methods) else teacher
    line = install(used, *chosen) if chosen else ""
    same = {"network": "frozen", "after_schedule": EQUAL_ROWS, **NOT_COMPRESSED}
    (alone,) = one.run(line, batch_size=24, **same)
    first, second = two.run(line, batch_size=12, **same)
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    torch.testing.assert_close(mean, alone["losses"], rtol=1e-4, atol=1e-4)
    assert first["parameters"] == second["parameters"]


def test_a_term_that_fails_on_one_rank_is_left_out_on_both(
    two: Trainer, teacher: dict[str, str]
) -> None:
    method = (
        "import os, torch\n"
        "from kdhooks import EmbeddingTap, hookimpl\n"
        "from kdhooks_plugins.fcd import EmbeddingDistance\n"
        "class Failing(EmbeddingDistance):\n"
        "    calls = 0\n"
        "    def forward(self, student, teacher, labels):\n"
        "        Failing.calls += 1\n"
        "        fails = Failing.calls == 2 and os.environ['RANK'] == '1'\n"
        "        return super().forward(student, teacher, labels) * (torch.inf if fails else 1)\n"
        "class Fails:\n"
        "    @hookimpl\n"
        "    def embedding_tap(self):\n"
        "        return EmbeddingTap('fails', Failing(projector=torch.nn.Linear(16, 16)))\n"
    )
    line = install(teacher, "METHOD", nonfinite="skip").replace("'METHOD'", "Fails()")
    ask = {"skipped": "installed.attachment.distiller.skipped"}
    first, second = two.run(below_imports=method + line, ask=ask)
    assert first["extra"] == second["extra"] == {"skipped": 1}
    assert first["parameters"] == second["parameters"]
    assert first["auxiliaries"] == second["auxiliaries"]


def test_four_ranks_equal_one(
    one: Trainer, wide: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Six classes over four ranks: two of them hold two, two hold one."""
    four = Trainer(4, tmp_path_factory.mktemp("four"))
    own = {"name": "proxylesskd", "head": "own", "projector": True}
    line = install(wide, *PROJECTED, own)
    same: dict[str, Any] = {"network": "frozen", "after_schedule": EQUAL_ROWS, **NOT_COMPRESSED}
    try:
        reports = four.run(line, batch_size=6, **same)
    finally:
        four.close()
    (alone,) = one.run(line, batch_size=24, **same)
    means = [sum(losses) / 4 for losses in zip(*(r["losses"] for r in reports), strict=True)]
    torch.testing.assert_close(means, alone["losses"], rtol=1e-4, atol=1e-4)
    assert len({report["parameters"] for report in reports}) == 1
    assert len({report["auxiliaries"] for report in reports}) == 1


def test_verification_on_one_of_two_ranks_does_not_wait_for_the_other(
    two: Trainer, teacher: dict[str, str]
) -> None:
    first, second = two.run(install(teacher, *METHODS.values()), verbose=1)
    assert len(first["verified"]) == 3
    assert second["verified"] == []


def test_weight_zero_is_the_plain_run_on_two_ranks(two: Trainer, teacher: dict[str, str]) -> None:
    nothing = [{**method, "weight": 0.0} for method in METHODS.values()]
    reports = two.run(install(teacher, *nothing))
    assert [outcome(r) for r in reports] == [outcome(r) for r in two.run()]


# --- the backbones' stages -----------------------------------------------------------------------


class IResNet(nn.Module):
    pass


class MobileFaceNet(nn.Module):
    pass


class VisionTransformer(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(depth))


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        (IResNet(), ["layer1", "layer2", "layer3", "layer4"]),
        (MobileFaceNet(), ["layers.1", "layers.3", "layers.5", "conv_sep"]),
        (VisionTransformer(12), ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]),
        (VisionTransformer(24), ["blocks.5", "blocks.11", "blocks.17", "blocks.23"]),
        (nn.Identity(), None),
    ],
)
def test_stages_of_the_trainers_backbones(model: nn.Module, stages: list[str] | None) -> None:
    assert arcface_torch.Backbones().model_stages(model) == stages
