"""The teacher gets the student's images, converted by both models' data_preprocessors."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdhooks import KDHooksError
from kdhooks.recipe import build
from kdhooks.testing import TinyFaceNet, tiny_teacher

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.registry import HOOKS, MODELS

from kdhooks_integrations import mmengine
from kdhooks_integrations.mmengine.images import Seen
from tests.mmengine_runs import QUIET, STUDENT, Recogniser, each_door, train
from tests.mmengine_shapes import IMAGENET, batch, losses, shaped

pytestmark = QUIET

KD: dict[str, Any] = {"methods": ["rkd"], "input_shape": [3, 32, 32]}
KIND = "ShapedMobileNet"
BGR = {"mean": [100.0, 110.0, 120.0], "std": [50.0, 60.0, 70.0]}
ASKED = (
    r"does not specify how its images are normalised .*set teacher.input = dict\(mean=…, std=…\)"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = MODELS.build(shaped(KIND, data_preprocessor=IMAGENET)).train()
    for _ in range(60):  # until the running statistics have reached those of these images
        model(model.data_preprocessor(batch())["inputs"])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


def seen_by_teacher(teacher: Any, student: Any, **changes: Any) -> Tensor:
    """Return the images that the teacher's forward receives in a step on `batch()`."""
    model: Any = mmengine.Distill(student, teacher=teacher, **{**KD, **changes})
    module = model.kdhooks.distiller._session.teacher.module
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses(model)
    return seen[-1]


def as_by(preprocessor: dict[str, Any]) -> Tensor:
    """Return `batch()` as this data_preprocessor passes it to its model."""
    made = MODELS.build({"type": "ShapedPreprocessor", **preprocessor})
    images: Tensor = made(batch())["inputs"]
    return images


@pytest.mark.parametrize("own", [IMAGENET, {**BGR, "to_rgb": True}])
def test_the_teachers_own_normalisation_is_applied(checkpoint: Path, own: dict[str, Any]) -> None:
    network = shaped(KIND, data_preprocessor=own)
    teacher = {"network": network, "checkpoint": checkpoint}
    found = seen_by_teacher(teacher, shaped(KIND, data_preprocessor=IMAGENET))
    torch.testing.assert_close(found, as_by(own), atol=1e-4, rtol=1e-4)


def test_teacher_input_takes_precedence_over_the_teachers_preprocessor(checkpoint: Path) -> None:
    network = shaped(KIND, data_preprocessor=IMAGENET)
    said = {"mean": 0.0, "std": 255.0, "order": "bgr"}
    teacher = {"network": network, "checkpoint": checkpoint, "input": said}
    found = seen_by_teacher(teacher, shaped(KIND, data_preprocessor=IMAGENET))
    loaded = torch.stack(batch()["inputs"])  # BGR, since to_rgb turns it
    torch.testing.assert_close(found, loaded / 255, atol=1e-4, rtol=1e-4)


def test_a_teacher_without_a_preprocessor_needs_teacher_input(checkpoint: Path) -> None:
    """mmpretrain's models have none: their data_preprocessor is outside of the model's config."""
    student = shaped(KIND, data_preprocessor=IMAGENET)
    teacher = {"network": shaped(KIND), "checkpoint": checkpoint}
    half: dict[str, Any] = {**teacher, "input": {"mean": 0.0}}
    for given in (teacher, half, {"module": shaped(KIND)}, {"module": {"type": KIND}}):
        with pytest.raises(KDHooksError, match=ASKED):
            mmengine.Distill(student, teacher=given, **KD)
    said = {"mean": BGR["mean"], "std": BGR["std"], "order": "rgb"}
    found = seen_by_teacher({**teacher, "input": said}, student)
    wanted = as_by({**BGR, "to_rgb": True})
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_two_models_of_one_pipeline_see_the_same(checkpoint: Path) -> None:
    """Neither model specifies a normalisation, and both keep the channels as loaded."""
    torch.manual_seed(1)
    teacher = {"network": shaped(KIND), "checkpoint": checkpoint}
    pixels: dict[str, Any] = {"input": {"mean": 127.5, "std": 127.5}}
    model: Any = mmengine.Distill(shaped(KIND), teacher=teacher, **KD, **pixels)
    module = model.kdhooks.distiller._session.teacher.module
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    model(images, batch()["data_samples"][:6], mode="loss")
    assert torch.equal(seen[-1], images)


