"""Stages, embeddings and classifiers are found in models that are built like mmpretrain's."""

import warnings
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from kdhooks import KDHooksError
from kdhooks.testing import tiny_teacher

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.registry import MODELS

from kdhooks_integrations import mmengine
from kdhooks_integrations.mmengine.models import Conventions
from tests.mmengine_runs import QUIET, STUDENT, Taught
from tests.mmengine_shapes import IMAGENET, WIDTHS, batch, losses, shaped

pytestmark = QUIET

SHAPE: dict[str, Any] = {"input_shape": [3, 32, 32]}
each_kind = pytest.mark.parametrize("kind", WIDTHS)


def distilled(kind: str, methods: Any, teacher: Any = None, **changes: Any) -> Any:
    student = shaped(kind, data_preprocessor=IMAGENET, **changes.pop("student", {}))
    teacher = {"module": Taught()} if teacher is None else teacher
    return mmengine.Distill(student, teacher=teacher, methods=methods, **{**SHAPE, **changes})


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("ShapedMobileNet", ["layer1", "layer3", "layer4", "layer6"]),
        ("ShapedConvNeXt", ["stages.0", "stages.1", "stages.2", "stages.3"]),
        ("VisionTransformer", ["layers.0", "layers.1", "layers.2", "layers.3"]),
        ("ShapedSwin", ["stages.0.blocks.1", "stages.1.blocks.1"]),
    ],
)
def test_a_stage_ends_before_the_map_is_halved(kind: str, stages: list[str]) -> None:
    model = MODELS.build(shaped(kind))
    assert Conventions().model_stages(model) == [f"backbone.{stage}" for stage in stages]


def test_stages_of_networks_of_other_structures() -> None:
    def conv(stride: int = 1) -> nn.Module:
        return nn.Conv2d(3, 3, 1, stride=stride)

    stages = Conventions().model_stages
    timm = nn.Module()
    timm.timm_model = nn.Module()
    timm.timm_model.conv_stem = conv(2)
    timm.timm_model.blocks = nn.Sequential(conv(), conv(2), conv(2), conv())
    assert stages(timm) == [f"timm_model.blocks.{number}" for number in (0, 1, 3)]
    deep = nn.Module()
    deep.stem = conv()
    deep.blocks = nn.ModuleList(nn.Identity() for _ in range(12))
    assert stages(deep) == [f"blocks.{number}" for number in (2, 5, 8, 11)]
    stem_and_layers = nn.Module()
    for number in range(1, 5):
        stem_and_layers.add_module(f"layer{number}", conv(1))
    assert stages(stem_and_layers) == ["layer1", "layer2", "layer3", "layer4"]
    odd = nn.Module()
    odd.first, odd.second = conv(), conv(2)
    assert stages(odd) is None


@pytest.mark.parametrize("name", ["IResNet", "MobileFaceNet", "VisionTransformer"])
def test_a_class_with_a_known_name_but_another_structure_has_no_stages(name: str) -> None:
    assert Conventions().model_stages(type(name, (nn.Module,), {})()) is None


@each_kind
@pytest.mark.parametrize("name", ["fcd", "cakd", "at"])
def test_methods_train_by_stages_and_without(kind: str, name: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "fcd": {"projector": True},
        "cakd": {"urfm": {"width": 8, "heads": 2, "centres": 3}},
        "at": {},
    }
    count = 2 if kind == "ShapedSwin" else 4
    taps = {"teacher": {"stages": ["layer1", "layer2", "layer3", "layer4"][-count:]}}
    model = distilled(kind, [{"name": name, **options[name]}], taps=taps)
    found = losses(model)[f"loss_kd_{name}"]
    found.backward()
    assert found.isfinite()
    assert any(p.grad is not None for p in model.backbone.parameters())


def test_a_stage_that_returns_no_tensor_is_refused_only_if_tapped() -> None:
    taps = {"student": {"stages": ["backbone.stages.0", "backbone.stages.1"]}}
    losses(distilled("ShapedSwin", [{"name": "fcd", "projector": True}], taps=taps))
    with pytest.raises(
        KDHooksError,
        match=r"'backbone.stages.1' must return a tensor; found tuple of 2; .*backbone.stages.1"
        r"\[-1\] is the last; stages are named, shallow to deep, as taps.student.stages",
    ):
        distilled("ShapedSwin", ["cakd"], taps=taps)
    with pytest.raises(KDHooksError, match=r"no submodule 'backbone.stage.0'; did you"):
        distilled("ShapedSwin", ["fcd"], taps={"student": {"stages": ["backbone.stage.0"]}})


