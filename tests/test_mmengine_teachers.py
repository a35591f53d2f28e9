"""MMEngine checkpoints as teachers: the choice of weights, class rows in them, named networks."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mmengine.runner")

from mmengine.registry import MODELS

from kdhooks import KDHooksError
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher.teacher import Teacher
from kdhooks.testing import TinyFaceNet
from kdhooks_integrations.mmengine.images import Seen
from kdhooks_integrations.mmengine.models import with_teacher
from tests.mmengine_runs import QUIET, Recogniser, distilled, same, trained_teacher
from tests.small_distiller import teacher_network

pytestmark = QUIET
NETWORK = {"type": "Recogniser", "width": 6}


def state(plus: float = 0.0) -> dict[str, Tensor]:
    module = teacher_network()
    model = Recogniser(width=6, seed=2)
    model.backbone.load_state_dict(module.state_dict())
    return {key: value + plus for key, value in model.state_dict().items()}


def built(folder: Path, content: Any, **teacher: Any) -> Teacher:
    torch.save(content, folder / "teacher.pth")
    spec = {"network": NETWORK, "checkpoint": folder / "teacher.pth", **teacher}
    return build_teacher(
        with_teacher(Recipe.read({"teacher": spec, "methods": ["fcd"]}), Seen.of(None))
    )


def averaged() -> dict[str, Any]:
    """Return a checkpoint as EMAHook writes it: the weights to use are in state_dict."""
    ema = {f"module.{key}": value for key, value in state(1).items()}
    return {"state_dict": state(), "ema_state_dict": {"steps": torch.tensor(3), **ema}, "meta": {}}


def test_state_dict_is_preferred_to_other_weights(tmp_path: Path) -> None:
    for weights, plus in (({}, 0), ({"weights": "ema_state_dict"}, 1)):
        module = built(tmp_path, averaged(), **weights).module
        assert module is not None
        found = module.state_dict()
        assert all(torch.equal(found[key], value) for key, value in state(plus).items())


def test_a_bare_state_dict_is_taken(tmp_path: Path) -> None:
    module = built(tmp_path, state()).module
    assert module is not None
    assert torch.equal(module.state_dict()["head.weight"], state()["head.weight"])


def test_class_rows_can_be_a_weight_of_the_model(tmp_path: Path) -> None:
    teacher = built(tmp_path, averaged(), classifier="head.weight")
    assert teacher.classifier is not None
    assert torch.equal(teacher.classifier.slice(0, 6), teacher.module.state_dict()["head.weight"])  # type: ignore[union-attr]
    with pytest.raises(
        KDHooksError, match=r"no weight 'head\.wieght'; did you mean 'head\.weight'"
    ):
        built(tmp_path, averaged(), classifier="head.wieght")


def made() -> nn.Module:
    return TinyFaceNet(width=6)


def test_a_network_by_name_takes_its_part_of_the_checkpoint(tmp_path: Path) -> None:
    options = {"network": f"{__name__}:made", "classifier": "state_dict.head.weight"}
    teacher = built(tmp_path, averaged(), **options)
    assert isinstance(teacher.module, TinyFaceNet)
    assert torch.equal(teacher.module.fc.weight, state()["backbone.fc.weight"])
    assert teacher.classifier is not None
    assert torch.equal(teacher.classifier.slice(0, 6), state()["head.weight"])


def test_the_student_of_a_distilled_config_becomes_the_teacher(tmp_path: Path) -> None:
    """The config's own teacher and methods are ignored."""
    taught = trained_teacher()
    torch.save({"state_dict": taught.state_dict()}, tmp_path / "teacher.pth")
    network = {
        "type": "kdhooks.Distill",
        "student": {"type": "Recogniser", "width": 6},
        "data_preprocessor": {"type": "ImgDataPreprocessor", "mean": [0.0] * 3, "std": [255.0] * 3},
    }
    teacher = {"network": network, "checkpoint": str(tmp_path / "teacher.pth")}
    loaded = MODELS.build(distilled(teacher=teacher)).kdhooks.distiller._session.teacher.module
    assert same(loaded.state_dict(), taught.state_dict())
    assert type(loaded.data_preprocessor).__name__ == "ImgDataPreprocessor"
