"""An MMEngine student sees a view instead of its data loader's images, by both entry points."""

import copy
import itertools
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError, StudentView, viewed

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.registry import MODELS

from kdhooks_integrations import mmengine
from tests.mmengine_runs import (
    DOORS,
    FCD,
    KD,
    QUIET,
    SCHEDULED,
    STUDENT,
    Recogniser,
    both,
    each_door,
    made,
    same,
    train,
)

pytestmark = QUIET

TABLE: dict[str, Any] = {"mask": {"p": 0.5}, "low_resolution": {"sizes": [4, 8], "p": 0.7}}
VIEW: dict[str, Any] = {"student_view": TABLE, "seed": 3}
RESUME = {"type": "kdhooks.ResumeHook"}


def first_layer(model: Any) -> list[Tensor]:
    """Return a list that receives the layer's input in each forward."""
    seen: list[Tensor] = []
    model.backbone.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def distilled(student: Any = None, **changes: Any) -> Any:
    return mmengine.Distill(student or dict(STUDENT), **{**KD, **VIEW, **changes})


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1, torch.arange(8) % 6


def expected(images: Tensor, step: int = 0) -> Tensor:
    return viewed(StudentView(**TABLE), images, seed=3, step=step)


# --- the images of a forward ---------------------------------------------------------------------


def test_the_view_is_applied_only_in_training_in_mode_loss() -> None:
    model = distilled().train()
    seen = first_layer(model)
    images, labels = batch()
    model(images, labels, mode="tensor")
    model.eval()(images, labels, mode="loss")
    model.train()(images, mode="predict")
    assert all(found is images for found in seen)
    for step in range(2):
        model(images, labels, mode="loss")
        assert torch.equal(seen[-1], expected(images, step))


def test_the_teacher_sees_the_trainers_images() -> None:
    model = distilled().train()
    module = model.kdhooks.distiller._session.teacher.module
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images, labels = batch()
    for _ in range(3):
        model(images, labels, mode="loss")
    assert len(seen) == 3
    assert all(torch.equal(found, images) for found in seen)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("mean", [127.5, [123.675, 116.28, 103.53]])
def test_a_student_of_another_range_sees_the_view_in_its_own_range(mean: Any, order: str) -> None:
    std = 127.5 if mean == 127.5 else [58.395, 57.12, 57.375]
    given = {"mean": mean, "std": std, "order": order}
    model = distilled(input=given).train()
    taught: list[Tensor] = []
    module = model.kdhooks.distiller._session.teacher.module
    module.register_forward_pre_hook(lambda module, args: taught.append(args[0]))
    seen = first_layer(model)
    images, labels = batch()

    def as_student(pixels: Tensor) -> Tensor:
        means, stds = (torch.tensor(x).reshape(-1, 1, 1) for x in (mean, std))
        return ((pixels.flip(1) if order == "bgr" else pixels) * 127.5 + 127.5 - means) / stds

    for _ in range(2):
        model(as_student(images), labels, mode="loss")
    assert_close(taught[-1], images, rtol=0, atol=1e-5)
    assert_close(seen[-1], as_student(expected(images, 1)), rtol=1e-4, atol=1e-4)


def test_images_after_another_tensor_are_refused() -> None:
    @MODELS.register_module(force=True)
    class BesideMaps(Recogniser):
        def forward(  # type: ignore[override]
            self, maps: Tensor | None, inputs: Tensor, labels: Any = None, mode: str = "tensor"
        ) -> Any:
            return super().forward(inputs, labels, mode)

    model = distilled({"type": "BesideMaps"}, images="inputs").train()
    images, labels = batch()
    with pytest.raises(KDHooksError, match=r"needs the images before all other tensors .*3, 4"):
        model(torch.zeros(8, 3, 4, 4), images, labels, mode="loss")
    model(None, images, labels, mode="loss")


@each_door
def test_a_wrong_view_is_refused(door: str, tmp_path: Path) -> None:
    options = both(door, student_view={"mask": {"p": 2}})
    with pytest.raises(KDHooksError, match=r"recipe: student_view.mask.p must be at least 0 and"):
        train(tmp_path, **options)


# --- runs ----------------------------------------------------------------------------------------


@each_door
def test_weight_0_equals_the_plain_run_on_the_viewed_images(tmp_path: Path, door: str) -> None:
    def plain() -> dict[str, Tensor]:
        run = made(tmp_path / "plain", model=STUDENT)
        steps = itertools.count()

        def look(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not module.training:
                return None
            return args, {**kwargs, "inputs": expected(kwargs["inputs"], next(steps))}

        run.model.register_forward_pre_hook(look, with_kwargs=True)
        run.train()
        return {key: value.clone() for key, value in run.model.state_dict().items()}

    idle = train(tmp_path / "idle", **both(door, **VIEW, methods=[{**FCD, "weight": 0.0}])).state
    for key, value in plain().items():
        assert torch.equal(idle[key], value), key
    other = train(tmp_path / "other", **both(door, methods=[{**FCD, "weight": 0.0}])).state
    assert not same({key: idle[key] for key in other}, other), "the view has changed the run"


@each_door
def test_kill_and_resume_equals_the_straight_run(
    tmp_path: Path, safe_globals: None, door: str
) -> None:
    options = both(door, **VIEW, methods=[SCHEDULED])
    options["hooks"] = [*options.get("hooks", []), RESUME]
    straight = train(tmp_path / "straight", **copy.deepcopy(options))
    with pytest.raises(InterruptedError):
        made(tmp_path / "killed", **copy.deepcopy(options), kill=4).train()
    resumed = train(tmp_path / "killed", **copy.deepcopy(options), resume=True)
    assert resumed.logs == straight.logs[3:]
    assert same(resumed.state, straight.state)


def test_after_load_from_the_view_draws_from_step_0(tmp_path: Path, safe_globals: None) -> None:
    """The step in the checkpoint is not used."""
    mmengine.allow_resume()
    options = both(DOORS[0], **VIEW)
    train(tmp_path / "first", **copy.deepcopy(options))
    saved = str(tmp_path / "first" / "epoch_2.pth")
    runner = made(tmp_path / "second", **copy.deepcopy(options), load_from=saved)
    seen = first_layer(runner.model)
    given: list[Tensor] = []
    runner.model.register_forward_pre_hook(
        lambda model, args, kwargs: given.append(kwargs["inputs"]), with_kwargs=True, prepend=True
    )
    runner.train()
    assert torch.equal(seen[0], expected(given[0], 0))