def test_a_preprocessor_of_an_unknown_kind_needs_teacher_input(checkpoint: Path) -> None:
    from mmengine.model import BaseDataPreprocessor

    class Own(BaseDataPreprocessor):  # type: ignore[misc]
        pass

    teacher = Recogniser(data_preprocessor=Own())
    teacher.backbone(torch.randn(4, 3, 32, 32))
    with pytest.raises(KDHooksError, match=ASKED):
        mmengine.Distill(STUDENT, teacher={"module": teacher}, **KD)


@pytest.mark.parametrize(
    ("ours", "theirs", "said", "match"),
    [
        (True, True, {}, ""),
        (False, False, {}, ""),
        (True, False, {}, r"teacher's .* to_rgb = False.*known to be RGB.*: teacher.input = dict"),
        (True, False, {"teacher": "bgr"}, ""),
        (False, True, {}, r"student's .* to_rgb = False.*BGR if mmcv.*: input = dict\(order="),
        (False, True, {"student": "bgr"}, ""),
        (False, False, {"student": "bgr"}, "teacher's .* to_rgb = False.*known to be BGR"),
        (False, False, {"teacher": "bgr"}, "student's .* to_rgb = False"),
        (False, False, {"student": "bgr", "teacher": "bgr"}, ""),
    ],
)
def test_the_order_of_the_channels(
    checkpoint: Path, ours: bool, theirs: bool, said: dict[str, str], match: str
) -> None:
    student = shaped(KIND, data_preprocessor={**IMAGENET, "to_rgb": ours})
    own = {**IMAGENET, "to_rgb": theirs}
    teacher: dict[str, Any] = {
        "network": shaped(KIND, data_preprocessor=own),
        "checkpoint": checkpoint,
    }
    if "teacher" in said:
        teacher["input"] = {"order": said["teacher"]}
    changes: dict[str, Any] = {"input": {"order": said["student"]}} if "student" in said else {}
    if match:
        with pytest.raises(KDHooksError, match=match):
            mmengine.Distill(student, teacher=teacher, **KD, **changes)
    else:
        found = seen_by_teacher(teacher, student, **changes)
        torch.testing.assert_close(found, as_by(own), atol=1e-4, rtol=1e-4)


def test_a_teacher_that_is_no_mmengine_model_needs_the_order_too() -> None:
    student = shaped(KIND, data_preprocessor={**IMAGENET, "to_rgb": False})
    with pytest.raises(KDHooksError, match="student's data_preprocessor has to_rgb = False"):
        mmengine.Distill(student, teacher=tiny_teacher().module, **KD)


# --- a data_preprocessor at the config's top -------------------------------------------------


@each_door
@pytest.mark.parametrize("kind", ["Runner", "FlexibleRunner"])
def test_a_data_preprocessor_at_the_top_is_the_students(
    tmp_path: Path, kind: str, door: str
) -> None:
    """With weight 0 the run is bit-identical to the plain run."""
    top = {"data_preprocessor": {**IMAGENET, "std": [58.0, 57.0, 57.0]}, "data": "sample"}
    student = shaped(KIND)
    table = {"teacher": {"module": {"type": "Taught"}}, **KD}
    table["methods"] = [{"name": "rkd", "weight": 0.0}]
    plain = train(tmp_path / "plain", kind, model=student, **top)
    line = {"type": "kdhooks.Distill", "student": student, **table}
    hooks = [{"type": "kdhooks.DistillHook", **table}]
    changes = {"model": line} if door == "model" else {"model": student, "hooks": hooks}
    run = train(tmp_path / "kd", kind, **changes, **top)
    assert run["loss"] == plain["loss"]
    preprocessor: Any = run.model.data_preprocessor
    assert preprocessor.std.flatten().tolist() == [58.0, 57.0, 57.0]
    assert all(torch.equal(run.state[key], value) for key, value in plain.state.items())


def test_a_students_own_data_preprocessor_stays() -> None:
    top = {"data_preprocessor": IMAGENET, **KD, "teacher": tiny_teacher().module}
    model: Any = mmengine.Distill(shaped(KIND, data_preprocessor={**BGR, "to_rgb": True}), **top)
    assert model.data_preprocessor.mean.flatten().tolist() == BGR["mean"]
    built: Any = MODELS.build(shaped(KIND, data_preprocessor=IMAGENET))
    mmengine.Distill(built, **{**top, "data_preprocessor": BGR})
    assert built.data_preprocessor.to_rgb


