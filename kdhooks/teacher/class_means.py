"""Class means of teacher embeddings: the classifier of a teacher that comes without one."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.teacher import Teacher

SAVE_EVERY = 100  # batches


@dataclass
class _Sums:
    """What a pass has summed so far, and of what."""

    sums: Tensor  # (c e)
    counts: Tensor  # (c)
    probe: Tensor  # (1 e), the teacher's embedding of a fixed image
    flip: bool
    batches: int = 0
    labels: str = ""  # digest of those batches' labels


def class_means(
    teacher: Teacher,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    flip: bool = True,
    save: str | Path | None = None,
) -> Tensor:
    """[((b 3 h w), (b))] -> (c e), unit length: the mean of each class's unit embeddings.

    One pass over the training set, with its own labels (0 to classes - 1; below 0 is left out).
    flip: embed the mirrored image too. Save the result with torch.save and name the file as
    teacher.classifier.
    save: a file for the sums so far, written every 100 batches and at the end. A later call with
    the same teacher and the same batches, in the same order, goes on from it.
    """
    path = None if save is None else Path(save).expanduser()
    digest = hashlib.sha256()
    so_far: _Sums | None = None
    with TeacherSession(teacher) as session:
        for number, (images, labels) in enumerate(batches):
            labels = labels.reshape(-1).cpu()
            digest.update(labels.long().numpy().tobytes())
            if so_far is None:
                so_far = _fresh_or_saved(session, images, classes, flip, path)
            if number >= so_far.batches:
                _add(so_far, session, images, labels)
                so_far.batches, so_far.labels = number + 1, digest.hexdigest()
                if path and so_far.batches % SAVE_EVERY == 0:
                    _write(so_far, path)
            elif number == so_far.batches - 1 and digest.hexdigest() != so_far.labels:
                raise KDHooksError(
                    f"class means: '{path}' was summed over {so_far.batches} batches with other "
                    "labels; give them in the same order, or remove it"
                )
    empty = [] if so_far is None else torch.nonzero(so_far.counts == 0).flatten().tolist()
    if so_far is None or empty:
        raise KDHooksError(
            f"class means: every class needs an image; {len(empty) or classes} of {classes} have "
            f"none (the first: {empty[:5]})"
        )
    if path:
        _write(so_far, path)
    return F.normalize(so_far.sums).float()


def _fresh_or_saved(
    session: TeacherSession, images: Tensor, classes: int, flip: bool, path: Path | None
) -> _Sums:
    """Nothing yet, or what an earlier pass of the same teacher left."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *images.shape[1:], generator=generator) * 2 - 1
    probe = session(image.to(images)).embedding.double().cpu()
    sums = torch.zeros(classes, probe.shape[1], dtype=torch.double)
    fresh = _Sums(sums, torch.zeros(classes, dtype=torch.long), probe, flip)
    if path is None or not path.is_file():
        return fresh
    known = _Sums(**torch.load(path, weights_only=True))
    same = known.sums.shape == sums.shape and known.flip == flip
    if not same or F.cosine_similarity(known.probe, probe).item() < 0.999:
        raise KDHooksError(
            f"class means: '{path}' was started with another teacher, number of classes or flip; "
            "remove it, or name another file"
        )
    return known


def _add(so_far: _Sums, session: TeacherSession, images: Tensor, labels: Tensor) -> None:
    classes = len(so_far.counts)
    if len(labels) and int(labels.max()) >= classes:
        raise KDHooksError(
            f"class means: labels run from 0 to {classes - 1}; found {int(labels.max())}"
        )
    unit = F.normalize(session(images).embedding).double().cpu()
    if so_far.flip:
        unit += F.normalize(session(images.flip(-1)).embedding).double().cpu()
    known = labels >= 0
    so_far.sums.index_add_(0, labels[known], unit[known])
    so_far.counts += torch.bincount(labels[known], minlength=classes)


def _write(so_far: _Sums, path: Path) -> None:
    """At one stroke, so that a stop in the middle leaves the earlier file."""
    draft = path.with_name(f"{path.name}.part")
    torch.save(asdict(so_far), draft)
    draft.replace(path)
