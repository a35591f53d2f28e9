"""What every student learns from, and what the teacher makes of it, computed once and kept."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from kdhooks.teacher.class_means import class_means
from kdhooks.teacher.fingerprints import weights_of
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.teacher import Teacher
from kdhooks_demo.exam import teacher_chunk
from kdhooks_demo.faces import Faces
from kdhooks_demo.material import views
from kdhooks_demo.pairs import Pairs
from kdhooks_demo.training import Lesson, Maps, as_input

STAGES = {"maps14": "conv_12_relu", "maps7": "conv_14_relu"}  # of SFace: 14x14 and 7x7
VIEWS = 3  # as it is, its mirror image, a random view
MOST = 20  # images of a person


def chosen(faces: Faces) -> Faces:
    """The first images, MOST at most, of each person who has two or more."""
    images: Counter[str] = Counter()
    number = []
    for person in faces.people:
        number.append(images[person])
        images[person] += 1
    pairs = zip(faces.people, number, strict=True)
    return faces.where(np.array([images[person] > 1 and n < MOST for person, n in pairs]))


class Material:
    """Views of the faces (n), with the teacher's embedding (n e) and maps (n k h w) of each."""

    def __init__(self, faces: Faces, teacher: Teacher, folder: Path, device: torch.device) -> None:
        """folder: where the teacher's outputs are kept; device: the one on which it runs."""
        self.views = views(faces, VIEWS, seed=0)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        module = teacher.module
        assert module is not None
        key = {"images": _digest(self.views.images), "teacher": weights_of(module)}
        known = folder / "key.json"
        if not known.is_file() or json.loads(known.read_text()) != key:
            self._record(teacher, device)
            known.write_text(json.dumps(key))
        self.embedding = torch.from_numpy(np.load(folder / "embedding.npy"))

    def _record(self, teacher: Teacher, device: torch.device) -> None:
        """In one pass; in half precision, which the features' own noise exceeds by far."""
        images = self.views.images
        session = TeacherSession(teacher, list(STAGES.values()))
        stored: dict[str, np.memmap[tuple[int, ...], np.dtype[np.float16]]] = {}
        embedding = []
        chunk = teacher_chunk(device)
        for start in tqdm(range(0, len(images), chunk), desc="teacher", leave=False):
            output = session(as_input(images[start : start + chunk].to(device)))
            embedding.append(output.embedding.cpu())
            for name, path in STAGES.items():
                found = output.features[path].half().cpu().numpy()
                if name not in stored:
                    stored[name] = np.lib.format.open_memmap(
                        self._folder / f"{name}.npy",
                        mode="w+",
                        dtype=np.float16,
                        shape=(len(images), *found.shape[1:]),
                    )
                stored[name][start : start + len(found)] = found
        for maps in stored.values():
            maps.flush()
        np.save(self._folder / "embedding.npy", torch.cat(embedding).numpy())
        session.close()

    def lesson(self, left_out: set[str]) -> Lesson:
        """All that is not of these people."""
        keep = ~np.isin(self.views.people, list(left_out))
        faces, embedding = self.views.where(keep), self.embedding[torch.from_numpy(keep)]
        known = Teacher(lambda images: embedding)  # it does not look at the images
        classes = int(faces.labels.max()) + 1
        batches = [(torch.zeros(len(faces), 3, 1, 1), faces.labels)]
        rows = class_means(known, batches, classes, flip=False)
        maps = maps_in(self._folder, np.flatnonzero(keep))
        return Lesson(faces.images, faces.labels, embedding, rows, len(faces), maps)


def maps_in(folder: Path, rows: NDArray[np.int64]) -> dict[str, Maps]:
    """The recorded features of these views, as memory maps of the files in the folder."""
    return {name: Maps(np.load(folder / f"{name}.npy", mmap_mode="r"), rows) for name in STAGES}


def digests(faces: Faces, pairs: Pairs, teacher: Teacher) -> dict[str, str]:
    """Short digests, by which the results of other data or of another teacher are recognised."""
    assert teacher.module is not None
    text = repr((_digest(faces.images), faces.names, pairs.names, pairs.folds.tolist()))
    weights = weights_of(teacher.module)
    assert weights is not None
    return {"data": hashlib.sha256(text.encode()).hexdigest()[:12], "teacher": weights[:12]}


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().data).hexdigest()
