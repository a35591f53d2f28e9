"""The two doors of MMEngine, through its own runners."""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, KDHooksError, hookimpl
from kdhooks.testing import TinyFaceNet
from tests.ranks import Results, on_two_ranks
from tests.second_device import NAME, Device, in_a_process, python_devices

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing it warns, on new torch
    import_module("mmengine.runner")

from mmengine.config import Config
from mmengine.device import utils as device_utils
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.structures import BaseDataElement
from torch.distributed.optim import ZeroRedundancyOptimizer

from kdhooks_integrations import mmengine
from kdhooks_integrations.mmengine.forward import Forward
from kdhooks_integrations.mmengine.models import Conventions
from kdhooks_integrations.mmengine.registered import _optimise
from kdhooks_integrations.mmengine.student import _AddTerms
from tests.mmengine_runs import (
    FCD,
    KD,
    PROJECTED,
    RUNNERS,
    STUDENT,
    Classifier,
    Recogniser,
    Run,
    Taught,
    both,
    config,
    distilled,
    hook,
    made,
    samples,
    train,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of mmengine's own, on new torch
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning"),
]

DOORS = ("model", "hook")
each_door = pytest.mark.parametrize("door", DOORS)
each_runner = pytest.mark.parametrize("kind", RUNNERS)
SCHEDULED = {**PROJECTED, "weight": {"value": 8.0, "start": 1, "warmup": 3}}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def students(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("kdhooks.")}


def saved(folder: Path, name: str = "epoch_2.pth") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / name, weights_only=False)
    return content


# --- the same as a loop by hand ------------------------------------------------------------------


def by_hand(accumulate: int, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """CE + 8 mean(1 - cos(P(s), t)), SGD with momentum and clipped norm; P as kdhooks draws it."""
    student, teacher = Recogniser(seed=5).train(), Taught()
    drawn = MODELS.build(distilled(methods=[PROJECTED]))
    projector: nn.Module = copy.deepcopy(drawn.kdhooks.distiller.losses.fcd.projector)
    data = samples("dict")
    parameters = [*student.parameters(), *projector.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        chosen = [data[(8 * step + i) % len(data)] for i in range(8)]
        images = torch.stack([sample["inputs"] for sample in chosen])
        labels = torch.stack([sample["labels"] for sample in chosen])
        embedding = student.backbone(images)
        task = F.cross_entropy(student.head(embedding), labels)
        with torch.no_grad():
            target = teacher(images)
        s, t = (
            F.rms_norm(x, x.shape[1:], eps=1e-12**2 / x.shape[1])
            for x in (projector(embedding), target)
        )
        loss = task + F.mse_loss(s, t) / 2 * 8.0  # rounded as kdhooks does
        last = step >= steps - steps % accumulate
        (loss / (steps % accumulate if last else accumulate)).backward()
        if (step + 1) % accumulate == 0 or step + 1 == steps:
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {**student.state_dict(), "projector": next(projector.parameters()).detach()}


@each_door
@each_runner
@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_a_loop_by_hand(tmp_path: Path, door: str, kind: str, accumulate: int) -> None:
    run = train(
        tmp_path,
        kind,
        **both(door, student={**STUDENT, "seed": 5}, methods=[PROJECTED]),
        train_dataloader={
            **config(tmp_path)["train_dataloader"],
            "sampler": {"type": "InfiniteSampler", "shuffle": False},
        },
        train_cfg={"by_epoch": False, "max_iters": 7},
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9},
            "clip_grad": {"max_norm": 5.0},
            "accumulative_counts": accumulate,
        },
        param_scheduler=None,
    )
    losses, state = by_hand(accumulate, 7)
    projector = run.state["kdhooks.distiller.losses.fcd.projector.weight"]
    assert run["loss"] == losses
    assert same({**students(run.state), "projector": projector}, state)


# --- do no harm ----------------------------------------------------------------------------------


@each_door
@pytest.mark.parametrize("method", [FCD, PROJECTED, {"name": "rkd"}])
def test_weight_zero_is_the_plain_run(tmp_path: Path, door: str, method: dict[str, Any]) -> None:
    """The student's init_cfg touches, and draws numbers for, its own layers alone."""
    student = {**STUDENT, "init_cfg": {"type": "Normal", "layer": "Linear", "std": 0.1}}
    plain = train(tmp_path, model=student)
    generator = torch.get_rng_state()
    run = train(tmp_path, **both(door, student=student, methods=[{**method, "weight": 0.0}]))
    assert run["loss_cls"] == plain["loss_cls"]
    assert grad_norms(run) == grad_norms(plain)
    assert same(students(run.state), plain.state)
    assert torch.equal(torch.get_rng_state(), generator)
    other = train(tmp_path, **both(door, student=student, methods=[method]))
    assert other["loss_cls"] != plain["loss_cls"]


def grad_norms(run: Run) -> list[float]:
    norms: list[float] = run.runner.message_hub.get_scalar("train/grad_norm").data[0].tolist()
    return norms


@each_door
def test_the_student_keeps_its_keys_and_its_type(tmp_path: Path, door: str) -> None:
    plain = train(tmp_path / "plain")
    run = train(tmp_path / "kd", **both(door, methods=[PROJECTED]))
    assert type(run.model) is Recogniser
    state = saved(tmp_path / "kd")["state_dict"]
    assert list(students(state)) == list(plain.state)
    assert set(state) - set(students(state)) == {
        "kdhooks.distiller._extra_state",
        "kdhooks.distiller.losses.fcd.projector.weight",
    }
    sizes = [(tmp_path / name / "epoch_2.pth").stat().st_size for name in ("kd", "plain")]
    teacher = sum(p.numel() * 4 for p in Taught().parameters())
    assert sizes[0] - sizes[1] < teacher


