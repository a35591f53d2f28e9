"""The Lightning callback trains the same student on two ranks as in one process."""

import os
import warnings
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("lightning")

import torch
from torch.testing import assert_close

from kdhooks.testing import tiny_teacher
from tests.lightning_runs import PROJECTED, Faces, Manual, Whole, distil, fit, weights
from tests.ranks import Results, as_torchrun, here, on_two_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
METHODS = [PROJECTED, "rkd"]  # rkd compares the samples of all ranks
OF_CLASSES = [  # coupleface splits its table over the ranks; icdface updates a whole one
    {"name": "coupleface", "k": 3, "projector": True},
    {"name": "icdface", "projector": True},
]
VIEW = {"mask": {"p": 0.5}}


class Child(Faces):
    """Has the student as a child, without BatchNorm, whose statistics would differ by rank."""

    def __init__(self) -> None:
        super().__init__()
        whole = Whole()
        self.model = torch.nn.Sequential(  # type: ignore[assignment]
            whole.stem, torch.nn.ReLU(), torch.nn.Flatten(), whole.fc
        )


class Handmade(Manual):
    def __init__(self) -> None:
        super().__init__()
        self.model = Child().model


SCENARIOS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a child": (Child, {}),
    "accumulated and clipped": (
        Child, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ),
    "the module itself": (Whole, {}),
    "by manual optimization": (Handmade, {}),
    "tables of classes": (Child, {"methods": OF_CLASSES}),
}  # fmt: skip


def trained(name: str) -> Results:
    kind, given = SCENARIOS[name]
    options, size = dict(given), here()[1]
    methods = options.pop("methods", METHODS)
    if size > 1:
        options |= {"strategy": "ddp", "devices": size}
    teacher = tiny_teacher()
    assert teacher.classifier is not None
    table = {"module": teacher.module, "classifier": teacher.classifier.slice(0, 6)}
    module, callback = kind(), distil(*methods, student_view=VIEW, teacher=table)
    trainer = fit(module, callback, **options)
    assert trainer.world_size == size
    kd = callback.distiller
    assert kd is not None
    return {"student": weights(module), "losses": weights(kd), "step": torch.tensor(kd.step)}


def _scenarios() -> dict[str, Results]:
    as_torchrun()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: trained(name) for name in SCENARIOS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    with mock.patch.dict(os.environ):
        return on_two_ranks(_scenarios, tmp_path_factory.mktemp("lightning"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_as_one(name: str, ranks: list[dict[str, Results]]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first, trained(name), rtol=1e-4, atol=1e-5)
