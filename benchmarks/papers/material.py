"""The images that every student learns from, and the teacher's recorded outputs for them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.papers.locks import locked
from benchmarks.papers.views import drawn
from kdhooks.classes.joined import joined
from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pairs import Pairs
from kdhooks.teacher.fingerprints import weights_of
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.teacher import Teacher
from kdhooks_demo.embedding import as_input
from kdhooks_demo.exam import teacher_chunk
from kdhooks_demo.faces import Faces
from kdhooks_demo.lesson import Lesson, Maps, means_of

MOST = 20  # images of a person
PLAIN = "plain views"  # the names of parts of a lesson
PLAIN_KINDS = ("plain", "mirror")
SEVERAL = "people with several images"


@dataclass(frozen=True)
class Images:
    """The choice of training images, and of their views; see `benchmarks.papers.views`."""

    kinds: tuple[str, ...]
    single: bool = True  # also use people with one image

    def views(self, faces: Faces) -> Faces:
        """(n) -> (m): the first images of each person, at most MOST, in all views."""
        kept = chosen(faces, self.single)
        people = len(set(kept.people))
        if people < 2:
            raise KDHooksError(
                "faces: at least two people with several images must be in none of the pairs, to "
                f"train on; found {people}; add images, or name fewer people in the pairs"
            )
        return drawn(kept, self.kinds)

    def parts(self, views: Faces) -> dict[str, Tensor]:
        """The parts of a lesson that a row may be taught by."""
        kinds = np.tile(self.kinds, len(views) // len(self.kinds))
        images = Counter(views.people)
        several = np.array([images[person] > len(self.kinds) for person in views.people])
        flags = {PLAIN: np.isin(kinds, PLAIN_KINDS), SEVERAL: several}
        return {name: torch.from_numpy(np.flatnonzero(flag)) for name, flag in flags.items()}


def chosen(faces: Faces, single: bool) -> Faces:
    """Return the first images of each person, at most MOST.

    single: keep people with one image too.
    """
    images: Counter[str] = Counter()
    number = []
    for person in faces.people:
        number.append(images[person])
        images[person] += 1
    pairs = zip(faces.people, number, strict=True)
    least = 0 if single else 1
    return faces.where(np.array([images[person] > least and n < MOST for person, n in pairs]))


class Outputs:
    """A teacher's outputs for some images, read from a folder, or computed and stored there."""

    def __init__(
        self,
        folder: Path,
        images: Tensor,
        teacher: Teacher,
        stages: Mapping[str, str],
        device: torch.device,
    ) -> None:
        """images: (n 3 h w) uint8. stages: names and paths of the submodules to record."""
        module = teacher.module
        assert module is not None
        key = {
            "images": digest(images),
            "teacher": weights_of(module),
            "stages": dict(stages),
        }
        self.folder = folder / short_digest(json.dumps(key, sort_keys=True))
        self.stages = tuple(stages)
        complete = self.folder / "key.json"
        with locked(self.folder):
            if not complete.is_file():
                self.folder.mkdir(exist_ok=True)
                self._record(images, teacher, stages, device)
                complete.write_text(json.dumps(key))
        self.embedding = torch.from_numpy(np.load(self.folder / "embedding.npy"))

    def _record(
        self, images: Tensor, teacher: Teacher, stages: Mapping[str, str], device: torch.device
    ) -> None:
        """Record everything in one pass.

        Features are stored in float16; its rounding is far smaller than their noise.
        """
        stored: dict[str, np.memmap[tuple[int, ...], np.dtype[np.float16]]] = {}
        embedding = []
        chunk = teacher_chunk(device)
        with TeacherSession(teacher, list(stages.values())) as session:
            for start in tqdm(range(0, len(images), chunk), desc="teacher", leave=False):
                output = session(as_input(images[start : start + chunk].to(device)))
                embedding.append(output.embedding.cpu())
                for name, path in stages.items():
                    found = output.features[path].half().cpu().numpy()
                    if name not in stored:
                        stored[name] = np.lib.format.open_memmap(
                            self.folder / f"{name}.npy",
                            mode="w+",
                            dtype=np.float16,
                            shape=(len(images), *found.shape[1:]),
                        )
                    stored[name][start : start + len(found)] = found
        for maps in stored.values():
            maps.flush()
        np.save(self.folder / "embedding.npy", torch.cat(embedding).numpy())

    def maps(self, rows: NDArray[np.int64]) -> dict[str, Maps]:
        """Return the recorded features of these images."""
        return {name: Maps((self.folder / f"{name}.npy").resolve(), rows) for name in self.stages}


def lesson(
    images: Images,
    views: Faces,
    outputs: Sequence[Outputs],
    left_out: set[str],
    network: nn.Module | None = None,
    stages: Sequence[str] = (),
) -> Lesson:
    """Return the training material without the people in `left_out`.

    outputs: the outputs of each teacher; recorded features are those of the first. network, stages:
    the teacher itself and its paths, for rows that run it in every step.
    """
    keep = ~np.isin(views.people, list(left_out))
    found = [one.embedding[torch.from_numpy(keep)] for one in outputs]
    faces = views if keep.all() else views.where(keep)  # a copy of all images takes gigabytes
    embedding = found[0] if len(found) == 1 else joined(found)
    rows = means_of(embedding, faces.labels)
    maps = outputs[0].maps(np.flatnonzero(keep))
    parts = images.parts(faces)
    return Lesson(
        faces.images,
        faces.labels,
        embedding,
        rows,
        parts,
        maps,
        network,
        stages,
        teachers=len(outputs),
    )


def digests(faces: Faces, pairs: Pairs, teacher: Teacher) -> dict[str, str]:
    """Return short digests that show whether two results have the same data and teacher."""
    assert teacher.module is not None
    text = repr((digest(faces.images), faces.names, pairs.names, pairs.folds.tolist()))
    weights = weights_of(teacher.module)
    assert weights is not None
    return {"data": short_digest(text), "teacher": weights[:12]}


def digest_of_pairs(pairs: Pairs) -> str:
    return short_digest(repr((pairs.names, pairs.folds.tolist())))


def short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().data).hexdigest()