@each_door
def test_auxiliaries_learn(tmp_path: Path, door: str) -> None:
    key = "kdhooks.distiller.losses.fcd.projector.weight"
    untrained = MODELS.build(distilled(methods=[PROJECTED])).state_dict()[key]
    assert not torch.equal(train(tmp_path, **both(door, methods=[PROJECTED])).state[key], untrained)


def test_evaluation_runs_no_teacher_and_keeps_nothing(tmp_path: Path) -> None:
    calls: list[int] = []
    teacher = Taught()
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    model = MODELS.build(distilled(teacher=teacher))
    images = torch.stack([sample["inputs"] for sample in samples("dict")])
    calls.clear()
    model.eval()
    labels = torch.stack([sample["labels"] for sample in samples("dict")])
    model(images, mode="predict")
    assert set(model(images, labels, mode="loss")) == {"loss_cls"}
    with torch.no_grad():
        assert set(model.train()(images, labels, mode="loss")) == {"loss_cls"}
    distiller = model.kdhooks.distiller
    assert not calls
    assert distiller.pending is None
    model(images, labels, mode="loss")
    assert calls
    assert distiller.pending is None
    assert not distiller._student._taps._records


def test_a_copy_of_the_student_is_left_alone() -> None:
    model = MODELS.build(distilled())
    data = samples("dict")
    batch = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    assert set(model(**batch, mode="loss")) == {"loss_cls", "loss_kd_fcd", "kd/fcd"}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(other.train()(**batch, mode="loss")) == {"loss_cls"}
        assert set(other.state_dict()) == set(model.state_dict())


# --- what a config says --------------------------------------------------------------------------

BASE = """
model = dict(type='Recogniser')
work_dir = 'out'
train_dataloader = dict(
    dataset=dict(type='Samples'), batch_size=8,
    sampler=dict(type='DefaultSampler', shuffle=True), collate_fn=dict(type='default_collate'))
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05))
custom_hooks = [dict(type='Spy')]
default_scope = 'mmengine'
"""
CHILD = """
_base_ = 'base.py'
model = dict(
    _delete_=True, type='kdhooks.Distill', student={{_base_.model}},
    teacher=dict(module=dict(type='Taught')), methods=['fcd'], input_shape=[3, 32, 32])
"""
GRANDCHILD = """
_base_ = 'child.py'
model = dict(student=dict(width=5), methods=[dict(name='rkd', weight=2.0)])
"""
LAZY = """
from mmengine.config import read_base
with read_base():
    from .lazy_base import *
from kdhooks_integrations.mmengine import Distill
from tests.mmengine_runs import Taught
model = dict(
    type=Distill, student=model, teacher=dict(module=dict(type=Taught)), methods=['fcd'],
    input_shape=[3, 32, 32])
"""
LAZY_BASE = """
from mmengine.dataset import DefaultSampler
from torch.optim import SGD
from torch.utils.data import default_collate
from tests.mmengine_runs import Recogniser, Samples, Spy
model = dict(type=Recogniser)
train_dataloader = dict(
    dataset=dict(type=Samples), batch_size=8, sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate))
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.05))
custom_hooks = [dict(type=Spy)]
work_dir = 'out'
default_scope = 'mmengine'
"""


@pytest.mark.parametrize(
    ("name", "terms"),
    [("child", {"fcd"}), ("grandchild", {"rkd"}), ("lazy", {"fcd"})],
)
def test_configs_inherit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, terms: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {"base": BASE, "child": CHILD, "grandchild": GRANDCHILD, "lazy": LAZY}
    for file, text in {**texts, "lazy_base": LAZY_BASE}.items():
        (tmp_path / f"{file}.py").write_text(text)
    runner = RUNNERS["Runner"].from_cfg(Config.fromfile(tmp_path / f"{name}.py"))
    runner.train()
    assert {tap.name for tap in runner.model.kdhooks.distiller.taps} == terms
    assert runner.model.backbone.layer1[0].out_channels == (5 if name == "grandchild" else 4)


def test_a_config_needs_no_custom_imports() -> None:
    code = (
        "from mmengine.registry import HOOKS, MODELS\n"
        "print(MODELS.get('kdhooks.Distill').__name__, HOOKS.get('kdhooks.DistillHook').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Distill", "DistillHook"]


@each_door
def test_a_toml_file_says_the_same(tmp_path: Path, door: str) -> None:
    torch.save({"state_dict": trained_teacher().state_dict()}, tmp_path / "teacher.pth")
    network = {"type": "Recogniser", "width": 6}
    (tmp_path / "kd.toml").write_text(
        "methods = [{ name = 'fcd', weight = { value = 8.0, warmup = 2 } }]\n"
        "input_shape = [3, 32, 32]\n[teacher]\nnetwork = { type = 'Recogniser', width = 6 }\n"
        "checkpoint = 'teacher.pth'\n"
    )
    file = {"recipe": str(tmp_path / "kd.toml")}
    by_file: dict[str, Any] = (
        {"model": {"type": "kdhooks.Distill", "student": STUDENT, **file}}
        if door == "model"
        else {"hooks": [{"type": "kdhooks.DistillHook", **file}]}
    )
    teacher = {"network": network, "checkpoint": str(tmp_path / "teacher.pth")}
    method = {"name": "fcd", "weight": {"value": 8.0, "warmup": 2}}
    by_keys = both(door, teacher=teacher, methods=[method])
    one, other = train(tmp_path / "1", **by_file), train(tmp_path / "2", **by_keys)
    assert one.logs == other.logs
    assert one["loss_kd_fcd"][0] == 0.0 < one["loss_kd_fcd"][1]


