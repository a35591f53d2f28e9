"""An MMEngine config selects the distillation, and its other features keep working."""

import copy
import gc
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from kdhooks import KDHooksError

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.config import Config
from mmengine.registry import MODELS

from tests.mmengine_runs import (
    KD,
    PROJECTED,
    QUIET,
    RUNNERS,
    STUDENT,
    Run,
    both,
    config,
    distilled,
    each_door,
    made,
    same,
    samples,
    saved,
    train,
    trained_teacher,
)

pytestmark = QUIET


# --- distillation in a config --------------------------------------------------------------------

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
def test_a_toml_file_equals_the_same_keys_in_the_config(tmp_path: Path, door: str) -> None:
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
    """The second epoch finds all embeddings of the first; in a second run both epochs do."""
    teacher = {**KD["teacher"], "cache": {"path": str(tmp_path / "cache"), "max_gb": 1}}
    filling = train(tmp_path / "1", **both(door, teacher=teacher))
    (keys,) = (tmp_path / "cache").glob("*.keys")
    assert keys.stat().st_size == 12 * len(samples("dict"))
    repeating = train(tmp_path / "2", **both(door, teacher=teacher))
    assert [*(tmp_path / "cache").glob("*.keys")] == [keys]
    assert repeating.logs == filling.logs
    assert same(repeating.state, filling.state)


def test_a_teachers_init_cfg_names_its_weights(tmp_path: Path) -> None:
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


# --- other features of a config ------------------------------------------------------------------


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
    """A tap on a checkpointed block works; a tap inside of it has no gradient."""

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
    weight = {"value": 8.0, "start": 1, "warmup": 0.5, "unit": "epoch"}
    methods = [{**PROJECTED, "weight": weight}]
    plain = train(tmp_path, **both(door, methods=methods))
    torch.compiler.reset()
    gc.collect()  # else a Distiller of another test may remove its hook while dynamo traces it
    fast = train(tmp_path, **both(door, methods=methods), compile={"backend": "eager"})
    torch.compiler.reset()
    assert fast["loss"] == pytest.approx(plain["loss"])


def test_the_methods_weights_can_have_their_own_learning_rate(tmp_path: Path) -> None:
    """kdhooks.Distill leaves the parameter groups to MMEngine's optimizer constructor."""
    wrapper = {
        "optimizer": {"type": "SGD", "lr": 0.05},
        "paramwise_cfg": {"custom_keys": {"kdhooks": {"lr_mult": 0.1}}},
    }
    run = train(tmp_path, **both("model", methods=[PROJECTED]), optim_wrapper=wrapper)
    groups = run.runner.optim_wrapper.optimizer.param_groups
    assert groups[-1]["lr"] == pytest.approx(0.1 * groups[0]["lr"])
