"""A teacher loads all weights that the init_cfg of its parts name."""

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

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from kdhooks_integrations import mmengine
from tests.mmengine_runs import QUIET, STUDENT
from tests.mmengine_shapes import IMAGENET, shaped

pytestmark = QUIET

KD: dict[str, Any] = {"methods": ["rkd"], "input_shape": [3, 32, 32]}


@MODELS.register_module()
class Inside(BaseModule):  # type: ignore[misc]  # mmengine has no types
    """A backbone with an init_cfg of its own."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.conv, self.fc = nn.Conv2d(3, 4, 8, stride=8), nn.Linear(64, 12)

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.fc(self.conv(images).flatten(1))
        return embedding


def teacher_with(**init: Any) -> dict[str, Any]:
    backbone = {"type": "Inside", "init_cfg": {"type": "Pretrained", **init}}
    model = {"type": "ShapedClassifier", "backbone": backbone, "data_preprocessor": IMAGENET}
    return {"module": {**model, "head": {"type": "ShapedLinear", "d": 12}}}


def test_a_part_of_the_teacher_has_the_weights_that_its_init_cfg_names(tmp_path: Path) -> None:
    trained = Inside()
    state = {f"backbone.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(1)}}, tmp_path / "part.pth")
    student = shaped("ShapedMobileNet", data_preprocessor=IMAGENET)
    given = teacher_with(checkpoint=str(tmp_path / "part.pth"), prefix="backbone")
    model: Any = mmengine.Distill(student, teacher=given, **KD)
    found = model.kdhooks.distiller._session.teacher.module.backbone.state_dict()
    assert all(torch.equal(found[key], value) for key, value in trained.state_dict().items())
    torch.save({"state_dict": {"backbone.conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    other = teacher_with(checkpoint=str(tmp_path / "other.pth"))
    with pytest.raises(KDHooksError, match="does not fit the network"):
        mmengine.Distill(student, teacher=other, **KD)


@pytest.mark.parametrize("file", [None, 3, "absent.pth", "https://example.org/a.pth", ""])
def test_an_init_cfg_must_name_a_file_of_this_machine(file: Any) -> None:
    init = {} if file is None else {"checkpoint": file}
    match = r"backbone.init_cfg must name a local file as its checkpoint; found"
    with pytest.raises(KDHooksError, match=match):
        mmengine.Distill(STUDENT, teacher=teacher_with(**init), **KD)


def test_an_init_cfg_that_fails_is_refused() -> None:
    module = {**STUDENT, "init_cfg": {"type": "Norml"}}
    with pytest.raises(KDHooksError, match=r"can't be initialised by its init_cfg; .*Norml"):
        mmengine.Distill(STUDENT, teacher={"module": module}, **KD)