@each_door
def test_a_cached_run_repeats_the_run_that_filled_the_cache(tmp_path: Path, door: str) -> None:
    """Two epochs, of which the second finds all of the first; then both find everything."""
    teacher = {**KD["teacher"], "cache": {"path": str(tmp_path / "cache"), "max_gb": 1}}
    filling = train(tmp_path / "1", **both(door, teacher=teacher))
    (keys,) = (tmp_path / "cache").glob("*.keys")
    assert keys.stat().st_size == 12 * len(samples("dict"))
    repeating = train(tmp_path / "2", **both(door, teacher=teacher))
    assert [*(tmp_path / "cache").glob("*.keys")] == [keys]
    assert repeating.logs == filling.logs
    assert same(repeating.state, filling.state)


def trained_teacher() -> nn.Module:
    model = Recogniser(width=6)
    model.backbone = Taught()
    return model


def test_a_teachers_init_cfg_says_where_its_weights_are(tmp_path: Path) -> None:
    taught = trained_teacher()
    torch.save(taught.state_dict(), tmp_path / "teacher.pth")
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "teacher.pth")}
    module = {"type": "Recogniser", "width": 6, "init_cfg": pretrained}
    model = MODELS.build(distilled(teacher={"module": module}))
    loaded = model.kdhooks.distiller._session.teacher.module
    assert same(loaded.state_dict(), taught.state_dict())
    inside = {f"teacher.{key}": value for key, value in taught.state_dict().items()}
    torch.save({"state_dict": inside}, tmp_path / "teacher.pth")
    pretrained["prefix"] = "teacher"
    MODELS.build(distilled(teacher={"module": module}))
    del inside["teacher.head.weight"]
    torch.save({"state_dict": inside}, tmp_path / "teacher.pth")
    with pytest.raises(KDHooksError, match=r"does not fit the network(.|\n)*head.weight"):
        MODELS.build(distilled(teacher={"module": module}))


# --- what is logged ------------------------------------------------------------------------------


