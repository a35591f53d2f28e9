"""In MMEngine, a table with a row for each sample replaces the teacher."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mmengine.runner")

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from torch.utils.data import ConcatDataset, Dataset

from kdhooks import KDHooksError
from tests.mmengine_runs import QUIET, both, distilled, each_door, same, samples, train
from tests.small_distiller import teacher_network

pytestmark = QUIET
METHODS = [{"name": "fcd", "weight": 8.0, "projector": True}]
STUDENT = {
    "type": "Classifier",
    "data_preprocessor": {"type": "ImgDataPreprocessor", "mean": [127.5] * 3, "std": [127.5] * 3},
}
RESUME = {"type": "kdhooks.ResumeHook"}


def Parts() -> Dataset[Any]:
    """Concatenate two data sets, each of which numbers its samples from 0."""
    part: Any = samples("sample")[:12]
    return ConcatDataset([part, part])


DATASETS.register_module("Parts", module=Parts)  # pyright: ignore[reportArgumentType]


def rows() -> torch.Tensor:
    """(24 12): the teacher's embeddings of all samples."""
    module = teacher_network()
    pixels = torch.stack([sample["inputs"] for sample in samples("sample")])
    with torch.no_grad():
        found: torch.Tensor = module((pixels - 127.5) / 127.5)
    return found


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    np.save(tmp_path / "rows.npy", rows().numpy())
    return {"embeddings": str(tmp_path / "rows.npy")}


def options(door: str, **changes: Any) -> dict[str, Any]:
    found = both(door, **{"student": STUDENT, "methods": METHODS, **changes})
    return {"data": "sample", **found, "hooks": [*found.get("hooks", []), RESUME]}


def losses(folder: Path, **changes: Any) -> list[float]:
    short = {"by_epoch": True, "max_epochs": 1}
    view = {"mask": {"p": 0.5}}
    found = options(changes.pop("door", "model"), student_view=view, **changes)
    return train(folder, **found, train_cfg=short)["loss_kd_fcd"]


@each_door
def test_the_table_trains_the_same_as_its_network(
    door: str, table: dict[str, Any], tmp_path: Path
) -> None:
    """Rows are found by sample_idx in shuffled batches with a view; a reordered table differs."""
    network = losses(tmp_path / "network", door=door)
    place = {"indices": "data_samples.sample_idx"} if door == "hook" else {}
    stored = losses(tmp_path / "stored", door=door, teacher=table, **place)
    assert stored == pytest.approx(network, rel=1e-6)
    np.save(table["embeddings"], rows().roll(1, 0).numpy())
    other = losses(tmp_path / "other", door=door, teacher=table)
    assert other != pytest.approx(network, rel=1e-5)


@each_door
def test_kill_and_resume_equals_the_straight_run(
    door: str, table: dict[str, Any], tmp_path: Path, safe_globals: None
) -> None:
    changes = options(door, teacher=table, student_view={"mask": {"p": 0.5}})
    straight = train(tmp_path / "straight", **changes)
    with pytest.raises(InterruptedError):
        train(tmp_path / "killed", **changes, kill=4)
    resumed = train(tmp_path / "killed", **changes, resume=True)
    assert same(resumed.state, straight.state)


@each_door
def test_samples_without_numbers_are_refused(
    door: str, table: dict[str, Any], tmp_path: Path
) -> None:
    for place in ({}, {"indices": "labels.number"}):
        with pytest.raises(KDHooksError, match=r"number of each sample .* at .*(one of|\.number)"):
            train(tmp_path, **both(door, teacher=table, **place))


def test_parts_that_count_from_0_are_refused_unless_indices_are_named(
    table: dict[str, Any], tmp_path: Path
) -> None:
    changes = options("model", teacher=table)
    loader = {
        "dataset": {"type": "Parts"},
        "batch_size": 8,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "collate_fn": {"type": "pseudo_collate"},
    }
    with pytest.raises(KDHooksError, match="found a ConcatDataset of 2 parts, each of which count"):
        train(tmp_path, **changes, train_dataloader=loader)
    changes["model"]["indices"] = "data_samples.gt_label"
    train(tmp_path, **changes, train_dataloader=loader)


def test_numbers_beyond_the_table_are_refused(table: dict[str, Any], tmp_path: Path) -> None:
    np.save(table["embeddings"], rows()[:6].numpy())
    with pytest.raises(KDHooksError, match="indices must be from 0 to 5, the rows of"):
        train(tmp_path, **options("model", teacher=table))


def test_mixed_images_are_refused(table: dict[str, Any]) -> None:
    class Mixup:
        def mix(self) -> None: ...

    model: Any = MODELS.build(STUDENT)
    model.data_preprocessor.batch_augments = type("Augments", (), {"augments": [Mixup()]})()
    MODELS.build(distilled(model, methods=METHODS))  # a network as teacher sees the mixed images
    another: Any = MODELS.build(STUDENT)
    another.data_preprocessor.batch_augments = model.data_preprocessor.batch_augments
    with pytest.raises(KDHooksError, match=r"batch_augments \(Mixup\) mix images of two; remove"):
        MODELS.build(distilled(another, methods=METHODS, teacher=table))
    assert not another._forward_hooks, "nothing is left on the student"


def test_indices_without_a_table_are_refused() -> None:
    with pytest.raises(
        KDHooksError, match=r"indices = 'labels' .* but no teacher is a table; leave"
    ):
        MODELS.build(distilled(indices="labels"))
    with pytest.raises(KDHooksError, match=r"indices = 'lables': .* did you mean 'labels'"):
        MODELS.build(distilled(indices="lables"))
    with pytest.raises(KDHooksError, match=r"indices must be a path like 'data_samples\.sample_i"):
        MODELS.build(distilled(indices=3))


def test_one_of_several_teachers_is_a_table(table: dict[str, Any], tmp_path: Path) -> None:
    teachers = [table, {"module": {"type": "Taught"}}]
    several = train(tmp_path / "two", **options("model", teacher=teachers, methods=["sp"]))
    assert np.isfinite(several["loss_kd_sp"]).all()


def test_the_config_in_the_docs_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "teachers-and-views.md"
    (block,) = re.findall(
        r"^```python table-mmengine\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", torch.rand(24, 16).numpy())
    Path("your_config.py").write_text(f"model = {STUDENT!r}\n")
    Path("kd.py").write_text(block)
    model: Any = MODELS.build(Config.fromfile("kd.py").model)
    assert model.kdhooks.distiller.by_index
