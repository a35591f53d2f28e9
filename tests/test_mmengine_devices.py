"""An MMEngine run distils on another device and on two ranks as in one process on the CPU."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import Results, on_two_ranks
from tests.second_device import NAME, Device, in_a_process, python_devices

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.device import utils as device_utils

from kdhooks.testing import tiny_teacher
from kdhooks_integrations.mmengine.student import _AddTerms
from tests.mmengine_runs import (
    DOORS,
    PROJECTED,
    QUIET,
    SCHEDULED,
    STUDENT,
    Run,
    both,
    config,
    same,
    train,
)

pytestmark = QUIET


# --- another device ------------------------------------------------------------------------------

OF_CLASSES = {"name": "coupleface", "k": 3, "projector": True}  # the ranks share its table


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with in_a_process() as pool:
        yield pool


def on_a_device(
    place: str, door: str, kind: str, folder: Path, nonfinite: str = "raise"
) -> tuple[str, list[float]]:
    """Return the device of the methods' weights, and the losses.

    From the second step on, the host must not wait for the device.
    """
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
    """With nonfinite = "skip" the host waits for the terms in every step."""
    arguments = (f"{NAME}:0", "model", "Runner", tmp_path, "skip")
    with pytest.raises(RuntimeError, match="the host waits for the device"):
        process.submit(on_a_device, *arguments).result()


# --- two ranks -----------------------------------------------------------------------------------


def on_this_rank() -> dict[str, Results]:
    """Train by both entry points: with accumulation, and without it under a static graph."""
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
    base, rows = config(folder), folder.parents[1] / "rows.pt"
    methods = [SCHEDULED, {**OF_CLASSES, "prototypes": str(rows)}]
    ddp = {"type": "MMDistributedDataParallel", "device_ids": None, **wrapper}
    return train(
        folder,
        **both(door, student={**STUDENT, "flat": True}, methods=methods),
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
    classifier = tiny_teacher().classifier
    assert classifier is not None
    torch.save(classifier.slice(0, 6), tmp_path / "rows.pt")
    monkeypatch.setenv("KDHOOKS_TEST_FOLDER", str(tmp_path / "two"))
    first, second = on_two_ranks(on_this_rank, tmp_path)
    monkeypatch.setenv("KDHOOKS_TEST_FOLDER", str(tmp_path / "one"))
    monkeypatch.setenv("KDHOOKS_TEST_BATCH", "8")
    alone = on_this_rank()
    for name, found in alone.items():
        assert same(first[name]["state"], second[name]["state"])
        torch.testing.assert_close(first[name]["state"], found["state"], rtol=1e-4, atol=1e-5)