class Gap(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Any:
        gap = (student - teacher).square().mean()
        return gap, {"loss_gap": gap.detach()}


class LossGap:
    """All its names have 'loss' in them."""

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("loss_gap", Gap(), weight=3.0)


def test_the_log_has_terms_that_are_trained_and_values_that_are_not() -> None:
    model = MODELS.build(distilled(methods=[FCD, LossGap()]))
    data = samples("dict")
    batch = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    total, logs = model.parse_losses(model(**batch, mode="loss"))
    assert list(logs) == [
        "loss", "loss_cls", "loss_kd_fcd", "loss_kd_loss_gap",
        "kd/fcd", "kd/term_gap", "kd/term_gap/term_gap",
    ]  # fmt: skip
    summed = logs["loss_cls"] + logs["loss_kd_fcd"] + logs["loss_kd_loss_gap"]
    assert torch.equal(total, summed)
    assert torch.equal(logs["loss_kd_loss_gap"], 3.0 * logs["kd/term_gap"])


@each_door
def test_logger_and_visualizer_show_them(tmp_path: Path, door: str) -> None:
    run = train(
        tmp_path,
        **both(door),
        visualizer={"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
    )
    (file,) = tmp_path.rglob("scalars.json")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["loss_kd_fcd"] for line in lines][:1] == run["loss_kd_fcd"][:1]
    assert all("kd/fcd" in line for line in lines)
    assert (
        run.runner.message_hub.get_scalar("train/loss_kd_fcd").current() == run["loss_kd_fcd"][-1]
    )


# --- resume and load_from ------------------------------------------------------------------------


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


def test_torch_refuses_mmengines_checkpoints_until_told(tmp_path: Path, safe_globals: None) -> None:
    torch.serialization.clear_safe_globals()
    train(tmp_path, **both("model"))
    with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer"):
        train(tmp_path, **both("model"), load_from=str(tmp_path / "epoch_2.pth"))
    mmengine.allow_resume()
    train(tmp_path, **both("model"), load_from=str(tmp_path / "epoch_2.pth"))


class Getattr:
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (HistoryBuffer, "__init__")


def test_a_checkpoint_gets_no_more_than_the_historys_own_methods(
    tmp_path: Path, safe_globals: None
) -> None:
    mmengine.allow_resume()
    torch.save(Getattr(), tmp_path / "bad.pth")
    with pytest.raises(KDHooksError, match="checkpoint asks for '__init__' of <class"):
        torch.load(tmp_path / "bad.pth")


@each_door
def test_a_plain_checkpoint_can_be_begun_from(
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
    """The student goes on as if nothing had happened, momentum and schedule included."""

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
    assert "without the optimizer's momentum; the student goes on with its own" in caplog.text
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
    """Whether the plain run had EMAHook or not."""
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
    assert "to resume it, and not to load_from it, add custom_hooks = [dict(ty" in caplog.text


def test_a_distilled_runs_checkpoint_in_a_plain_run(tmp_path: Path, safe_globals: None) -> None:
    """It resumes where the methods train nothing, and else can be loaded from."""
    for name, method in (("without", FCD), ("with", PROJECTED)):
        train(tmp_path / name, **both("model", methods=[method]), hooks=[RESUME])
    one, other = (str(tmp_path / name / "epoch_1.pth") for name in ("without", "with"))
    assert len(train(tmp_path / "1", hooks=[RESUME], load_from=one, resume=True).logs) == 3
    with pytest.raises(KDHooksError, match=r"other methods.*fcd.projector.weight; resume it"):
        train(tmp_path / "2", hooks=[RESUME], load_from=other, resume=True)
    assert len(train(tmp_path / "3", hooks=[RESUME], load_from=other).logs) == 6


ECKD = {"name": "eckd", "exclusivity_weight": 0}  # its one weight has the shape of fcd's


@each_runner
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("before", "after"), [([PROJECTED, ECKD], [ECKD, PROJECTED]),
                                               ([PROJECTED], [ECKD])])  # fmt: skip
def test_other_methods_dont_get_the_state_of_these(
    tmp_path: Path,
    safe_globals: None,
    kind: str,
    told: bool,
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
) -> None:
    """With ResumeHook, or where a script has called allow_resume: at the first step at last."""
    mmengine.allow_resume()
    hooks = [RESUME] * told
    train(tmp_path / "a", kind, **both("model", methods=before), hooks=hooks)
    given: dict[str, Any] = {"hooks": hooks, "load_from": str(tmp_path / "a" / "epoch_1.pth")}
    with pytest.raises(KDHooksError, match=r"other methods.*it holds: kdhooks.*fcd.projector"):
        train(tmp_path / "b", kind, **both("model", methods=after), **given, resume=True)
    train(tmp_path / "c", kind, **both("model", methods=after), **given)
    train(tmp_path / "d", kind, **both("model", methods=before), **given, resume=True)


def test_a_method_more_has_no_place_in_the_optimizers_state(
    tmp_path: Path, safe_globals: None
) -> None:
    train(tmp_path / "a", **both("model", methods=[PROJECTED]), hooks=[RESUME])
    given: dict[str, Any] = {
        "hooks": [RESUME],
        "load_from": str(tmp_path / "a" / "epoch_1.pth"),
        "resume": True,
    }
    for methods in ([PROJECTED, ECKD], [FCD]):
        with pytest.raises(KDHooksError, match="or load_from it without resume"):
            train(tmp_path / "b", **both("model", methods=methods), **given)
    train(tmp_path / "c", **both("model", methods=["rkd", PROJECTED]), **given)


@each_runner
@each_door
def test_a_loaded_checkpoint_begins_its_schedule_anew(
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
def test_an_optimizer_without_a_place_for_more_is_refused(several: bool) -> None:
    model = MODELS.build(distilled(methods=[PROJECTED]))
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    if several:
        wrapper = OptimWrapperDict(a=wrapper)
    else:
        wrapper.optimizer = object.__new__(ZeroRedundancyOptimizer)
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, _resume=True)
    found = "OptimWrapperDict" if several else "ZeroRedundancyOptimizer"
    with pytest.raises(KDHooksError, match=f"state of a {found} can't be given.*load_from it"):
        HOOKS.build(RESUME).after_load_checkpoint(runner, {"state_dict": {}, "optimizer": {}})


# --- what else a config may ask for --------------------------------------------------------------


@each_door
def test_ema_holds_no_teacher(tmp_path: Path, door: str) -> None:
    options = both(door, methods=[PROJECTED])
    plain = train(tmp_path / "plain", **copy.deepcopy(options))
    options["hooks"] = [*options.get("hooks", []), {"type": "EMAHook", "begin_iter": 2}]
    run = train(tmp_path / "ema", **options)
    assert run.logs == plain.logs
    (ema,) = (one for one in run.runner.hooks if type(one).__name__ == "EMAHook")
    copied = ema.ema_model.module.kdhooks.distiller
    assert copied._session is None
    assert set(ema.ema_model.state_dict()) == {f"module.{key}" for key in run.state} | {"steps"}
    assert not same(saved(tmp_path / "ema")["state_dict"], plain.state)


@each_door
def test_amp(tmp_path: Path, door: str) -> None:
    wrapper = {**config(tmp_path)["optim_wrapper"], "type": "CPUAmp"}
    seen: set[torch.dtype] = set()
    options = both(door, methods=[PROJECTED])
    runner = made(tmp_path, **options, optim_wrapper=wrapper)
    backbone = runner.model.backbone
    backbone.register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    runner.train()
    full = train(tmp_path / "full", **copy.deepcopy(options))
    run = Run(runner, runner.hooks[[type(h).__name__ for h in runner.hooks].index("Spy")].logs)
    assert torch.bfloat16 in seen
    assert run["loss_kd_fcd"] != full["loss_kd_fcd"]
    assert run["loss_kd_fcd"] == pytest.approx(full["loss_kd_fcd"], rel=0.05)
    assert runner.optim_wrapper.loss_scaler.get_scale() == 1024.0


@each_door
def test_activation_checkpointing(tmp_path: Path, door: str) -> None:
    """A tap on the block itself is fine; one inside of it has no gradient there."""

    def run(tap: str, *blocks: str) -> Run:
        taps = {"student": {"stages": [tap]}, "teacher": {"stages": ["layer3"]}}
        options = both(door, methods=["at"], taps=taps)
        return train(tmp_path, **options, activation_checkpointing=list(blocks))

    plain, saving = run("backbone.layer3"), run("backbone.layer3", "backbone.layer3")
    assert plain["loss"] == saving["loss"]
    with pytest.raises(KDHooksError, match=r"'backbone.layer3.1' carries no gradient.*checkpoint"):
        run("backbone.layer3.1", "backbone.layer3")


@each_door
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it
def test_compile(tmp_path: Path, door: str) -> None:
    plain = train(tmp_path, **both(door, methods=[SCHEDULED]))
    torch.compiler.reset()
    fast = train(tmp_path, **both(door, methods=[SCHEDULED]), compile={"backend": "eager"})
    torch.compiler.reset()
    assert fast["loss"] == pytest.approx(plain["loss"])


def test_an_own_learning_rate_for_the_auxiliaries(tmp_path: Path) -> None:
    """The main door goes through MMEngine's own constructor of optimizers."""
    wrapper = {
        "optimizer": {"type": "SGD", "lr": 0.05},
        "paramwise_cfg": {"custom_keys": {"kdhooks": {"lr_mult": 0.1}}},
    }
    run = train(tmp_path, **both("model", methods=[PROJECTED]), optim_wrapper=wrapper)
    groups = run.runner.optim_wrapper.optimizer.param_groups
    assert groups[-1]["lr"] == pytest.approx(0.1 * groups[0]["lr"])


# --- another device ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with in_a_process() as pool:
        yield pool


def on_a_device(
    place: str, door: str, kind: str, folder: Path, nonfinite: str = "raise"
) -> tuple[str, list[float]]:
    """Where the methods' weights are, and the losses; after the first step nothing waits."""
    warnings.simplefilter("ignore")
    device_utils.DEVICE = place
    device, ours = Device(), _AddTerms.__call__

    def never_waiting(self: _AddTerms, model: nn.Module, *given: Any) -> Any:
        first = model.get_submodule("kdhooks.distiller").step == 0
        with nullcontext() if first else device.never_waited_for():
            return ours(self, model, *given)

    with device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_AddTerms, "__call__", never_waiting)
        options = both(door, methods=[PROJECTED, {"name": "rkd"}], nonfinite=nonfinite)
        run = train(folder / place, kind, **options)
        projector = next(run.model.get_submodule("kdhooks").parameters())
        return str(projector.device), run["loss"]


