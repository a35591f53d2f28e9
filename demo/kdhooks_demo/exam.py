"""Tests students on people whom none of them saw in training."""

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdhooks.teacher.sessions import open_session
from kdhooks.teacher.several import Teachers
from kdhooks.teacher.teacher import Teacher
from kdhooks.verification import Floats, flip_summed, pair_scores, roc, tar_at_far, unit, verify
from kdhooks_demo.embedding import as_input, embed
from kdhooks_demo.pairs import Split
from kdhooks_demo.report import Score
from kdhooks_demo.training import Trained

FARS = (1e-2, 1e-3)
TEACHER_CHUNK = 8  # images; larger batches are slower on a processor
TEACHER_CHUNK_CUDA = 256
CPU = torch.device("cpu")
MOST = 2_000_000  # pairs for a TAR


def teacher_chunk(device: torch.device) -> int:
    """The number of images in one call of the teacher."""
    return TEACHER_CHUNK if device.type == "cpu" else TEACHER_CHUNK_CUDA


class Exam:
    """The images of the test, which the teacher has embedded once.

    Accuracy and EER are of the split's pairs, with as many of a kind; TAR, which needs many pairs
    of different people, and the ROC are of all pairs of the test's images.
    """

    def __init__(
        self,
        split: Split,
        teacher: Teacher | Teachers,
        device: torch.device = CPU,
        probes: Tensor | None = None,
    ) -> None:
        """
        device: the one on which the teacher and the students run.
        probes: what the students see in place of the test's images (n 3 112 112).
        """
        self._device = device
        self._sharp = split.test.images
        self._probes = self._sharp if probes is None else probes
        self._same = split.pairs.same
        self._folds = split.pairs.folds
        self._pairs = split.pairs.rows(split.test.names)
        self._all = _all_pairs(len(split.test))
        people = split.test.people
        self._all_same = people[self._all[:, 0]] == people[self._all[:, 1]]
        started = time.perf_counter()
        with open_session(teacher, like=as_input(self._sharp[:1]).to(device)) as session:
            self._teacher = self._embedded(
                lambda images: session(images).embedding, self._sharp, teacher_chunk(device)
            )
        self.teachers_score = self._score(self._teacher, time.perf_counter() - started)

    def score(self, trained: Trained) -> Score:
        embedded = self._embedded(trained.student, self._probes)
        return self._score(embedded, trained.seconds, trained.losses, trained.cosines)

    def glance(self, student: nn.Module) -> dict[str, float]:
        """Accuracy and TAR at FAR 0.01 from the upright images alone, at half the cost."""
        embedded = unit(embed(student, self._probes, device=self._device))
        own = pair_scores(embedded, self._pairs)
        every = pair_scores(embedded, self._all)
        return {
            "accuracy": verify(own, self._same, self._folds, ()).accuracy,
            "tar2": tar_at_far(every, self._all_same, FARS[0]),
        }

    def _embedded(
        self, model: Callable[[Tensor], Tensor], images: Tensor, chunk: int = 128
    ) -> Floats:
        """(n 3 112 112) -> (n d): of each image and its mirror image together."""
        upright = embed(model, images, chunk, self._device)
        return flip_summed(upright, embed(model, images.flip(-1), chunk, self._device))

    def _score(
        self,
        embedded: Floats,
        seconds: float,
        losses: list[float] | None = None,
        cosines: list[float] | None = None,
    ) -> Score:
        every = pair_scores(embedded, self._all)
        own = pair_scores(embedded, self._pairs)
        cross = pair_scores(self._teacher, self._pairs, embedded)
        return Score(
            pairs=verify(own, self._same, self._folds, ()),
            cross=verify(cross, self._same, self._folds, ()),
            tar={far: tar_at_far(every, self._all_same, far) for far in FARS},
            roc=roc(every, self._all_same),
            seconds=seconds,
            losses=losses or (),
            cosines=cosines or (),
        )


def _all_pairs(images: int) -> NDArray[np.int64]:
    """(p 2), each pair once; a sample of them if they are too many."""
    rows = np.stack(np.triu_indices(images, 1), axis=1)
    if len(rows) > MOST:
        rows = rows[np.random.default_rng(0).permutation(len(rows))[:MOST]]
    return rows
