"""Both entry points find the stages, classifiers and labels of models of other structures."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdhooks.testing import TinyFaceNet

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement

from kdhooks_integrations import mmengine
from kdhooks_integrations.mmengine.forward import Forward
from kdhooks_integrations.mmengine.models import Conventions
from tests.mmengine_runs import (
    KD,
    QUIET,
    STUDENT,
    Classifier,
    Recogniser,
    Taught,
    distilled,
    each_door,
    made,
    samples,
    train,
)

pytestmark = QUIET


@each_door
def test_a_model_of_mmpretrains_shape(tmp_path: Path, door: str) -> None:
    """The teacher sees (pixel - 127.5) / 127.5 whatever the student's normalisation is."""
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
    """It takes its data by position, and knows only the modes 'loss' and 'predict'."""
    taps = {"student": {"embedding": "resnet"}}
    run = train(tmp_path, model=distilled({"type": "Tutorial"}, taps=taps), data="tuple")
    assert run["loss_kd_fcd"][-1] < run["loss_kd_fcd"][0]


def test_a_students_own_classifier(tmp_path: Path) -> None:
    """The classifier of a method that compares logits is found by convention or by its name."""
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


def test_stages_and_the_embedding_are_known_by_name() -> None:
    ours = ["stage2:in", "img_backbone.layer[3-4]", "embedding"]
    theirs = ["layer1", "layer3", "layer4", "embedding"]
    model: Any = mmengine.Distill(
        {"type": "Classifier"},
        teacher={"module": {"type": "Taught"}},
        methods=[{"name": "fitnet", "student": ours, "teacher": theirs}],
        input_shape=[3, 32, 32],
    )
    (tap,) = model.kdhooks.distiller.taps
    layers = [f"img_backbone.layer{n}" for n in (2, 3, 4)]
    assert tap.student_paths == (f"{layers[0]}:in", *layers[1:], "neck")
