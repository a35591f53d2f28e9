"""What students learn from: images, labels, and the recorded outputs of teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdhooks.teacher.class_means import class_means
from kdhooks.teacher.teacher import Teacher
from kdhooks_demo.embedding import CHUNK


@dataclass(frozen=True)
class Maps:
    """A teacher's features at one stage, of n images: rows (n) of a file's (m k h w)."""

    file: Path  # .npy, float16
    rows: NDArray[np.int64]

    def opened(self) -> NDArray[np.float16]:
        """(m k h w), which is read from the file when it is indexed."""
        stored: NDArray[np.float16] = np.load(self.file, mmap_mode="r")
        return stored


@dataclass(frozen=True)
class Lesson:
    """The material of all students. The teacher has embedded every image once."""

    images: Tensor  # (n 3 112 112) uint8
    labels: Tensor  # (n)
    embedding: Tensor  # (n e), the teacher's
    rows: Tensor  # (c e), the class means of these
    parts: Mapping[str, Tensor]  # name -> rows of the n, for a Row with fewer images
    maps: Mapping[str, Maps] = field(default_factory=dict)
    teacher: nn.Module | None = None  # for rows whose teacher is live
    teacher_stages: Sequence[str] = ()  # stages of that network, or those that were recorded
    teachers: int = 1  # their embeddings and rows of equal widths are concatenated

    def to(self, device: torch.device) -> "Lesson":
        """Copy everything that a step reads to the device of the training.

        The class means stay on the processor: each method takes its own copy of them.
        """
        images, labels = self.images.to(device), self.labels.to(device)
        return replace(self, images=images, labels=labels, embedding=self.embedding.to(device))


def means_of(embedding: Tensor, labels: Tensor) -> Tensor:
    """(n e), (n) -> (c e): the class means of recorded embeddings of a teacher."""
    known = Teacher(lambda images: embedding)  # it ignores the images
    batches = [(torch.zeros(len(labels), 3, 1, 1), labels)]
    return class_means(known, batches, int(labels.max()) + 1, flip=False)


class Remembered(nn.Module):
    """A teacher whose outputs are recorded. `rows` are the numbers of the images of the next call.

    The rows lie on the device of the embeddings, and the outputs on that of the images.
    """

    def __init__(self, embedding: Tensor, maps: Mapping[str, Maps]) -> None:
        super().__init__()
        self.embedding = embedding
        self.rows = torch.arange(2, device=embedding.device)
        self.stages = nn.ModuleDict({name: RememberedStage(stage) for name, stage in maps.items()})

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        for stage in self.stages.values():
            stage(self.rows, images.device)
        return self.embedding[self.rows].to(images.device)

    def keep(self, paths: set[str]) -> None:
        """Drop the stages that no method taps; load the others onto a GPU with enough memory."""
        for name, stage in list(self.stages.items()):
            if f"stages.{name}" not in paths:
                del self.stages[name]
            elif isinstance(stage, RememberedStage) and _fits(stage.size, self.embedding.device):
                stage.load(self.embedding.device)


class RememberedStage(nn.Module):
    def __init__(self, maps: Maps) -> None:
        super().__init__()
        self._stored, self._rows = maps.opened(), maps.rows
        self._loaded: Tensor | None = None  # (n k h w) float16

    @property
    def size(self) -> int:
        """The size of all features, in bytes."""
        return len(self._rows) * int(self._stored[0].nbytes)

    def load(self, device: torch.device) -> None:
        """Load all features into the memory of the device."""
        shape = (len(self._rows), *self._stored.shape[1:])
        self._loaded = torch.empty(shape, dtype=torch.float16, device=device)
        for start in range(0, len(self._rows), CHUNK):
            some = torch.from_numpy(self._stored[self._rows[start : start + CHUNK]])
            self._loaded[start : start + len(some)] = some.to(device)

    def forward(self, rows: Tensor, device: torch.device) -> Tensor:
        """(b) -> (b k h w)."""
        if self._loaded is not None:
            return self._loaded[rows].to(device).float()
        found = torch.from_numpy(self._stored[self._rows[rows.cpu().numpy()]])
        return found.to(device).float()


def _fits(size: int, device: torch.device) -> bool:
    """Whether the bytes fit into half of a GPU's free memory. Otherwise the files are read."""
    return device.type == "cuda" and 2 * size <= torch.cuda.mem_get_info(device)[0]