@python_devices
@pytest.mark.parametrize(
    ("door", "kind"), [("model", "Runner"), ("hook", "Runner"), ("model", "FlexibleRunner")]
)
def test_the_methods_are_where_the_model_is(
    tmp_path: Path, process: ProcessPoolExecutor, door: str, kind: str
) -> None:
    far, near = (
        process.submit(on_a_device, place, door, kind, tmp_path).result()
        for place in (f"{NAME}:0", "cpu")
    )
    assert (far[0], near[0]) == (f"{NAME}:0", "cpu")
    assert far[1] == pytest.approx(near[1])


@python_devices
def test_a_step_that_waits_is_noticed(tmp_path: Path, process: ProcessPoolExecutor) -> None:
    """As one does that may go on without its terms."""
    arguments = (f"{NAME}:0", "model", "Runner", tmp_path, "skip")
    with pytest.raises(RuntimeError, match="the host waits for the device"):
        process.submit(on_a_device, *arguments).result()


# --- two ranks -----------------------------------------------------------------------------------


def on_this_rank() -> dict[str, Results]:
    """Both doors, with and without accumulation; and scheduled terms under a static graph."""
    warnings.simplefilter("ignore")
    size = int(os.environ.get("KDHOOKS_TEST_BATCH", "4"))
    found = {}
    for door in DOORS:
        for accumulate in (1, 2):
            folder = Path(os.environ["KDHOOKS_TEST_FOLDER"]) / f"{door}{accumulate}"
            run = flat_run(folder, door, accumulate, size, static_graph=accumulate == 1)
            found[f"{door}{accumulate}"] = {"state": run.state}
    return found


def flat_run(folder: Path, door: str, accumulate: int, size: int, **wrapper: Any) -> Run:
    distributed = torch.distributed.is_initialized()
    os.environ.setdefault("LOCAL_RANK", "0")
    base = config(folder)
    ddp = {"type": "MMDistributedDataParallel", "device_ids": None, **wrapper}
    return train(
        folder,
        **both(door, student={**STUDENT, "flat": True}, methods=[SCHEDULED]),
        launcher="pytorch" if distributed else "none",
        model_wrapper_cfg=ddp if distributed else None,
        train_dataloader={
            **base["train_dataloader"],
            "batch_size": size,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        optim_wrapper={**base["optim_wrapper"], "accumulative_counts": accumulate},
    )


def test_two_ranks_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDHOOKS_TEST_FOLDER", str(tmp_path / "two"))
    first, second = on_two_ranks(on_this_rank, tmp_path)
    monkeypatch.setenv("KDHOOKS_TEST_FOLDER", str(tmp_path / "one"))
    monkeypatch.setenv("KDHOOKS_TEST_BATCH", "8")
    alone = on_this_rank()
    for name, found in alone.items():
        assert same(first[name]["state"], second[name]["state"])
        torch.testing.assert_close(first[name]["state"], found["state"], rtol=1e-4, atol=1e-5)


# --- models of other shapes ----------------------------------------------------------------------


@each_door
def test_a_model_of_mmpretrains_shape(tmp_path: Path, door: str) -> None:
    """The teacher sees what the recipe promises, however the student's images are normalised."""
    seen: list[Tensor] = []

    def teacher(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean(dim=(2, 3)).repeat(1, 6)[:, :16]

    preprocessor = {
        "type": "ImgDataPreprocessor",
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
    }
    student = {"type": "Classifier", "data_preprocessor": preprocessor}
    runner = made(tmp_path, model=student, data="sample")
    table = {**KD, "teacher": teacher}
    if door == "model":
        runner.model = mmengine.Distill(runner.model, **table)
    else:
        runner.register_hook(mmengine.DistillHook(**table))
    model = runner.train()
    assert model.kdhooks.distiller._embedding == "neck"
    pixels = torch.stack([sample["inputs"] for sample in samples("sample")])
    wanted = (pixels - 127.5) / 127.5
    for image in seen[-1]:
        assert (image - wanted).abs().amax(dim=(1, 2, 3)).min() < 1e-5


def test_stages_by_convention() -> None:
    stages = Conventions().model_stages
    assert stages(Classifier()) == [f"img_backbone.layer{n}" for n in (1, 2, 3, 4)]
    assert stages(Recogniser()) == [f"backbone.layer{n}" for n in (1, 2, 3, 4)]
    assert stages(TinyFaceNet()) == [f"layer{n}" for n in (1, 2, 3, 4)]
    swin = nn.Module()
    swin.stages = nn.ModuleList(nn.Identity() for _ in range(3))
    assert stages(swin) == ["stages.0", "stages.1", "stages.2"]
    assert stages(nn.Identity()) is None


def test_the_tutorials_model(tmp_path: Path) -> None:
    """Positional data, no defaults, no mode but 'loss' and 'predict'."""
    taps = {"student": {"embedding": "resnet"}}
    run = train(tmp_path, model=distilled({"type": "Tutorial"}, taps=taps), data="tuple")
    assert run["loss_kd_fcd"][-1] < run["loss_kd_fcd"][0]


def test_a_students_own_classifier(tmp_path: Path) -> None:
    """For methods that compare logits; found by convention, or named."""
    given = {"teacher": {"module": Taught(), "classifier": torch.randn(6, 12)}, "methods": ["kd"]}
    named = {**given, "classifier": "head.weight"}
    for table in (given, named):
        model = MODELS.build(distilled(STUDENT, **table))
        assert model.kdhooks.distiller._head.weight is model.head.weight


def element(**fields: Any) -> BaseDataElement:
    return BaseDataElement(**fields)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("", {"labels": torch.tensor([[1], [2]])}),
        ("", {"data_samples": [element(gt_label=torch.tensor([n])) for n in (1, 2)]}),
        ("", {"data_samples": [element(gt_label=n) for n in (1, 2)]}),
        (
            "",
            {"data_samples": [element(gt_label=element(label=torch.tensor([n]))) for n in (1, 2)]},
        ),
        ("", {"data_samples": torch.tensor([1, 2])}),
        ("data_samples.who.id", {"data_samples": [{"who": {"id": n}} for n in (1, 2)]}),
        ("data_samples.who", {"data_samples": {"who": torch.tensor([1, 2])}}),
    ],
)
def test_labels_are_found(path: str, value: dict[str, Any]) -> None:
    class Model(nn.Module):
        def forward(self, inputs: Tensor, **rest: Any) -> None: ...

    forward = Forward(Model(), labels=path)
    arguments = forward.named((torch.zeros(2, 3, 8, 8),), {**value, "mode": "loss"})
    assert forward.labels(arguments, 2).tolist() == [1, 2]
    assert forward.images(arguments).shape == (2, 3, 8, 8)


