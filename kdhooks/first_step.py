"""Checks of the first step alone, because each of them waits for the device."""

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.classes.ranks import first_largest
from kdhooks.classes.rows import Rows
from kdhooks.classes.splits import ClassSplit
from kdhooks.errors import KDHooksError
from kdhooks.guards import out_of_range
from kdhooks.teacher.session import TeacherOutput

log = logging.getLogger("kdhooks")

_SAME = 0.9999  # mean cosine above which embeddings of different faces say nothing
_TOP1 = 0.5  # a right class order gives about 0.95 and more, a wrong one about 1/classes
_USUAL = 0.9  # below it, the rows may be of another epoch or another run of the same data


def check_shapes(features: Mapping[str, Tensor], probed: Mapping[str, tuple[int, ...]]) -> None:
    """Stages must put out in training what they put out when they were probed."""
    for path in features.keys() & probed.keys():
        found = tuple(features[path].shape[1:])
        if found != probed[path]:
            raise KDHooksError(
                f"student tap '{path}' put out {found} in training, {probed[path]} when it was "
                "probed; it drops tokens (take one with mask_ratio = 0), or input_shape is not "
                "that of the training images"
            )


def check_teacher(output: TeacherOutput, images: Tensor, who: str = "teacher") -> None:
    """Finite taps, and different embeddings for different images. who: its name in errors."""
    named = {"embedding": output.embedding, **output.features}
    for name, tensor in named.items():
        if not torch.isfinite(tensor).all():
            raise KDHooksError(
                f"{who} tap '{name}' is not finite on the first batch; an untrained network or "
                "a wrong input range does that (the trainer's images are RGB in [-1, 1])"
            )
    if not output.embedding.any():
        raise KDHooksError(
            f"{who} gives all images of the first batch an embedding of zeros, which has no "
            "direction to learn; look at its weights, and at its input transform (teacher.input)"
        )
    same = _mean_cosine(output.embedding)
    if same > _SAME and (images[1:] != images[:1]).any():
        raise KDHooksError(
            f"{who} gives all images of the first batch the same embedding (mean cosine "
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
    """The teacher's embeddings must find their own rows, else the classes are ordered otherwise.

    A warning is logged, and returned, if they find too few of them for a classifier of their own.
    split: the classes whose rows this rank reads; the ranks that share them ask this together.
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
            f"{who} classifier: its classes must be in the order of the training labels; the "
            f"teacher's embeddings of the first batch find their own row in {top1:.0%} of "
            f"{len(hits)} samples (at least {_TOP1:.0%} wanted); use the classifier of this very "
            "teacher and data set, or class means made with kdhooks.class_means"
        )
    if top1 >= _USUAL:
        return ""
    warning = (
        f"the teacher's embeddings of the first batch find their own row in {top1:.0%} of "
        f"{len(hits)} samples only (about 95% and more are usual); its classifier may be of "
        "another run or epoch, or teacher.input wrong"
    )
    log.warning("%s classifier: %s", who, warning)
    return warning


def _nearest(rows: Rows, embedding: Tensor, split: ClassSplit) -> Tensor:
    """(b e) -> (b): the class with the largest cosine, of all ranks' classes."""
    value, index = rows.nearest(embedding, split.start, split.stop)
    return first_largest(value, index, split.group)


def check_terms(values: dict[str, Tensor]) -> None:
    """Every loss finite."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            found = float(value.detach())
            raise KDHooksError(
                f"{name}: its loss is {found} in the first step; check the ranges of its taps"
            )
