"""A batch that does not fit into the GPU's memory is halved."""

import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Teacher
from kdhooks.teacher.session import TeacherSession
from tests.second_device import in_a_process, needs_cuda

pytestmark = [pytest.mark.gpu, needs_cuda]
DIM = 12


@pytest.fixture
def own_process() -> Iterator[ProcessPoolExecutor]:
    """A process for a single test, since some settings affect the whole process."""
    with in_a_process("cuda") as pool:
        yield pool


class Wide(nn.Module):
    """Needs memory for 2 · `width` numbers per image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 * 32 * 32, width), nn.Linear(width, DIM)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 32 32) -> (b e)."""
        embedding: Tensor = self.last(self.first(images.flatten(1)).relu())
        return embedding


class ShortOfMemory(NamedTuple):
    found: Tensor
    expected: Tensor
    messages: list[str]
    refused: bool  # whether the batch as a whole did not fit


@contextmanager
def only_so_much_more(size: int) -> Iterator[None]:
    """Inside, this process can allocate only `size` more bytes of GPU memory."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def short_of_memory(device: str, b: int, width: int, limit: int | None) -> ShortOfMemory:
    torch.manual_seed(0)
    wide, images, messages = Wide(width), torch.rand(b, 3, 32, 32).to(device), Messages()
    expected = TeacherSession(Teacher(wide))(images).embedding
    log = logging.getLogger("kdhooks")
    log.addHandler(messages)
    try:
        if limit is None:
            return ShortOfMemory(
                TeacherSession(Teacher(wide))(images).embedding.cpu(), expected.cpu(), [], False
            )
        with only_so_much_more(limit):
            refused = False
            try:
                TeacherSession(Teacher(wide))._forward_once(images)
            except torch.OutOfMemoryError:
                refused = True
            found = TeacherSession(Teacher(wide))(images).embedding
        return ShortOfMemory(found.cpu(), expected.cpu(), messages.found, refused)
    finally:
        log.removeHandler(messages)


def test_a_batch_that_does_not_fit_into_memory_is_halved(own_process: ProcessPoolExecutor) -> None:
    """Besides the weights, the batch takes 512 MiB and half of it 256 MiB."""
    batch = ("cuda", 4096, 1 << 14)
    ended = own_process.submit(short_of_memory, *batch, limit=384 << 20).result()
    assert ended.refused
    assert len(ended.messages) == 1
    assert "no memory for 4096 images at once; it sees 2048 at a time" in ended.messages[0]
    assert_close(ended.found, ended.expected, rtol=1e-4, atol=1e-5)
    roomy = own_process.submit(short_of_memory, *batch, limit=640 << 20).result()
    assert not roomy.refused
    assert not roomy.messages
