"""Class means of teacher embeddings: a classifier for a teacher that does not have one."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.errors import KDHooksError, listed
from kdhooks.teacher.embedding_table import EmbeddingTable
from kdhooks.teacher.input_transform import check_input
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.several import Teachers
from kdhooks.teacher.teacher import Teacher
from kdhooks.tensor_files import check_target, read_tensors, user_path, write_tensors

SAVE_EVERY = 100  # batches
_SUBJECT = "class means"


@dataclass
class _Sums:
    """The sums of a pass so far, and what identifies the pass."""

    sums: Tensor  # (c e)
    counts: Tensor  # (c)
    probe: Tensor  # (1 e), the teacher's embedding of a fixed image
    flip: bool
    batches: int = 0
    labels: str = ""  # digest of the labels in these batches


def class_means(
    teacher: Teacher,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    flip: bool = True,
    save: str | Path | None = None,
) -> Tensor:
    """[((b 3 h w), (b))] -> (c e), unit length: the mean of each class's unit embeddings.

    Make one pass over the training set, with its labels (0 to classes - 1; samples with a label
    below 0 are left out). Save the result with torch.save, and specify the file as
    teacher.classifier.

    flip: whether to embed the mirrored image too.
    save: a file for the sums so far, written every 100 batches and at the end. A later call with
        the same teacher and the same batches, in the same order, continues from it.
    """
    if isinstance(teacher, Teachers | list | tuple):
        raise KDHooksError(
            f"{_SUBJECT}: teacher must be a single kdhooks.Teacher; found several; compute class "
            "means for each of them; kdhooks.recipe.build_teachers(recipe) returns them as a list"
        )
    if not isinstance(teacher, Teacher):
        raise KDHooksError(
            f"{_SUBJECT}: teacher must be a kdhooks.Teacher, as returned by Teacher(module) or "
            f"build_teacher(recipe); found {type(teacher).__name__}"
        )
    if isinstance(teacher.stored, EmbeddingTable):
        raise KDHooksError(
            f"{_SUBJECT}: teacher must embed images; found a table of embeddings by index; average "
            "its unit rows by class, and save the result"
        )
    if not isinstance(classes, Integral) or isinstance(classes, bool) or classes < 1:
        raise KDHooksError(
            f"{_SUBJECT}: classes must be a whole number, at least 1; found {classes!r}"
        )
    if not isinstance(batches, Iterable):
        raise KDHooksError(
            f"{_SUBJECT}: batches must be pairs of images and labels, as a loader yields them; "
            f"found {type(batches).__name__}"
        )
    path = None if save is None else user_path(save, f"{_SUBJECT}: save")
    if path is not None:
        check_target(path, _SUBJECT)
    digest = hashlib.sha256()
    so_far: _Sums | None = None
    number, seen = -1, 0  # number of the last batch, and of the images in earlier batches
    shape: torch.Size | None = None
    with TeacherSession(teacher) as session:
        for number, batch in enumerate(batches):
            images, labels = _checked(batch, number, classes)
            digest.update(labels.numpy().tobytes())
            if so_far is None:
                check_input(teacher.transform, images, _SUBJECT)
                so_far = _fresh_or_saved(session, images, classes, flip, path)
            shape = shape or images.shape[1:]
            if images.shape[1:] != shape:
                raise KDHooksError(
                    f"{_SUBJECT}: all images must have the same shape; found {tuple(shape)} and, "
                    f"in batch {number}, {tuple(images.shape[1:])}"
                )
            if number >= so_far.batches:
                _add(so_far, session, images, labels, seen)
                so_far.batches, so_far.labels = number + 1, digest.hexdigest()
                if path and so_far.batches % SAVE_EVERY == 0:
                    write_tensors(asdict(so_far), path, _SUBJECT)
            elif number == so_far.batches - 1 and digest.hexdigest() != so_far.labels:
                raise KDHooksError(
                    f"{_SUBJECT}: '{path}' was summed over {so_far.batches} batches with other "
                    "labels; pass the batches in the same order, or remove the file"
                )
            seen += len(images)
    if so_far is None:
        raise KDHooksError(f"{_SUBJECT}: there must be at least one batch of images; found none")
    if number + 1 < so_far.batches:
        raise KDHooksError(
            f"{_SUBJECT}: '{path}' was summed over {so_far.batches} batches; found {number + 1}; "
            "pass all batches in the same order, or remove the file"
        )
    empty = torch.nonzero(so_far.counts == 0).flatten().tolist()
    if empty:
        raise KDHooksError(
            f"{_SUBJECT}: every class needs an image; {len(empty)} of {classes} have none (the "
            f"first: {empty[:5]}); pass all images, or number the classes without gaps"
        )
    if path:
        write_tensors(asdict(so_far), path, _SUBJECT)
    return F.normalize(so_far.sums).float()


def _checked(batch: object, number: int, classes: int) -> tuple[Tensor, Tensor]:
    """Check a batch, and return images (b 3 h w) and their labels (b), in int64 on the CPU."""
    where = f"{_SUBJECT}: batch {number}"
    pair = tuple(batch) if isinstance(batch, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        kinds = listed(type(part).__name__ for part in pair)
        found = f"{type(batch).__name__} of {kinds}" if pair else type(batch).__name__
        raise KDHooksError(
            f"{where} must be a pair of tensors, images (b 3 h w) and labels (b); found {found}; "
            "wrap the loader in a generator that yields such pairs"
        )
    images, labels = pair
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise KDHooksError(
            f"{where}: labels must be whole numbers, one class per image; found {labels.dtype}; "
            "convert them (one-hot labels with argmax(1))"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not images.is_floating_point():
        raise KDHooksError(
            f"{where}: images must be floating point numbers, (pixel - 127.5) / 127.5 in RGB; "
            f"found {images.dtype}"
        )
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise KDHooksError(
            f"{where} must have images (b 3 h w) and labels (b); found {tuple(images.shape)} and "
            f"{tuple(labels.shape)}"
        )
    labels = labels.long().cpu()
    if len(labels) and int(labels.max()) >= classes:
        raise KDHooksError(
            f"{_SUBJECT}: labels run from 0 to {classes - 1}; found {int(labels.max())} in batch "
            f"{number}"
        )
    return images, labels


def _fresh_or_saved(
    session: TeacherSession, images: Tensor, classes: int, flip: bool, path: Path | None
) -> _Sums:
    """Return empty sums, or those that an earlier pass of the same teacher saved."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *images.shape[1:], generator=generator) * 2 - 1
    stored = session.teacher.stored
    assert not isinstance(stored, EmbeddingTable)
    try:
        embedding = session(image.to(images)).embedding if stored is None else stored.probe
        probe = embedding.double().cpu()
    except (KDHooksError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise KDHooksError(
            f"{_SUBJECT}: the teacher must run on images of the shape {tuple(images.shape[1:])}; "
            f"it raises {type(error).__name__}: {error}; pass the images that the trainer uses"
        ) from error
    sums = torch.zeros(classes, probe.shape[1], dtype=torch.double)
    fresh = _Sums(sums, torch.zeros(classes, dtype=torch.long), probe, flip)
    if path is None or not path.is_file():
        return fresh
    content = read_tensors(path, _SUBJECT)
    kinds = {field.name: type(getattr(fresh, field.name)) for field in fields(_Sums)}
    if not isinstance(content, dict) or {k: type(v) for k, v in content.items()} != kinds:
        raise KDHooksError(
            f"{_SUBJECT}: '{path}' holds no sums of an earlier pass; specify another file for them "
            "(this function returns the class means, and does not save them)"
        )
    known = _Sums(**content)
    if not _is_whole(known):
        raise KDHooksError(
            f"{_SUBJECT}: '{path}' must hold finite sums (c e), counts (c) and a number of "
            "batches; it is damaged; remove it, or specify another file"
        )
    same = known.sums.shape == sums.shape and known.flip == flip
    if not same or F.cosine_similarity(known.probe, probe).item() < 0.999:
        raise KDHooksError(
            f"{_SUBJECT}: '{path}' was started with another teacher, number of classes or flip; "
            "remove it, or specify another file"
        )
    return known


def _is_whole(found: _Sums) -> bool:
    shapes = found.sums.ndim == 2 and found.probe.shape == (1, found.sums.shape[-1])
    kinds = (found.sums.dtype, found.counts.dtype) == (torch.double, torch.long)
    if not (shapes and kinds and found.counts.shape == found.sums.shape[:1]):
        return False
    numbers = bool(found.sums.isfinite().all() and (found.counts >= 0).all())
    return numbers and found.batches >= 0


def _add(so_far: _Sums, session: TeacherSession, images: Tensor, labels: Tensor, seen: int) -> None:
    """Add a batch to the sums.

    seen: the number of images in earlier batches, so that an error can say which image is faulty.
    """
    unit = F.normalize(session(images).embedding).double().cpu()
    if so_far.flip:
        unit += F.normalize(session(images.flip(-1)).embedding).double().cpu()
    if len(unit) != len(labels):
        raise KDHooksError(
            f"{_SUBJECT}: the teacher must return one embedding per image; found {len(unit)} for "
            f"{len(labels)}"
        )
    wrong = ~torch.isfinite(unit).all(dim=1) | (unit == 0).all(dim=1)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        finite = bool(torch.isfinite(images[at]).all())
        why = "" if finite else ", since the image is not finite"
        raise KDHooksError(
            f"{_SUBJECT}: embeddings must be finite and not zero; that of image {seen + at}, of "
            f"class {int(labels[at])}, is not{why}; leave it out, or check the "
            "teacher's weights, input and dtype"
        )
    known = labels >= 0
    so_far.sums.index_add_(0, labels[known], unit[known])
    so_far.counts += torch.bincount(labels[known], minlength=len(so_far.counts))
