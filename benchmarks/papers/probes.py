"""Tests whose probes have lower quality than the gallery: faces with few pixels, or masked."""

import torch
from torch import Tensor, nn

from kdhooks.teacher.several import Teachers
from kdhooks.teacher.teacher import Teacher
from kdhooks.verification import pair_scores, tar_at_far, verify
from kdhooks.views.viewing import viewed
from kdhooks_demo.embedding import CHUNK, as_input
from kdhooks_demo.exam import FARS, Exam
from kdhooks_demo.pairs import Split
from kdhooks_plugins.batch_norm import adapted_batch_norm

SHARE = 0.5  # the share of the test's statistics in adapted batch norms


class ProbeExam(Exam):
    """`score` compares probes with probes, `more` other pairs; the teacher sees the images."""

    def __init__(
        self, split: Split, teacher: Teacher | Teachers, device: torch.device, view: nn.Module
    ) -> None:
        super().__init__(split, teacher, device, probes_of(split.test.images, view))

    def more(self, student: nn.Module) -> dict[str, float]:
        """
        mixed, mixed2: accuracy, and TAR at FAR 0.01, of a pair's first image as it is against the
            probe of the second one, both by the student.
        adapted2: the TAR of probes against probes, with batch norms that know the probes.
        """
        sharp, probes = (self._embedded(student, some) for some in (self._sharp, self._probes))
        own, every = (pair_scores(sharp, rows, probes) for rows in (self._pairs, self._all))
        batches = (as_input(some.to(self._device)) for some in self._probes.split(CHUNK))
        adapted = self._embedded(adapted_batch_norm(student, batches, SHARE), self._probes)
        return {
            "mixed": verify(own, self._same, self._folds, ()).accuracy,
            "mixed2": tar_at_far(every, self._all_same, FARS[0]),
            "adapted2": tar_at_far(pair_scores(adapted, self._all), self._all_same, FARS[0]),
        }


def probes_of(images: Tensor, view: nn.Module) -> Tensor:
    """(n 3 h w) uint8 -> (n 3 h w) uint8: the view of each image, equal in each call."""
    parts = [
        viewed(view, as_input(some), first=number * CHUNK)
        for number, some in enumerate(images.split(CHUNK))
    ]
    return (torch.cat(parts) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
