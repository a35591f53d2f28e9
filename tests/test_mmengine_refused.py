"""A wrong config, batch or model is refused, or noticed in the run."""

import gc
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import KDHooksError
from kdhooks.testing import TinyFaceNet

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.config.lazy import LazyObject
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch.distributed.optim import ZeroRedundancyOptimizer

from kdhooks_integrations import mmengine
from kdhooks_integrations.mmengine.registered import _optimise
from tests.mmengine_runs import (
    KD,
    PROJECTED,
    QUIET,
    STUDENT,
    Classifier,
    Recogniser,
    Taught,
    both,
    distilled,
    each_door,
    hook,
    made,
    samples,
    train,
)

pytestmark = QUIET


ROUND = {"type": "ImgDataPreprocessor", "rgb_to_bgr": True}
SCALED = {"type": "ImgDataPreprocessor", "mean": [0.0] * 3, "std": [255.0] * 3}
ROWS = {"module": {"type": "Taught"}, "classifier": torch.randn(6, 12)}
KNOWN = {"teacher": ROWS, "methods": ["kd"]}  # a method that needs labels


@MODELS.register_module()
class Wordy(Recogniser):
    """Raises an error from its options."""

    def __init__(self, words: str | None = None) -> None:
        if words:
            raise ValueError(words)
        raise KeyError("depth") if words is None else KeyError


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"lables": "labels"},
            "no key 'lables'; did you mean 'labels'. the keys are: recipe, teac",
        ),
        ({"methods": ["fdc"]}, "no method 'fdc' is installed; did you mean 'fcd'"),
        ({"recipe": "kd.toml"}, "from a file or from keys; found 'kd.toml' and teacher, methods"),
        ({"teacher": {"module": {"typ": "Taught"}}}, r"teacher.module must be a model's config"),
        ({"teacher": {"module": {"type": "Tought"}}}, r"teacher.module: Tought is not in the"),
        (
            {"teacher": {"network": "r50", "checkpoint": __file__}},
            "is a text file; name a file of tensors",
        ),
        ({"labels": "gt.label"}, "labels = 'gt.label': the student's forward has no argument 'gt'"),
        ({"images": "imgs"}, "no argument 'imgs'; its arguments are: inputs, labels, mode"),
        ({"classifier": "head.wight"}, "no such parameter; did you mean 'head.weight'"),
        ({"teacher": ROWS, "classifier": "backbone.fc.bias"}, r"must be rows \(c d\); found shape"),
        ({"input": {"means": 0}}, "input has no key 'means'; its keys are: mean, std, order"),
        ({"input": {"order": "gbr"}}, "input.order must be 'rgb' or 'bgr'; found 'gbr'"),
        ({"taps": {"student": {"embedding": "bone"}}}, "no submodule 'bone'"),
        ({"input_shape": [3, 48, 48]}, r"must run on images \(2, 3, 48, 48\) alone.*input_shape"),
        ({"student": {"type": "Tutorial"}}, "no child neck or backbone.*its children are: resnet"),
        ({"student": TinyFaceNet()}, "the student must be a BaseModel.*found TinyFaceNet"),
        ({"student": {"type": "Recognizer"}}, "student: Recognizer is not in the"),
        ({"student": "Recogniser"}, "student must be a model's config.*found 'Recogniser'"),
        ({"student": None}, "student must be a model's config, dict.*found None"),
        (
            {"backbone": {}},
            "no key 'backbone'; a model that replaces .* needs _delete_=True.*recipe",
        ),
        ({"images": 3}, "images must be a path like 'inputs'; found 3"),
        (
            {"labels": ["x"]},
            r"labels must be a path like 'data_samples.gt_label', or False if there are none; "
            r"found \['x'\]",
        ),
        ({"classifier": None}, "classifier must be a path like 'head.weight'; found None"),
        ({"classifier": "head"}, "no such parameter; inside of it are: head.weight"),
        (
            {"teacher": {"type": "Taught"}},
            r"found type = 'Taught' in it; write teacher = dict\(network=dict\(type=…\), ch",
        ),
        (
            {"teacher": {"type": Recogniser, "width": 3}},
            "found type = the class Recogniser in it; write teacher = dict",
        ),
        ({"input": {"mean": 10**400}}, "input.mean must be a number, or a list of three"),
        ({"student": {"type": "Wordy"}}, r"student can't be built .*; KeyError: 'depth'$"),
        ({"student": {"type": "Wordy", "words": ""}}, "can't be built from its config; KeyError$"),
        (
            {"student": {"type": "Wordy", "words": "one\ntwo"}},
            r"can't be built from its config; ValueError: one$",
        ),
        ({"input": None}, r"input must be dict\(mean=…, std=…, order=…\); found None"),
        (
            {"input": {"mean": "a"}},
            "input.mean must be a number, or a list of three; f.* 'a'",
        ),
        ({"input": {"mean": [1, 2]}}, r"input.mean must be a number, .* found \[1, 2\]"),
        ({"input": {"std": 0}}, "input.std must be positive; found 0"),
        (
            {"student": {**STUDENT, "data_preprocessor": ROUND}},
            r"student's data_preprocessor reverses the chan.*: input = dict\(order='rgb'\) after",
        ),
        (
            {"teacher": {"module": {**STUDENT, "data_preprocessor": ROUND}}},
            r"teacher's data_preprocessor reverses the chan.*: teacher.input = dict\(order='rgb'",
        ),
    ],
)
def test_a_wrong_model_line_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        MODELS.build(distilled(**changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lables": "labels"}, "no key 'lables'; did you mean 'labels'"),
        ({"methods": ["fdc"]}, "no method 'fdc' is installed"),
        ({"teacher": {"module": {"type": "Tought"}}}, r"teacher.module: Tought is not in the"),
        ({"student": STUDENT}, "no key 'student'; the hook uses the runner's model"),
        (
            {"methods": [LazyObject("a.b", "C")]},
            "must name a method as a string; found the class C",
        ),
        ({"methods": [{"type": "fcd"}]}, "found {'type': 'fcd'}; write name instead of type"),
        ({"methods": "['fcd']"}, "write it without the quotes"),
    ],
)
def test_a_wrong_hook_line_is_refused_when_it_is_read(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        HOOKS.build(hook(**changes))


def test_reversed_channels_need_the_order_of_the_input() -> None:
    seen: list[Tensor] = []

    def teacher(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean(dim=(2, 3)).repeat(1, 4)

    images = torch.rand(4, 3, 32, 32) * 2 - 1
    for order in ("rgb", "bgr"):
        student = {**STUDENT, "data_preprocessor": ROUND}
        model = MODELS.build(distilled(student, teacher=teacher, input={"order": order}))
        model(images, torch.arange(4), mode="loss")
        assert torch.equal(seen[-1], images.flip(1) if order == "bgr" else images)


@pytest.mark.parametrize("source", ["network", "module"])
def test_a_teachers_embedding_is_found_as_the_students_is(tmp_path: Path, source: str) -> None:
    """The logits that a classifier's forward returns are used only if taps ask for them."""
    torch.manual_seed(0)
    trained = Classifier().train()
    trained(torch.randn(8, 3, 32, 32))
    torch.save(trained.state_dict(), tmp_path / "teacher.pth")
    teacher: dict[str, Any] = {
        "network": {"type": "Classifier"},
        "checkpoint": tmp_path / "teacher.pth",
    }
    if source == "module":
        teacher = {"module": trained}
    student = {"type": "Classifier"}
    for taps, dim in (({}, 16), ({"teacher": {"embedding": ""}}, 6)):
        model = MODELS.build(distilled(student, teacher=teacher, taps=taps, methods=["rkd"]))
        found = model.kdhooks.distiller._session(torch.randn(2, 3, 32, 32)).embedding
        assert found.shape == (2, dim)


def test_images_between_0_and_1_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.arange(4)
    for said, images, doubted in (
        ({}, torch.rand(4, 3, 32, 32), True),
        ({"mean": 0, "std": 255}, torch.rand(4, 3, 32, 32), False),
        ({}, torch.rand(4, 3, 32, 32) * 2 - 1, False),
    ):
        caplog.clear()
        MODELS.build(distilled(input=said))(images, labels, mode="loss")
        assert ("are in [0, 1], and are treated as (pixel" in caplog.text) == doubted


@pytest.mark.parametrize(
    ("changes", "batch", "match"),
    [
        ({}, {"inputs": 255.0}, r"found values up to 3\d\d; normalise them in the data_prep"),
        (
            KNOWN,
            {"labels": "x"},
            r"labels must be one class.*inputs: float32 \(24, 3, 32, 32\), labels",
        ),
        (KNOWN, {"labels": 1.5}, "labels must be one class number for each of 24 images"),
        ({"images": "labels"}, {}, r"images must be a floating-point tensor \(b 3 h w\)"),
    ],
)
def test_a_wrong_batch_is_refused(
    changes: dict[str, Any], batch: dict[str, Any], match: str
) -> None:
    model = MODELS.build(distilled(**changes))
    data = samples("dict")
    given: dict[str, Any] = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    for key, value in batch.items():
        given[key] = value if isinstance(value, str) else given[key] * value
    model.head.forward = lambda embedding: embedding[:, :6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", lambda logits, labels: logits.sum())
        with pytest.raises(KDHooksError, match=match):
            model(**given, mode="loss")


def test_pixels_are_accepted_if_the_input_specifies_them() -> None:
    seen: list[Tensor] = []

    def teacher(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean(dim=(2, 3)).repeat(1, 4)

    said = {"mean": 0, "std": 1, "order": "bgr"}
    model = MODELS.build(distilled(teacher=teacher, input=said))
    pixels = torch.rand(4, 3, 32, 32) * 255
    model(pixels, torch.arange(4), mode="loss")
    torch.testing.assert_close(seen[-1], ((pixels - 127.5) / 127.5).flip(1))


def test_losses_must_be_a_dict_without_our_keys() -> None:
    for losses, match in (
        (torch.zeros(()), "must return a dict of losses in mode 'loss'; found Tensor"),
        ({"loss_kd_fcd": torch.zeros(())}, "already have the key 'loss_kd_fcd'"),
    ):

        class Odd(Recogniser):
            def forward(self, inputs: Tensor, labels: Any = None, mode: str = "tensor") -> Any:
                embedding = self.backbone(inputs)
                return losses if mode == "loss" else embedding  # noqa: B023

        model = mmengine.Distill(Odd(), **{**KD, "teacher": Taught()})
        with pytest.raises(KDHooksError, match=match):
            model(torch.rand(4, 3, 32, 32), torch.arange(4), mode="loss")


def test_model_and_hook_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"distilled already; keep kdhooks\.Distill around it"):
        train(tmp_path, model=distilled(), hooks=[hook()])


def test_the_hook_refuses_what_only_the_model_entry_point_can_do(tmp_path: Path) -> None:
    groups = {
        "optimizer": {"type": "SGD", "lr": 0.05},
        "paramwise_cfg": {"custom_keys": {"head": {"lr_mult": 0.1}}},
    }
    train(tmp_path, hooks=[hook()], optim_wrapper=groups)  # this method trains no weights
    with pytest.raises(KDHooksError, match=r"the optimizer has \d+ groups.*type='kdhooks.Distill'"):
        train(tmp_path, hooks=[hook(methods=[PROJECTED])], optim_wrapper=groups)
    parameter = nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.SGD([parameter], lr=0.1))
    with pytest.raises(KDHooksError, match="there is more than one optimizer; use kdhooks"):
        _optimise(OptimWrapperDict(a=wrapper), [parameter])
    wrapper.optimizer = object.__new__(ZeroRedundancyOptimizer)
    with pytest.raises(KDHooksError, match="has already distributed its parameters; use kdh"):
        _optimise(wrapper, [parameter])
    wrapped = SimpleNamespace(model=nn.DataParallel(Recogniser()), optim_wrapper=wrapper)
    with pytest.raises(KDHooksError, match="the model is wrapped in DataParallel; use kdhooks"):
        HOOKS.build(hook(methods=[PROJECTED])).before_run(wrapped)


def test_a_train_step_that_does_not_call_the_model_is_noticed(tmp_path: Path) -> None:
    class Aside(Recogniser):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            loss = self.backbone(data["inputs"]).sum()
            optim_wrapper.update_params(loss)
            return {"loss": loss.detach()}

    with pytest.raises(KDHooksError, match="in MMEngine, train_step must call the model itself"):
        by_door(made(tmp_path), Aside(), "hook").train()


class OwnMode(Recogniser):
    """Its train_step calls the mode of the losses 'train'."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        return super().forward(inputs, labels, "loss" if mode == "train" else mode)

    def _run_forward(self, data: Any, mode: str) -> Any:
        return super()._run_forward(data, "train" if mode == "loss" else mode)


class Past(Recogniser):
    """Computes its losses by forward, without __call__ and so without hooks."""

    def _run_forward(self, data: Any, mode: str) -> Any:
        return self.forward(**data, mode=mode)


class Frozen(Recogniser):
    """Trained in evaluation mode."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(False)
        return self


class Choosy(Recogniser):
    """Trains only the loss that it knows by name."""

    def parse_losses(self, losses: dict[str, Tensor]) -> Any:
        return losses["loss_cls"], {"loss": losses["loss_cls"]}


def by_door(runner: Any, student: nn.Module, door: str, **table: Any) -> Any:
    """Return the runner with a student that is in no registry."""
    runner.model = student
    if door == "model":
        runner.model = mmengine.Distill(student, **{**KD, **table})
    else:
        runner.register_hook(mmengine.DistillHook(**{**KD, **table}))
    return runner


@each_door
@pytest.mark.parametrize(
    ("student", "match"),
    [
        (
            OwnMode,
            "kd has computed no term; .* train_step must call .*in training mode and with mo",
        ),
        (Past, "optimizer stepped, and kd has computed no term"),
        (Frozen, "optimizer stepped, and kd has computed no term"),
        (Choosy, "optimizer stepped without fcd: .* parse_losses must train the sum of all keys"),
    ],
)
def test_a_run_without_the_terms_is_noticed(
    tmp_path: Path, door: str, student: type[nn.Module], match: str
) -> None:
    with pytest.raises(KDHooksError, match=match):
        by_door(made(tmp_path), student(), door).train()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class Parts:
    """Passes the parts of the model that it knows to one optimizer, or to one each."""

    def __init__(self, optim_wrapper_cfg: Any, paramwise_cfg: Any = None) -> None:
        self.several, self.also = optim_wrapper_cfg["several"], optim_wrapper_cfg["also"]

    def __call__(self, model: Any) -> Any:
        names = ("backbone", "head", *self.also)
        parts = {name: list(getattr(model, name).parameters()) for name in names}
        if not self.several:
            parts = {"all": [p for part in parts.values() for p in part]}
        wrappers = {k: OptimWrapper(torch.optim.SGD(v, lr=0.05)) for k, v in parts.items()}
        return OptimWrapperDict(**wrappers) if self.several else wrappers["all"]


class InTurn(Recogniser):
    """Steps several optimizers in turn."""

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        loss, log = self.parse_losses(self(**data, mode="loss"))
        for wrapper in optim_wrapper.values():
            wrapper.zero_grad()
        loss.backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
        return log


@pytest.mark.parametrize("several", [False, True])
def test_methods_that_no_optimizer_trains_are_noticed(tmp_path: Path, several: bool) -> None:
    def run(also: list[str]) -> None:
        wrapper = {"constructor": "Parts", "several": several, "also": also}
        runner = made(tmp_path, optim_wrapper=wrapper, param_scheduler=None)
        student = (InTurn if several else Recogniser)()
        by_door(runner, student, "model", methods=[PROJECTED]).train()

    with pytest.raises(KDHooksError, match=r"no optimizer: losses\.fcd\.projector\.weight; add kd"):
        run([])
    run(["kdhooks"])


def test_the_optimizer_guard_is_removed_with_the_model(tmp_path: Path) -> None:
    gc.collect()
    hooks = import_module("torch.optim.optimizer")._global_optimizer_pre_hooks
    before = len(hooks)
    train(tmp_path, **both("model"))
    gc.collect()
    assert len(hooks) == before