# --- a teacher by its config's file ----------------------------------------------------------

FILE = """
default_scope = 'mmengine'
data_preprocessor = {top!r}
model = {model!r}
"""


def written(folder: Path, model: object, top: object = None) -> Path:
    folder.joinpath("config.py").write_text(FILE.format(model=model, top=top))
    return folder / "config.py"


@pytest.mark.parametrize("distilled", [False, True])
def test_a_teacher_by_its_configs_file(checkpoint: Path, distilled: bool, tmp_path: Path) -> None:
    """Its data_preprocessor is at the top; the config of a distilled student works, too."""
    model = shaped(KIND)
    if distilled:
        model = {"type": "kdhooks.Distill", "student": model, "teacher": {}, "methods": []}
    own = {**BGR, "to_rgb": True}
    teacher = {"config": written(tmp_path, model, own), "checkpoint": checkpoint}
    found = seen_by_teacher(teacher, shaped(KIND, data_preprocessor=IMAGENET))
    torch.testing.assert_close(found, as_by(own), atol=1e-4, rtol=1e-4)


def test_a_teachers_config_is_found_beside_the_recipe(checkpoint: Path, tmp_path: Path) -> None:
    written(tmp_path, shaped(KIND, data_preprocessor=IMAGENET))
    tmp_path.joinpath("kd.toml").write_text(
        'methods = ["rkd"]\ninput_shape = [3, 32, 32]\n[teacher]\nconfig = "config.py"\n'
        'checkpoint = "teacher.pth"\n'
    )
    student = shaped(KIND, data_preprocessor=IMAGENET)
    for given in (tmp_path / "kd.toml", str(tmp_path / "kd.toml")):
        assert losses(mmengine.Distill(student, given))["loss_kd_rkd"].isfinite()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model = dict(", "'.*config.py' can't be read as a config; .*SyntaxError"),
        ("_base_ = 'absent.py'", "can't be read as a config; .*absent.py"),
        ("x = 1", "must have a model, dict.*found None"),
        ("model = 'resnet'", "must have a model, dict.*found 'resnet'"),
        ("model = dict(type='Recognizer')", "teacher.network: Recognizer is not in the"),
        ("model = dict(type='Recogniser', width=6)", "does not fit the network"),
        ("model = dict(type='Recogniser', widht=6)", "teacher.network can't be built.*'widht'"),
    ],
)
def test_a_wrong_config_of_the_teacher_is_refused(
    checkpoint: Path, tmp_path: Path, text: str, match: str
) -> None:
    tmp_path.joinpath("config.py").write_text(text)
    teacher = {"config": tmp_path / "config.py", "checkpoint": checkpoint}
    with pytest.raises(KDHooksError, match=match):
        mmengine.Distill(STUDENT, teacher=teacher, **KD)


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        ({"config": "absent.py", "checkpoint": __file__}, "teacher.config: there is no file"),
        ({"config": __file__}, "teacher.config needs teacher.checkpoint"),
        ({"config": 3, "checkpoint": __file__}, "teacher.config must be a path; found 3"),
        ({"config": __file__, "network": {}}, "exactly one of .*; found network, config"),
        (
            {"network": STUDENT, "checkpoint": "https://example.org/a/b.pth"},
            "'https://example.org/a/b.pth' is a URL; download the file",
        ),
    ],
)
def test_a_wrong_source_is_refused_by_model_and_hook(teacher: dict[str, Any], match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        mmengine.Distill(STUDENT, teacher=teacher, **KD)
    with pytest.raises(KDHooksError, match=match):
        HOOKS.build({"type": "kdhooks.DistillHook", "teacher": teacher, **KD})


def test_other_hosts_refuse_a_teacher_by_mmengine_config() -> None:
    recipe = {"teacher": {"config": __file__, "checkpoint": __file__}, **KD}
    with pytest.raises(KDHooksError, match=r"teacher.config is a config file of MMEngine, and"):
        build(recipe, TinyFaceNet())


def test_numpy_means_are_accepted_as_numbers() -> None:
    given = {"mean": np.float32(0), "std": np.full(3, 255)}
    plain, other = (Seen.of(None).but(said) for said in ({"mean": 0, "std": [255.0] * 3}, given))
    assert plain.mean is not None
    assert plain.mean == other.mean
    assert plain.std is not None
    assert other.std is not None
    assert torch.equal(plain.std, other.std)
