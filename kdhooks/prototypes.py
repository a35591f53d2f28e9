"""Class means of teacher embeddings: the classifier of a teacher that comes without one."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.teacher import Teacher


def class_means(
    teacher: Teacher, batches: Iterable[tuple[Tensor, Tensor]], classes: int, *, flip: bool = True
) -> Tensor:
    """[((b 3 h w), (b))] -> (c e), unit length: the mean of each class's unit embeddings.

    One pass over the training set, with its own labels (0 to classes - 1; below 0 is left out).
    flip: embed the mirrored image too. Save the result with torch.save and name the file as
    teacher.classifier.
    """
    sums: Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.long)
    for images, labels in batches:
        unit = F.normalize(teacher(images).embedding).double().cpu()
        if flip:
            unit += F.normalize(teacher(images.flip(-1)).embedding).double().cpu()
        labels = labels.reshape(-1).cpu()
        known = labels >= 0
        if len(labels) and int(labels.max()) >= classes:
            raise KDHooksError(
                f"class means: labels run from 0 to {classes - 1}; found {int(labels.max())}"
            )
        if sums is None:
            sums = torch.zeros(classes, unit.shape[1], dtype=torch.double)
        sums.index_add_(0, labels[known], unit[known])
        counts += torch.bincount(labels[known], minlength=classes)
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if sums is None or empty:
        raise KDHooksError(
            f"class means: every class needs an image; {len(empty)} of {classes} have none "
            f"(the first: {empty[:5]})"
        )
    return F.normalize(sums).float()