def test_a_model_of_unknown_structure_is_told_how_to_name_stages() -> None:
    student = {**STUDENT, "flat": True}
    table: dict[str, Any] = {"teacher": {"module": Taught()}, "input_shape": [3, 32, 32]}
    mmengine.Distill(student, methods=["fcd"], **table)
    with pytest.raises(KDHooksError, match=r"at needs .* stages; found 0; name .*taps.student.sta"):
        mmengine.Distill(student, methods=["at"], **table)


def test_the_last_of_several_outputs_can_be_named() -> None:
    student = {"backbone": {"out": [1, 3, 6]}}
    with pytest.raises(
        KDHooksError, match=r"'neck' must return a tensor; found tuple of 3; .* neck\[-1\] is the"
    ):
        distilled("ShapedMobileNet", ["rkd"], student=student)
    taps = {"student": {"embedding": "neck[-1]"}}
    model = distilled("ShapedMobileNet", ["rkd"], student=student, taps=taps)
    assert losses(model)["loss_kd_rkd"].requires_grad
    assert model.kdhooks.distiller._student._taps._paths == ["neck[-1]"]


# --- classifiers -----------------------------------------------------------------------------


def rows() -> dict[str, Any]:
    return {"module": Taught(), "classifier": tiny_teacher().classifier}


def test_rows_of_arcfaces_head_are_found() -> None:
    model = distilled("ShapedMobileNet", ["kd"], rows())
    assert model.kdhooks.distiller._head.weight is model.head.norm_product.weight
    assert losses(model)["loss_kd_kd"].requires_grad


def test_several_rows_per_class_are_refused_as_a_classifier() -> None:
    centres = {"student": {"head_options": {"k": 3}}}
    distilled("ShapedMobileNet", [{"name": "fcd", "projector": True}], rows(), **centres)
    with pytest.raises(KDHooksError, match=r"classifier is not known; .*classifier = 'head.fc.w"):
        distilled("ShapedMobileNet", ["kd"], rows(), **centres)
    with pytest.raises(KDHooksError, match=r"one row for each class; found 3 sub-centres"):
        distilled(
            "ShapedMobileNet", ["kd"], rows(), classifier="head.norm_product.weight", **centres
        )


def test_a_bias_is_ignored_only_if_the_classifier_is_named() -> None:
    linear = {"student": {"head": "ShapedLinear"}}
    distilled("ShapedMobileNet", [{"name": "fcd", "projector": True}], rows(), **linear)
    with pytest.raises(
        KDHooksError, match=r"mmengine: kd compares cosines .* adds a bias.* classifier = 'head.fc"
    ):
        distilled("ShapedMobileNet", ["kd"], rows(), **linear)
    distilled("ShapedMobileNet", ["kd"], rows(), classifier="head.fc.weight", **linear)
    without = {"student": {"head": "ShapedLinear", "head_options": {"bias": False}}}
    distilled("ShapedMobileNet", ["kd"], rows(), **without)


def test_a_refused_classifier_leaves_no_hook_behind() -> None:
    student = MODELS.build(
        shaped("ShapedMobileNet", head="ShapedLinear", data_preprocessor=IMAGENET)
    )
    with pytest.raises(KDHooksError, match="adds a bias"):
        mmengine.Distill(student, teacher=rows(), methods=["kd"], **SHAPE)
    assert not any(module._forward_hooks for module in student.modules())


def test_the_teachers_rows_can_be_named_in_the_teacher() -> None:
    network = MODELS.build(shaped("ShapedMobileNet", data_preprocessor=IMAGENET))
    network(network.data_preprocessor(batch())["inputs"])
    teacher = {"module": network, "classifier": "head.norm_product.weight"}
    model = distilled("ShapedMobileNet", ["kd"], teacher)
    found = model.kdhooks.distiller.teacher_rows.rows
    assert torch.equal(found, network.head.norm_product.weight)
    for name, match in (
        ("head.norm_product.wieght", "neither a file nor a parameter .*did you mean 'head.norm_p"),
        ("backbone.layer0.0.weight", r"must be rows \(c d\); found shape \(4, 3, 3, 3\)"),
    ):
        with pytest.raises(KDHooksError, match=f"teacher.classifier = '{name}'.*{match}"):
            distilled("ShapedMobileNet", ["kd"], {**teacher, "classifier": name})
