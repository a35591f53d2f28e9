"""Both entry points for MMEngine, model and hook, train like a hand-written loop and log the terms.

A run with weight 0 equals the plain run.
"""

import copy
import json
import pickle
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, hookimpl

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.registry import MODELS

from tests.mmengine_runs import (
    FCD,
    PROJECTED,
    QUIET,
    STUDENT,
    Recogniser,
    Run,
    Taught,
    both,
    config,
    distilled,
    each_door,
    each_runner,
    same,
    samples,
    saved,
    students,
    train,
)

pytestmark = QUIET


# --- the same as a hand-written loop -------------------------------------------------------------


def by_hand(accumulate: int, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train on CE + 8 mean(1 - cos(P(s), t)) with SGD, momentum and a clipped norm.

    The projector P starts with the weights that kdhooks draws.
    """
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


# --- the student stays as it is ------------------------------------------------------------------

HINTS = {  # zeros of its many parameters would change the rounding of the norm that clips
    "name": "fitnet",
    "student": ["backbone.layer[1-4]"],
    "teacher": ["layer[1-4]"],
}


@each_door
@pytest.mark.parametrize("method", [FCD, PROJECTED, {"name": "rkd"}, HINTS])
def test_weight_zero_is_the_plain_run(tmp_path: Path, door: str, method: dict[str, Any]) -> None:
    """The student's init_cfg initialises only the student's layers and draws no other numbers."""
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


def test_a_copy_of_the_student_is_not_distilled() -> None:
    model = MODELS.build(distilled())
    data = samples("dict")
    batch = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    assert set(model(**batch, mode="loss")) == {"loss_cls", "loss_kd_fcd", "kd/fcd"}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(other.train()(**batch, mode="loss")) == {"loss_cls"}
        assert set(other.state_dict()) == set(model.state_dict())


# --- what is logged ------------------------------------------------------------------------------


class Gap(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Any:
        gap = (student - teacher).square().mean()
        return gap, {"loss_gap": gap.detach()}


class LossGap:
    """Uses names that contain 'loss', which MMEngine would add to the total."""

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