# --- a wrong config at each place ----------------------------------------------------------------

ROUND = {"type": "ImgDataPreprocessor", "rgb_to_bgr": True}
SCALED = {"type": "ImgDataPreprocessor", "mean": [0.0] * 3, "std": [255.0] * 3}
ROWS = {"module": {"type": "Taught"}, "classifier": torch.randn(6, 12)}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"lables": "labels"},
            "no key 'lables'; did you mean 'labels'. the keys are: recipe, teac",
        ),
        ({"methods": ["fdc"]}, "no method 'fdc' is installed; did you mean 'fcd'"),
        ({"recipe": "kd.toml"}, "from a file or from keys; found 'kd.toml' and teacher, methods"),
        ({"teacher": {"module": {"typ": "Taught"}}}, r"teacher.module must be a model's config"),
        ({"teacher": {"module": {"type": "Tought"}}}, r"teacher.module: Tought is not in the"),
        ({"teacher": {"network": "r50", "checkpoint": __file__}}, "can't be read as tensors alone"),
        ({"labels": "gt.label"}, "labels = 'gt.label': the student's forward has no argument 'gt'"),
        ({"images": "imgs"}, "no argument 'imgs'; its arguments are: inputs, labels, mode"),
        ({"classifier": "head.wight"}, "no such parameter; did you mean 'head.weight'"),
        ({"teacher": ROWS, "classifier": "backbone.fc.bias"}, r"must be rows \(c d\); found shape"),
        ({"input": {"means": 0}}, "input has no key 'means'; its keys are: mean, std, order"),
        ({"input": {"order": "gbr"}}, "input.order must be 'rgb' or 'bgr'; found 'gbr'"),
        ({"taps": {"student": {"embedding": "bone"}}}, "no submodule 'bone'"),
        ({"input_shape": [3, 48, 48]}, r"must run on images \(2, 3, 48, 48\) alone.*input_shape"),
        ({"student": {"type": "Tutorial"}}, "no child neck or backbone.*its children are: resnet"),
        ({"student": TinyFaceNet()}, "the student must be a BaseModel.*found TinyFaceNet"),
        ({"student": {"type": "Recognizer"}}, "student: Recognizer is not in the"),
        ({"student": "Recogniser"}, "student must be a model's config.*found 'Recogniser'"),
        ({"student": None}, "student must be a model's config, dict.*found None"),
        ({"backbone": {}}, "no key 'backbone'; a model's line over .* needs _delete_=True.*recipe"),
        ({"images": 3}, "images must be a path like 'data_samples.gt_label'; found 3"),
        ({"classifier": None}, "classifier must be a path like .*; found None"),
        ({"input": None}, r"input must be dict\(mean=…, std=…, order=…\); found None"),
        (
            {"input": {"mean": "a"}},
            "input.mean must be a number, or one for each of three; f.* 'a'",
        ),
        ({"input": {"mean": [1, 2]}}, r"input.mean must be a number, .* found \[1, 2\]"),
        ({"input": {"std": 0}}, "input.std must be positive; found 0"),
        (
            {"student": {**STUDENT, "data_preprocessor": ROUND}},
            r"student's data_preprocessor turns the channels .*: input = dict\(order='rgb'\) after",
        ),
        (
            {"teacher": {"module": {**STUDENT, "data_preprocessor": ROUND}}},
            r"teacher's data_preprocessor turns the channels .*: teacher.input = dict\(order='rgb'",
        ),
        (
            {"teacher": {"module": {**STUDENT, "data_preprocessor": SCALED}}},
            r"normalises with mean \[0.*teacher.input = dict",
        ),
    ],
)
def test_a_wrong_model_line_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        MODELS.build(distilled(**changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lables": "labels"}, "no key 'lables'; did you mean 'labels'"),
        ({"methods": ["fdc"]}, "no method 'fdc' is installed"),
        ({"teacher": {"module": {"type": "Tought"}}}, r"teacher.module: Tought is not in the"),
    ],
)
def test_a_wrong_hook_line_is_refused_when_it_is_read(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        HOOKS.build(hook(**changes))


def test_a_teachers_own_normalisation_must_be_said(tmp_path: Path) -> None:
    torch.save(trained_teacher().state_dict(), tmp_path / "teacher.pth")
    network = {"type": "Recogniser", "width": 6, "data_preprocessor": SCALED}
    teacher = {"network": network, "checkpoint": tmp_path / "teacher.pth"}
    with pytest.raises(KDHooksError, match=r"normalises with mean \[0.*teacher.input = dict"):
        MODELS.build(distilled(teacher=teacher))
    for mean in (0.0, [0.0], [0.0] * 3):
        MODELS.build(distilled(teacher={**teacher, "input": {"mean": mean, "std": 255.0}}))


def test_channels_that_are_turned_round_must_be_said() -> None:
    seen: list[Tensor] = []

    def teacher(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean(dim=(2, 3)).repeat(1, 4)

    images = torch.rand(4, 3, 32, 32) * 2 - 1
    for order in ("rgb", "bgr"):
        student = {**STUDENT, "data_preprocessor": ROUND}
        model = MODELS.build(distilled(student, teacher=teacher, input={"order": order}))
        model(images, torch.arange(4), mode="loss")
        assert torch.equal(seen[-1], images.flip(1) if order == "bgr" else images)


@pytest.mark.parametrize("source", ["network", "module"])
def test_a_teachers_embedding_is_found_as_the_students_is(tmp_path: Path, source: str) -> None:
    """And not the logits that a classifier's forward returns, unless that is asked for."""
    torch.manual_seed(0)
    trained = Classifier().train()
    trained(torch.randn(8, 3, 32, 32))
    torch.save(trained.state_dict(), tmp_path / "teacher.pth")
    teacher: dict[str, Any] = {
        "network": {"type": "Classifier"},
        "checkpoint": tmp_path / "teacher.pth",
    }
    if source == "module":
        teacher = {"module": trained}
    student = {"type": "Classifier"}
    for taps, dim in (({}, 16), ({"teacher": {"embedding": ""}}, 6)):
        model = MODELS.build(distilled(student, teacher=teacher, taps=taps, methods=["rkd"]))
        found = model.kdhooks.distiller._session(torch.randn(2, 3, 32, 32)).embedding
        assert found.shape == (2, dim)


def test_images_between_0_and_1_are_doubted(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.arange(4)
    for said, images, doubted in (
        ({}, torch.rand(4, 3, 32, 32), True),
        ({"mean": 0, "std": 255}, torch.rand(4, 3, 32, 32), False),
        ({}, torch.rand(4, 3, 32, 32) * 2 - 1, False),
    ):
        caplog.clear()
        MODELS.build(distilled(input=said))(images, labels, mode="loss")
        assert ("lie in [0, 1]: the teacher takes them for (pixel" in caplog.text) == doubted


@pytest.mark.parametrize(
    ("changes", "batch", "match"),
    [
        ({}, {"inputs": 255.0}, r"found values up to 3\d\d; normalise them in the data_prep"),
        (
            {},
            {"labels": "x"},
            r"labels must be one class.*inputs: float32 \(24, 3, 32, 32\), labels",
        ),
        ({}, {"labels": 1.5}, "labels must be one class number for each of 24 images"),
        ({"images": "labels"}, {}, r"images must be a floating point tensor \(b 3 h w\)"),
    ],
)
def test_a_wrong_batch_is_refused(
    changes: dict[str, Any], batch: dict[str, Any], match: str
) -> None:
    model = MODELS.build(distilled(**changes))
    data = samples("dict")
    given: dict[str, Any] = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    for key, value in batch.items():
        given[key] = value if isinstance(value, str) else given[key] * value
    model.head.forward = lambda embedding: embedding[:, :6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", lambda logits, labels: logits.sum())
        with pytest.raises(KDHooksError, match=match):
            model(**given, mode="loss")


def test_pixels_that_are_said_to_be_pixels_are_taken() -> None:
    seen: list[Tensor] = []

    def teacher(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean(dim=(2, 3)).repeat(1, 4)

    said = {"mean": 0, "std": 1, "order": "bgr"}
    model = MODELS.build(distilled(teacher=teacher, input=said))
    pixels = torch.rand(4, 3, 32, 32) * 255
    model(pixels, torch.arange(4), mode="loss")
    torch.testing.assert_close(seen[-1], ((pixels - 127.5) / 127.5).flip(1))


def test_losses_must_be_a_dict_without_our_keys() -> None:
    for losses, match in (
        (torch.zeros(()), "must return a dict of losses in mode 'loss'; found Tensor"),
        ({"loss_kd_fcd": torch.zeros(())}, "have the key 'loss_kd_fcd' already"),
    ):

        class Odd(Recogniser):
            def forward(self, inputs: Tensor, labels: Any = None, mode: str = "tensor") -> Any:
                embedding = self.backbone(inputs)
                return losses if mode == "loss" else embedding  # noqa: B023

        model = mmengine.Distill(Odd(), **{**KD, "teacher": Taught()})
        with pytest.raises(KDHooksError, match=match):
            model(torch.rand(4, 3, 32, 32), torch.arange(4), mode="loss")


def test_one_door_alone(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match="distilled already; use one door alone"):
        train(tmp_path, model=distilled(), hooks=[hook()])


def test_the_hook_refuses_what_only_the_main_door_can_do(tmp_path: Path) -> None:
    groups = {
        "optimizer": {"type": "SGD", "lr": 0.05},
        "paramwise_cfg": {"custom_keys": {"head": {"lr_mult": 0.1}}},
    }
    train(tmp_path, hooks=[hook()], optim_wrapper=groups)  # nothing of its own to train
    with pytest.raises(KDHooksError, match=r"the optimizer has \d+ groups.*type='kdhooks.Distill'"):
        train(tmp_path, hooks=[hook(methods=[PROJECTED])], optim_wrapper=groups)
    parameter = nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.SGD([parameter], lr=0.1))
    with pytest.raises(KDHooksError, match="there is more than one optimizer; use the door"):
        _optimise(OptimWrapperDict(a=wrapper), [parameter])
    wrapper.optimizer = object.__new__(ZeroRedundancyOptimizer)
    with pytest.raises(KDHooksError, match="has shared out its parameters already; use the door"):
        _optimise(wrapper, [parameter])
    wrapped = SimpleNamespace(model=nn.DataParallel(Recogniser()), optim_wrapper=wrapper)
    with pytest.raises(KDHooksError, match="the model is wrapped in DataParallel; use the door"):
        HOOKS.build(hook(methods=[PROJECTED])).before_run(wrapped)


def test_a_train_step_that_passes_the_model_by_is_noticed(tmp_path: Path) -> None:
    class Aside(Recogniser):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            loss = self.backbone(data["inputs"]).sum()
            optim_wrapper.update_params(loss)
            return {"loss": loss.detach()}

    with pytest.raises(KDHooksError, match="in MMEngine, train_step must call the model itself"):
        by_door(made(tmp_path), Aside(), "hook").train()


class OwnMode(Recogniser):
    """Its train_step has a word of its own for the losses."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        return super().forward(inputs, labels, "loss" if mode == "train" else mode)

    def _run_forward(self, data: Any, mode: str) -> Any:
        return super()._run_forward(data, "train" if mode == "loss" else mode)


class Past(Recogniser):
    """Its losses come past __call__, where hooks are."""

    def _run_forward(self, data: Any, mode: str) -> Any:
        return self.forward(**data, mode=mode)


class Frozen(Recogniser):
    """Trained in evaluation mode."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(False)
        return self


class Choosy(Recogniser):
    """Trains what it knows by name."""

    def parse_losses(self, losses: dict[str, Tensor]) -> Any:
        return losses["loss_cls"], {"loss": losses["loss_cls"]}


def by_door(runner: Any, student: nn.Module, door: str, **table: Any) -> Any:
    """The runner, with a student that no registry knows."""
    runner.model = student
    if door == "model":
        runner.model = mmengine.Distill(student, **{**KD, **table})
    else:
        runner.register_hook(mmengine.DistillHook(**{**KD, **table}))
    return runner


@each_door
@pytest.mark.parametrize(
    ("student", "match"),
    [
        (
            OwnMode,
            "kd has computed no term; .* train_step must call .*in training mode and with mo",
        ),
        (Past, "optimizer stepped, and kd has computed no term"),
        (Frozen, "optimizer stepped, and kd has computed no term"),
        (Choosy, "optimizer stepped without fcd: .* parse_losses must train the sum of all keys"),
    ],
)
def test_a_run_without_the_terms_is_noticed(
    tmp_path: Path, door: str, student: type[nn.Module], match: str
) -> None:
    with pytest.raises(KDHooksError, match=match):
        by_door(made(tmp_path), student(), door).train()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class Parts:
    """Lists the parts of the model that it knows, for one optimizer or for one each."""

    def __init__(self, optim_wrapper_cfg: Any, paramwise_cfg: Any = None) -> None:
        self.several, self.also = optim_wrapper_cfg["several"], optim_wrapper_cfg["also"]

    def __call__(self, model: Any) -> Any:
        names = ("backbone", "head", *self.also)
        parts = {name: list(getattr(model, name).parameters()) for name in names}
        if not self.several:
            parts = {"all": [p for part in parts.values() for p in part]}
        wrappers = {k: OptimWrapper(torch.optim.SGD(v, lr=0.05)) for k, v in parts.items()}
        return OptimWrapperDict(**wrappers) if self.several else wrappers["all"]


class InTurn(Recogniser):
    """Steps several optimizers."""

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        loss, log = self.parse_losses(self(**data, mode="loss"))
        for wrapper in optim_wrapper.values():
            wrapper.zero_grad()
        loss.backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
        return log


@pytest.mark.parametrize("several", [False, True])
def test_methods_that_no_optimizer_trains_are_noticed(tmp_path: Path, several: bool) -> None:
    def run(also: list[str]) -> None:
        wrapper = {"constructor": "Parts", "several": several, "also": also}
        runner = made(tmp_path, optim_wrapper=wrapper, param_scheduler=None)
        student = (InTurn if several else Recogniser)()
        by_door(runner, student, "model", methods=[PROJECTED]).train()

    with pytest.raises(
        KDHooksError, match=r"no optimizer: losses\.fcd\.projector\.weight; give the"
    ):
        run([])
    run(["kdhooks"])


def test_a_trained_models_guard_ends_with_it(tmp_path: Path) -> None:
    gc.collect()
    hooks = import_module("torch.optim.optimizer")._global_optimizer_pre_hooks
    before = len(hooks)
    train(tmp_path, **both("model"))
    gc.collect()
    assert len(hooks) == before
