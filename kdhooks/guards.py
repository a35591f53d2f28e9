"""Checks of the inputs of every step, in any training loop."""

from collections.abc import Sequence
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, listed
from kdhooks.finite import Question, refuse

_VERSION = attrgetter("_version")
WITHOUT_LABELS = (
    "acsr", "aird", "at", "cakd", "cc", "eckd", "fcd", "fitnet", "fskd", "reviewkd", "rkd", "sp",
)  # fmt: skip
"""The methods of this package that need no labels with the defaults of their options."""


def check_models(student: nn.Module, teacher: object) -> None:
    """Refuse a student that is its own teacher, or that trains nothing."""
    shared = {id(p) for p in teacher.parameters()} if isinstance(teacher, nn.Module) else set()
    if any(id(parameter) in shared for parameter in student.parameters()):
        raise KDHooksError(
            "the student and the teacher must have parameters of their own, since a teacher is "
            "frozen; found shared parameters; create the teacher from copy.deepcopy(model), and "
            "unfreeze the student by student.requires_grad_()"
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise KDHooksError(
            "the student must train at least one parameter; found all of them frozen; unfreeze "
            "them by student.requires_grad_(); if it is also the teacher of another student, use "
            "copy.deepcopy(student) there"
        )


def check_images(images: object) -> None:
    """Refuse images (b 3 h w) that are not a floating-point tensor, and an empty batch."""
    if not isinstance(images, Tensor):
        raise KDHooksError(f"images must be a tensor (b 3 h w); found {type(images).__name__}")
    if not images.is_floating_point():
        raise KDHooksError(
            f"images must be floating point, (pixel - 127.5) / 127.5; found {images.dtype}; pass "
            "(images.float() - 127.5) / 127.5 to kd, or pass it as teacher_images"
        )
    if not images.shape[0]:
        raise KDHooksError("images must hold at least one sample; found an empty batch")


def check_same_images(
    seen: Tensor | None, inputs: Sequence[Tensor], version: int, images: Tensor
) -> Question | None:
    """Refuse images that are not those of the student's forward.

    seen: the student's images; None if it got no tensor. inputs: all tensors that it got. version:
    the version of `seen` when the forward started. A tensor with the same content is accepted.
    """
    if seen is None:
        return None
    if seen is images or (seen.device == images.device and seen.is_set_to(images)):
        if version >= 0 and version != images._version:
            raise KDHooksError(
                "the images were changed in place after the student's forward had started; pass "
                "kd an earlier copy as teacher_images, or do not change them"
            )
        return None
    if any(images is tensor for tensor in inputs):
        return None
    # The message keeps shapes only: tensors would stay in memory until the next step.
    words = partial(_other_images, tuple(seen.shape), tuple(images.shape))
    if seen.shape != images.shape:
        raise KDHooksError(words())
    return refuse((images.detach().to(seen) != seen).any(), words)


def _other_images(seen: tuple[int, ...], found: tuple[int, ...]) -> str:
    content = ", with other content" if seen == found else ""
    return (
        "the images given to kd must be those of the student's last forward in training; found "
        f"{found} after a forward on {seen}{content}; call kd once "
        "after each forward with the same images, and pass images that only the teacher should "
        "see as teacher_images"
    )


def checked_labels(labels: object, images: Tensor, needed_by: Sequence[str]) -> Tensor | None:
    """(b) or (b 1) whole numbers -> (b), as many as there are images.

    None is accepted if no term needs labels. needed_by: names of the terms that do.
    """
    if labels is None and not needed_by:
        return None
    if not isinstance(labels, Tensor):
        needs = (
            f"; needed by: {listed(needed_by)}; methods that need no labels: "
            f"{listed(WITHOUT_LABELS)}"
            if needed_by
            else ""
        )
        raise KDHooksError(
            f"labels must be a tensor (b) of class numbers; found {type(labels).__name__}{needs}"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise KDHooksError(
            f"labels must be class numbers (b); found shape {tuple(labels.shape)}; convert one-hot "
            "rows to numbers by labels.argmax(dim=1)"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise KDHooksError(
            f"labels must be whole numbers (b); found dtype {labels.dtype}; use labels.long() if "
            "they are class numbers"
        )
    if labels.shape[0] != images.shape[0]:
        raise KDHooksError(
            f"images and labels must be of the same samples; found {len(images)} and {len(labels)}"
        )
    labels = labels.long()  # other types cannot index, or act as a mask
    return labels.clone() if labels.is_inference() else labels  # an inference tensor has no version


def refuse_labelled(terms: Sequence[str]) -> None:
    """Refuse terms that need labels, in a run without labels. terms: their names."""
    if terms:
        raise KDHooksError(
            f"labels = false, but these terms need the class of each image: {listed(terms)}; leave "
            f"them out, or use methods that need no labels: {listed(WITHOUT_LABELS)}"
        )


def check_batch(images: Tensor, student: Tensor, teacher: Tensor | None) -> None:
    """(b 3 h w), (b d), (b e): refuse other batch sizes, which could be broadcast silently."""
    b = images.shape[0]  # a Tensor's len() is a Python call
    if student.shape[0] != b:
        raise KDHooksError(
            f"the student's last forward in training was on {len(student)} images, but kd got "
            f"{b}; call kd once after each forward, with the images of that forward"
        )
    if teacher is not None and teacher.shape[0] != b:
        raise KDHooksError(
            f"the teacher must return one embedding for each of {b} images; found {len(teacher)}"
        )


def check_range(labels: Tensor, classes: int) -> Question | None:
    """Refuse labels (b) of unknown classes. Labels below 0 mark samples without a class."""
    return refuse((labels >= classes).any(), partial(out_of_range, labels, classes))


def out_of_range(labels: Tensor, classes: int) -> str:
    found = listed(map(str, sorted({label for label in labels.cpu().tolist() if label >= classes})))
    return (
        f"labels must be below the classifier's {classes} classes; found {found}; "
        "teacher.classifier and the training set must have the same classes in the same order"
    )


class Untouched:
    """Detects that a loss has written into a tensor that the trainer or another loss uses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._versions = sum(map(_VERSION, tensors))

    def check(self, name: str) -> None:
        """name: the term whose loss has just run."""
        if sum(map(_VERSION, self._tensors)) != self._versions:
            raise KDHooksError(
                f"{name}: its loss wrote into one of its arguments in place, which changes the "
                "labels, embeddings or features for all other users; let it change a clone instead"
            )
