"""Write a trainer's folder with `backbones`, configs and a teacher, as the commands expect it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.recordio_files import people
from tests.standin import backbones

CLASSES, WIDTH = 6, 16
BACKBONES = """
from torch import nn
from tests.standin import backbones

CLASSES = 6

def get_model(name, dropout, fp16, num_features):
    if name == "needs_timm":
        raise ModuleNotFoundError("No module named 'timm'", name="timm")
    model = backbones.get_model(name, dropout, fp16, num_features)
    if name != "plain":
        model.conv1 = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)  # for 112 pixels
    return model

def blocks():
    return nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.ReLU(inplace=True), nn.Flatten())

def no_network():
    return 1

def broken():
    raise ValueError("no such width")

def own(num_features=16):
    return get_model("tiny", 0.0, False, num_features)

def teacher():
    return get_model("tiny", 0.0, False, 16)
"""
GET_CONFIG = """
from importlib import import_module

def get_config(config_file):
    assert config_file.startswith("configs/")
    config = import_module("configs.base").config
    config.update(import_module("configs." + config_file[8:].removesuffix(".py")).config)
    return config
"""
BASE: dict[str, Any] = {
    "margin_list": (1.0, 0.5, 0.0), "network": "tiny", "embedding_size": 512, "sample_rate": 1,
    "interclass_filtering_threshold": 0, "fp16": False, "batch_size": 128, "optimizer": "sgd",
    "lr": 0.1, "weight_decay": 5e-4, "gradient_acc": 1, "resume": False, "output": "base",
}  # fmt: skip


def write_trainer(folder: Path) -> Path:
    (folder / "backbones.py").write_text(BACKBONES)
    (folder / "utils").mkdir()
    (folder / "utils" / "utils_config.py").write_text(GET_CONFIG)
    write_config(folder, "base", **BASE)
    return folder


def write_config(folder: Path, name: str, below: str = "", **values: object) -> None:
    """Write configs/NAME.py with these values, and lines below them."""
    (folder / "configs").mkdir(exist_ok=True)
    text = f"config = {values!r}\n{below}\n"
    (folder / "configs" / f"{name}.py").write_text(text, encoding="utf-8")


@contextmanager
def imports_undone() -> Iterator[None]:
    """Restore the import path, and forget the trainer's modules."""
    path = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        invalidate_caches()  # a test may write a file within the same second
        for name in list(sys.modules):
            if name.split(".")[0] in ("backbones", "configs", "utils"):
                del sys.modules[name]


def faces() -> tuple[Tensor, Tensor]:
    """(b 3 112 112) in [-1, 1], (b)."""
    pixels, labels = zip(*people(CLASSES, 4), strict=True)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().contiguous()
    return (images - 127.5) / 127.5, torch.tensor(labels)


def settled(network: str = "tiny") -> nn.Module:
    """Return a network with random weights and the faces' statistics, which the checks accept."""
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = backbones.get_model(network, 0.0, False, WIDTH)
        model.conv1 = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(faces()[0])
    return model.eval()


def write_teacher(folder: Path) -> None:
    """Write model.pt, and rows.pt with the class means of the faces."""
    teacher = settled()
    images, labels = faces()
    with torch.no_grad():
        embedding = F.normalize(teacher(images))
    rows = torch.stack([embedding[labels == label].mean(0) for label in range(CLASSES)])
    torch.save(teacher.state_dict(), folder / "model.pt")
    torch.save(rows, folder / "rows.pt")
