"""Embeds the images of a test set, and their mirror images, with several models at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdhooks.errors import KDHooksError, in_one_line
from kdhooks.evaluation.pair_sets import PairSet
from kdhooks.pictures import Pixels
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.sessions import TeacherSessions, open_session
from kdhooks.verification import Floats
from kdhooks.views.viewing import Viewing
from kdhooks_integrations.arcface_torch.commands.models import Model
from kdhooks_integrations.arcface_torch.commands.pictures import as_input, read_batches

SUBJECT = "evaluate: --data"

Progress = Callable[[int, int], None]
"""A function that is called with the number of embedded images and the number of all images."""


class Looks(NamedTuple):
    """The m images of a set that the models embed: first unchanged ones, then those of the view."""

    images: NDArray[np.int64]  # (m): their positions in the set
    sharp: int  # the number of images without the view
    rows: NDArray[np.int64]  # (p 2): positions in `images` of each pair


@dataclass
class Embedded:
    """The embeddings of a set by one model."""

    upright: list[Floats] = field(default_factory=list)  # (b d) for each batch
    flipped: list[Floats] = field(default_factory=list)  # those of the mirror images, if wanted


@dataclass(frozen=True)
class Embedder:
    """Reads and embeds the images of all sets."""

    shape: tuple[int, int, int]
    device: torch.device
    batch: int
    flip: bool
    view: Viewing | None
    scaled: Callable[[Sequence[Pixels]], Tensor] = as_input
    whole_batches: bool = False  # the last of several batches overlaps, to be of the same size

    def embed(
        self, models: Sequence[Model], tested: PairSet, progress: Progress
    ) -> tuple[Looks, list[Embedded]]:
        looks = looks_at(tested, viewed=self.view is not None)
        found = [Embedded() for _ in models]
        done = 0
        with ExitStack() as opened:
            sessions: list[TeacherSession | TeacherSessions] = []
            for model in models:
                session = open_session(model.teacher)
                opened.callback(session.close)
                sessions.append(session)
            for images, old in self._batches(tested, looks):
                for model, session, kept in zip(models, sessions, found, strict=True):
                    with _named(model, self.shape):
                        kept.upright.append(_numbers(session(images).embedding[old:]))
                        if self.flip:
                            kept.flipped.append(_numbers(session(images.flip(-1)).embedding[old:]))
                done += len(images) - old
                progress(done, len(looks.images))
        return looks, found

    def _batches(self, tested: PairSet, looks: Looks) -> Iterator[tuple[Tensor, int]]:
        """Yield images (b 3 h w), and the number of those that were in the previous batch."""
        parts = (looks.images[: looks.sharp], None), (looks.images[looks.sharp :], self.view)
        for part, view in parts:
            starts = list(range(0, len(part), self.batch))
            if self.whole_batches and len(starts) > 1:
                starts[-1] = len(part) - self.batch
            order = [place for start in starts for place in part[start : start + self.batch]]
            names = [tested.images[int(place)] for place in order]
            end = 0
            # The reader must be read to its end, where it reports the pictures that it skipped.
            read = (
                read_batches(tested.files, names, self.batch, self.shape, SUBJECT) if names else []
            )
            for number, pictures in enumerate(read):
                start = starts[number]
                images = self.scaled(pictures).to(self.device)
                yield images if view is None else view(images, first=start), end - start
                end = start + len(images)


def looks_at(tested: PairSet, viewed: bool) -> Looks:
    """Select the images that occur in pairs.

    viewed: whether the models see the second image of each pair through a view.
    """
    if not viewed:
        count = len(tested.images)
        return Looks(np.arange(count), count, tested.rows)
    first, at_first = np.unique(tested.rows[:, 0], return_inverse=True)
    second, at_second = np.unique(tested.rows[:, 1], return_inverse=True)
    rows = np.stack([at_first, len(first) + at_second], axis=1)
    return Looks(np.concatenate([first, second]), len(first), rows)


def _numbers(embedding: Tensor) -> Floats:
    return embedding.double().cpu().numpy()


@contextmanager
def _named(model: Model, shape: tuple[int, int, int]) -> Iterator[None]:
    try:
        yield
    except KDHooksError as error:
        raise KDHooksError(f"evaluate: model '{model.name}': {error}") from error
    except RuntimeError as error:  # the input shape is wrong, or memory is short
        raise KDHooksError(
            f"evaluate: model '{model.name}' must embed images {shape}; found "
            f"{in_one_line(error)}; specify --recipe with the input_shape of its training, or a "
            "smaller --batch-size"
        ) from error
