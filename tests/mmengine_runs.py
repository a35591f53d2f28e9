"""Models, data and configs as MMEngine's users write them, without kdhooks, and their runs."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel, BaseModule
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import FlexibleRunner, Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from kdhooks.testing import TinyFaceNet, tiny_batch
from tests.small_distiller import teacher_network

RUNNERS: dict[str, Any] = {"Runner": Runner, "FlexibleRunner": FlexibleRunner}
DOORS = ("model", "hook")
each_door = pytest.mark.parametrize("door", DOORS)
each_runner = pytest.mark.parametrize("kind", RUNNERS)
QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from mmengine, with new torch
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning"),
]
_numbers = itertools.count()


class Flat(nn.Module):
    """A network without batch statistics, so that two ranks can equal one process."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 8, stride=8), nn.Linear(64, 12)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 32 32) -> (b 12)."""
        embedding: Tensor = self.fc(self.conv(images).relu().flatten(1))
        return embedding


@MODELS.register_module()
class Recogniser(BaseModel):  # type: ignore[misc]  # mmengine has no types
    def __init__(
        self, flat: bool = False, width: int = 4, seed: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        with torch.random.fork_rng([], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.backbone: nn.Module = Flat() if flat else TinyFaceNet(width=width)
            self.head = nn.Linear(12, 6, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor"
    ) -> Any:
        embedding = self.backbone(inputs)
        if mode == "loss":
            return {"loss_cls": F.cross_entropy(self.head(embedding), labels)}  # type: ignore[arg-type]
        return list(embedding) if mode == "predict" else embedding


class _LastStage(BaseModule):  # type: ignore[misc]
    """A backbone that returns a tuple of stages, as mmpretrain's do."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 4, 8, 12, 16)
        for number, (k, out) in enumerate(itertools.pairwise(widths), 1):
            conv = nn.Conv2d(k, out, 3, stride=2, padding=1)
            self.add_module(f"layer{number}", nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return (x,)


class _Pool(nn.Module):
    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.mean(dim=(2, 3)) for x in inputs)


class _LinearHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 6)


@MODELS.register_module()
class Classifier(BaseModel):  # type: ignore[misc]
    """A model built like mmpretrain's, with img_backbone, neck, head and data samples."""

    def __init__(self, data_preprocessor: Any = None) -> None:
        super().__init__(data_preprocessor)
        self.img_backbone, self.neck, self.head = _LastStage(), _Pool(), _LinearHead()

    def forward(
        self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = "tensor"
    ) -> Any:
        logits = self.head.fc(self.neck(self.img_backbone(inputs))[-1])
        if mode == "loss":
            assert data_samples is not None
            labels = torch.cat([sample.gt_label for sample in data_samples])
            return {"loss": F.cross_entropy(logits, labels)}
        return logits


@MODELS.register_module()
class Tutorial(BaseModel):  # type: ignore[misc]
    """A model as in MMEngine's tutorial: no default arguments, and only these two modes."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = TinyFaceNet()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, imgs: Tensor, labels: Tensor, mode: str
    ) -> Any:
        if mode == "loss":
            return {"loss": F.cross_entropy(self.resnet(imgs), labels)}
        if mode == "predict":
            return self.resnet(imgs), labels
        return None


def Taught() -> nn.Module:
    """Return a teacher with BatchNorm statistics."""
    return teacher_network()


MODELS.register_module("Taught", module=Taught)  # pyright: ignore[reportArgumentType]


def trained_teacher() -> nn.Module:
    model = Recogniser(width=6)
    model.backbone = Taught()
    return model


def _element(number: int, label: Tensor) -> BaseDataElement:
    """Return a data sample as mmpretrain packs it, with BaseDataset's index and the label."""
    return BaseDataElement(metainfo={"sample_idx": number}, gt_label=label.reshape(1))


def samples(kind: str) -> list[Any]:
    images, labels = tiny_batch(copies=4)
    if kind == "tuple":
        return list(zip(images, labels, strict=True))
    if kind == "sample":
        pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round()
        return [
            {"inputs": image, "data_samples": _element(number, label)}
            for number, (image, label) in enumerate(zip(pixels, labels, strict=True))
        ]
    return [{"inputs": i, "labels": label} for i, label in zip(images, labels, strict=True)]


def Samples(kind: str = "dict") -> list[Any]:
    return samples(kind)


DATASETS.register_module("Samples", module=Samples)  # pyright: ignore[reportArgumentType]


@HOOKS.register_module()
class Spy(Hook):  # type: ignore[misc]
    """Records the outputs of each step; raises before the step `kill`."""

    def __init__(self, kill: int = -1) -> None:
        self.kill = kill
        self.logs: list[dict[str, float]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.kill:
            raise InterruptedError

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.logs.append({key: value.item() for key, value in outputs.items()})


@OPTIM_WRAPPERS.register_module()
class CPUAmp(AmpOptimWrapper):  # type: ignore[misc]
    """AmpOptimWrapper on a CPU; MMEngine's requires an accelerator."""

    def __init__(self, **options: Any) -> None:
        OptimWrapper.__init__(self, **options)
        self.cast_dtype = torch.bfloat16
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


@dataclass
class Run:
    runner: Any
    logs: list[dict[str, float]]

    def __getitem__(self, key: str) -> list[float]:
        return [log[key] for log in self.logs]

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.runner.model
        return getattr(model, "module", model)

    @property
    def state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.model.state_dict().items()}


FCD: dict[str, Any] = {"name": "fcd", "weight": 8.0}
PROJECTED = {**FCD, "projector": True}
SCHEDULED = {**PROJECTED, "weight": {"value": 8.0, "start": 1, "warmup": 3}}
KD: dict[str, Any] = {
    "teacher": {"module": {"type": "Taught"}},
    "methods": [FCD],
    "input_shape": [3, 32, 32],
}
STUDENT: dict[str, Any] = {"type": "Recogniser"}


def distilled(student: dict[str, Any] = STUDENT, **changes: Any) -> dict[str, Any]:
    return {"type": "kdhooks.Distill", "student": student, **KD, **changes}


def hook(**changes: Any) -> dict[str, Any]:
    return {"type": "kdhooks.DistillHook", **KD, **changes}


def both(door: str, **changes: Any) -> dict[str, Any]:
    """Return the same distillation, by a model or by a hook."""
    student = changes.pop("student", STUDENT)
    if door == "model":
        return {"model": distilled(student, **changes)}
    return {"model": student, "hooks": [hook(**changes)]}


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return two epochs of three steps; changes replace whole keys, except data, kill and hooks."""
    kind, kill = changes.pop("data", "dict"), changes.pop("kill", -1)
    hooks = changes.pop("hooks", [])
    collate = "pseudo_collate" if kind == "sample" else "default_collate"
    return {
        "model": STUDENT,
        "work_dir": str(folder),
        "experiment_name": f"run{next(_numbers)}",
        "train_dataloader": {
            "dataset": {"type": "Samples", "kind": kind},
            "batch_size": 8,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "collate_fn": {"type": collate},
        },
        "train_cfg": {"by_epoch": True, "max_epochs": 2},
        "optim_wrapper": {
            "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9},
            "clip_grad": {"max_norm": 5.0},
        },
        "param_scheduler": [{"type": "LinearLR", "start_factor": 0.1, "end": 4, "by_epoch": False}],
        "default_hooks": {"logger": {"type": "LoggerHook", "interval": 1}},
        "custom_hooks": [*hooks, {"type": "Spy", "kill": kill}],
        "env_cfg": {"dist_cfg": {"backend": "gloo"}},
        "randomness": {"seed": 0},
        "log_level": "WARNING",
        "default_scope": "mmengine",
        **changes,
    }


def made(folder: Path, kind: str = "Runner", **changes: Any) -> Any:
    # MMEngine formats a config with yapf by default, in half the time of such a short run.
    cfg = Config(config(folder, **changes), format_python_code=False)
    return RUNNERS[kind].from_cfg(cfg)


def train(folder: Path, kind: str = "Runner", **changes: Any) -> Run:
    runner = made(folder, kind, **changes)
    runner.train()
    (spy,) = (one for one in runner.hooks if isinstance(one, Spy))
    return Run(runner, spy.logs)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def students(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("kdhooks.")}


def saved(folder: Path, name: str = "epoch_2.pth") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / name, weights_only=False)
    return content
