"""Teachers that count their images, views to embed, and folders with cached embeddings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdhooks import Teacher
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.cache_files import Parts
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import tiny_teacher

SHAPE = (3, 32, 32)
Log = pytest.LogCaptureFixture


class Counting(nn.Module):
    """A teacher that records the number of images of each call."""

    def __init__(self, dim: int = 12, gain: float = 1.0) -> None:
        super().__init__()
        module = tiny_teacher(dim).module
        assert module is not None
        self.inner, self.calls = module, list[int]()
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        embedding: Tensor = self.inner(images) * self.gain
        return embedding


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def started(
    folder: Path, module: nn.Module | Callable[[Tensor], Tensor] | None = None, **options: Any
) -> TeacherSession:
    bound = options.pop("max_gb", None)
    teacher = Teacher(
        module or Counting(), cache=CacheOptions(path=folder, max_gb=bound), **options
    )
    return TeacherSession(teacher, like=torch.zeros(1, *SHAPE))


def counts(session: TeacherSession) -> list[int]:
    """Return the number of images of each call since the last count."""
    module = session.teacher.module
    assert isinstance(module, Counting)
    calls, module.calls = module.calls, []
    return calls


def views(start: int, stop: int) -> Tensor:
    """Return distinct images; the same numbers always select the same images."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (64, *SHAPE), generator=generator)[start:stop]
    return (pixels.float() - 127.5) / 127.5


def stored(folder: Path) -> int:
    return sum(len(keys) for _, _, keys in Parts(folder, 12).read_on())


def filled(folder: Path, stop: int = 8) -> Tensor:
    """Cache the first views in a folder; return their embeddings."""
    teacher = started(folder)
    embedding = teacher(views(0, stop)).embedding
    teacher.close()
    return embedding
