"""A schedule in epochs counts those of the Runner's train dataloader."""

import copy
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from kdhooks import KDHooksError

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.dataset import InfiniteSampler
from mmengine.registry import MODELS

from kdhooks_integrations.mmengine.epochs import length
from tests.mmengine_runs import (
    FCD,
    QUIET,
    Run,
    both,
    config,
    distilled,
    each_door,
    each_runner,
    made,
    same,
    samples,
    train,
)

pytestmark = QUIET

# Three steps per epoch: weight 0 in the first epoch, then a rise to 8 within two thirds of one.
EPOCHS = {**FCD, "weight": {"value": 8.0, "start": 1, "warmup": 2 / 3, "unit": "epoch"}}
WEIGHTS = [0.0, 0.0, 0.0, 0.0, 4.0, 8.0]
ITERS = {"by_epoch": False, "max_iters": 6}


class Stream(IterableDataset[Any]):
    """Yields samples without end, and has no length."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from samples("dict")


def weights(run: Run) -> list[float]:
    return [log["loss_kd_fcd"] / log["kd/fcd"] for log in run.logs]


@each_door
@each_runner
@pytest.mark.parametrize("accumulate", [1, 2])
def test_epochs_are_those_of_the_runner(
    tmp_path: Path, door: str, kind: str, accumulate: int
) -> None:
    wrapper = {**config(tmp_path)["optim_wrapper"], "accumulative_counts": accumulate}
    options = both(door, methods=[EPOCHS])
    run = train(tmp_path, kind, **options, optim_wrapper=wrapper, param_scheduler=None)
    assert weights(run) == pytest.approx(WEIGHTS)


@each_door
@pytest.mark.parametrize("sampler", ["DefaultSampler", "InfiniteSampler"])
def test_a_loop_over_iters_has_epochs_too(tmp_path: Path, door: str, sampler: str) -> None:
    loader = {**config(tmp_path)["train_dataloader"], "sampler": {"type": sampler}}
    options = both(door, methods=[EPOCHS])
    run = train(tmp_path, **options, train_dataloader=loader, train_cfg=ITERS)
    assert weights(run) == pytest.approx(WEIGHTS)


@each_door
def test_epochs_are_counted_with_a_val_loop(tmp_path: Path, door: str) -> None:
    run = train(
        tmp_path,
        **both(door, methods=[EPOCHS]),
        val_dataloader=config(tmp_path)["train_dataloader"],
        val_cfg={},
        val_evaluator={"type": "DumpResults", "out_file_path": str(tmp_path / "out.pkl")},
    )
    assert weights(run) == pytest.approx(WEIGHTS)


@each_door
@each_runner
def test_a_resumed_run_is_in_its_epoch(
    tmp_path: Path, safe_globals: None, door: str, kind: str
) -> None:
    options = both(door, methods=[{**EPOCHS, "projector": True}])
    options["hooks"] = [*options.get("hooks", []), {"type": "kdhooks.ResumeHook"}]
    straight = train(tmp_path / "straight", kind, **copy.deepcopy(options))
    with pytest.raises(InterruptedError):
        made(tmp_path / "killed", kind, **copy.deepcopy(options), kill=4).train()
    resumed = train(tmp_path / "killed", kind, **options, resume=True)
    assert weights(resumed) == pytest.approx(WEIGHTS[3:])
    assert resumed.logs == straight.logs[3:]
    assert same(resumed.state, straight.state)


@each_door
def test_a_dataloader_without_a_length_has_no_epochs(tmp_path: Path, door: str) -> None:
    def run(method: Any) -> None:
        options = both(door, methods=[method])
        rest: dict[str, Any] = {"param_scheduler": None, "default_hooks": {"logger": None}}
        runner = made(tmp_path, **options, train_cfg=ITERS, **rest)
        runner._train_dataloader = DataLoader(Stream(), batch_size=8)
        runner.train()

    run({**FCD, "weight": {"value": 8.0, "warmup": 2}})
    with pytest.raises(
        KDHooksError, match=r"fcd.*counts epochs, but the train_dataloader has no length; .*iters"
    ):
        run(EPOCHS)


def test_a_model_without_a_runner_needs_steps_per_epoch() -> None:
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    relations = {"name": "rkd", "weight": 1.0}
    inside = {"name": "eckd", "gamma": EPOCHS["weight"], "exclusivity_weight": 0}
    model = MODELS.build(distilled(methods=[relations, inside]))
    with pytest.raises(KDHooksError, match="mmengine: eckd: a schedule counts epochs, but"):
        model(images, torch.arange(4), mode="loss")
    model = MODELS.build(distilled(methods=[EPOCHS]))
    with pytest.raises(KDHooksError, match=r"no loop of MMEngine runs .*distiller.steps_per_ep"):
        model(images, torch.arange(4), mode="loss")
    model.kdhooks.distiller.steps_per_epoch = 3
    assert model(images, torch.arange(4), mode="loss")["loss_kd_fcd"] == 0


@pytest.mark.parametrize(("ranks", "expected"), [(1, 3), (2, 2), (4, 1)])
def test_an_infinite_sampler_has_the_length_of_all_ranks_data(ranks: int, expected: int) -> None:
    """The sampler's length is that of the whole data set, of which each rank sees a share."""
    data: Any = samples("dict")
    sampler = InfiniteSampler(data, seed=0)
    sampler.world_size = ranks
    assert length(SimpleNamespace(dataloader=DataLoader(data, 8, sampler=sampler))) == expected
