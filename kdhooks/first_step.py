"""Checks that run in the first step only, because each of them waits for the device."""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.classes.ranks import first_largest
from kdhooks.classes.rows import Rows
from kdhooks.classes.splits import ClassSplit
from kdhooks.declarations import Model, Tap
from kdhooks.errors import KDHooksError
from kdhooks.guards import out_of_range
from kdhooks.teacher.session import TeacherOutput

log = logging.getLogger("kdhooks")

_SAME = 0.9999  # above this mean cosine, embeddings of different images count as the same
_TOP1 = 0.5  # a right class order reaches about 0.95 or more, a wrong one about 1/classes
_USUAL = 0.9  # below it, the rows may be of another epoch, or another run on the same data


def tapped_shapes(taps: Sequence[Tap], student: Model) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tapped stage of the student, by its path, as it was probed."""
    tapped = {path for tap in taps for path in tap.student_paths}
    known = (*student.stages, *student.probed.values())
    return {stage.path: stage.shape for stage in known if stage.path in tapped}


def check_shapes(features: Mapping[str, Tensor], probed: Mapping[str, tuple[int, ...]]) -> None:
    """Check that stages return the same shapes in training as when they were probed."""
    for path in features.keys() & probed.keys():
        found = tuple(features[path].shape[1:])
        if found != probed[path]:
            raise KDHooksError(
                f"student tap '{path}' returned {found} in training, but {probed[path]} when it "
                "was probed; the student drops tokens (use one with mask_ratio = 0), or "
                "input_shape is not that of the training images"
            )


def check_teacher(output: TeacherOutput, images: Tensor, who: str) -> None:
    """Check that all outputs are finite, and that different images have different embeddings.

    who: the name of the teacher in error messages.
    """
    named = {"embedding": output.embedding, **output.features}
    for name, tensor in named.items():
        if not torch.isfinite(tensor).all():
            raise KDHooksError(
                f"{who} tap '{name}' is not finite on the first batch; an untrained network or "
                "a wrong input range causes that (the trainer's images are RGB in [-1, 1])"
            )
    if not output.embedding.any():
        raise KDHooksError(
            f"{who} returns an embedding of zeros for all images of the first batch, which has no "
            "direction to learn; check its weights, and its input transform (teacher.input)"
        )
    same = _mean_cosine(output.embedding)
    if same > _SAME and (images[1:] != images[:1]).any():
        raise KDHooksError(
            f"{who} returns the same embedding for all images of the first batch (mean cosine "
            f"{same:.5f}): it is untrained, or its input transform is wrong; set teacher.input"
        )


def _mean_cosine(embedding: Tensor) -> float:
    """(b e) -> the mean cosine of two different samples; -1 for a single sample."""
    b = len(embedding)
    if b < 2:
        return -1.0
    unit = F.normalize(embedding.detach().double())
    return float((unit.sum(dim=0).square().sum() - b) / (b * (b - 1)))


def check_class_order(
    rows: Rows,
    embedding: Tensor,
    labels: Tensor,
    who: str = "teacher",
    split: ClassSplit | None = None,
) -> str:
    """Check that the teacher's embeddings are nearest to the class rows of their labels.

    If they are not, the rows are in another order than the labels. If that share is lower than
    usual for a classifier trained with the teacher, a warning is logged, and returned.
    split: the classes whose rows this rank reads; all ranks of a split must call this together.
    """
    split = split or ClassSplit.whole(rows.total)
    labels = split.of_all(labels)
    if int(labels.max()) >= rows.total:
        raise KDHooksError(out_of_range(labels, rows.total))
    found = _nearest(rows, split.of_all(embedding.detach().float()), split)
    known = labels >= 0
    if not known.any():
        return ""
    hits = found[known] == labels[known]
    top1 = int(hits.sum()) / len(hits)
    if top1 < _TOP1:
        raise KDHooksError(
            f"{who} classifier: its classes must be in the order of the training labels; found "
            f"{top1:.0%} of {len(hits)} samples of the first batch nearest to the row of their own "
            f"class (at least {_TOP1:.0%} expected); use the classifier trained with this teacher "
            "on this data set, or class means made with kdhooks.class_means"
        )
    if top1 >= _USUAL:
        return ""
    warning = (
        f"only {top1:.0%} of {len(hits)} samples of the first batch are nearest to the row of "
        "their own class (about 95% or more are usual); the classifier may be of another run or "
        "epoch, or teacher.input may be wrong"
    )
    log.warning("%s classifier: %s", who, warning)
    return warning


def _nearest(rows: Rows, embedding: Tensor, split: ClassSplit) -> Tensor:
    """(b e) -> (b): the class with the largest cosine among all ranks' classes."""
    value, index = rows.nearest(embedding, split.start, split.stop)
    return first_largest(value, index, split.group)


def check_terms(values: dict[str, Tensor]) -> None:
    """Check that every loss is finite."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            found = float(value.detach())
            raise KDHooksError(
                f"{name}: its loss is {found} in the first step; check the ranges of its taps"
            )
