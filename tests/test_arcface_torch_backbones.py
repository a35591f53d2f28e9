"""Backbones may be compiled, and kdhooks knows the stages of the trainer's own backbones."""

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from kdhooks_integrations import arcface_torch
from tests.arcface_runs import FCD, attach, install
from tests.standin import Trainer

# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "compiled", "backend"),
    [
        ("config_line", "before DDP", "eager"),
        ("config_line", "before DDP", "aot_eager"),
        ("config_line", "after DDP", "eager"),
        ("config_line", "module", "aot_eager"),
        ("after_schedule", "after DDP", "eager"),
    ],
)
def test_a_compiled_backbone_gives_the_same_losses(
    one: Trainer, teacher: dict[str, str], where: str, compiled: str, backend: str
) -> None:
    line = (attach if where == "after_schedule" else install)(teacher, FCD, {"name": "at"})
    there: dict[str, Any] = {where: line}
    (report,) = one.run(**there, compile=backend, compiled=compiled)
    (uncompiled,) = one.run(**there)
    torch.testing.assert_close(report["losses"], uncompiled["losses"], rtol=1e-6, atol=1e-6)
    assert report["groups"] == uncompiled["groups"]


@pytest.mark.slow
def test_a_backbone_compiled_by_inductor_gives_the_same_losses(
    one: Trainer, teacher: dict[str, str]
) -> None:
    if not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    taps = {"student": {"stages": ["2"]}, "teacher": {"stages": ["layer2"]}}
    line = install(teacher, FCD, {"name": "at"}, taps=taps)
    small: dict[str, Any] = {
        "network": "plain",
        "verbose": 100,
    }  # compiles few layers, and no evaluation
    (report,) = one.run(line, compile="inductor", **small)
    (plain,) = one.run(line, **small)
    torch.testing.assert_close(report["losses"], plain["losses"], rtol=1e-4, atol=1e-4)


FIRST_CALL = (
    "module_partial_fc(backbone(torch.rand(12, 3, 32, 32)), torch.arange(12) % 6).backward()\n"
)


def test_an_inner_tap_of_a_compiled_backbone_that_ran_already_is_refused(
    one: Trainer, teacher: dict[str, str]
) -> None:
    line = attach(teacher, FCD, taps={"student": {"embedding": "features"}})
    (report,) = one.run(after_schedule=FIRST_CALL + line, compile="eager")
    assert report["error"] == "KDHooksError"
    assert "attach before the first call of a compiled model" in report["message"]


def test_the_output_of_a_compiled_backbone_can_be_tapped_late(
    one: Trainer, teacher: dict[str, str]
) -> None:
    """After compilation, torch.compile only honours new hooks of the outermost module."""
    line = FIRST_CALL + attach(teacher, FCD)
    (report,) = one.run(after_schedule=line, compile="eager")
    torch.testing.assert_close(report["losses"], one.run(after_schedule=line)[0]["losses"])
    assert report["losses"] != one.run(after_schedule=FIRST_CALL)[0]["losses"]


# --- the backbones' stages -----------------------------------------------------------------------


class IResNet(nn.Module):
    pass


class MobileFaceNet(nn.Module):
    pass


class VisionTransformer(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(depth))


def other_transformer() -> nn.Module:
    """Like torchvision's class of the same name, with other submodules."""
    found = VisionTransformer(12)
    found.encoder = found.blocks
    del found.blocks
    return found


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        (IResNet(), ["layer1", "layer2", "layer3", "layer4"]),
        (MobileFaceNet(), ["layers.1", "layers.3", "layers.5", "conv_sep"]),
        (VisionTransformer(12), ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]),
        (VisionTransformer(24), ["blocks.5", "blocks.11", "blocks.17", "blocks.23"]),
        (VisionTransformer(3), None),
        (other_transformer(), None),
        (nn.Identity(), None),
    ],
)
def test_stages_of_the_trainers_backbones(model: nn.Module, stages: list[str] | None) -> None:
    assert arcface_torch.Backbones().model_stages(model) == stages
