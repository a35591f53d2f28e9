"""What is looked at in the first step alone, since it costs a device sync; and what in each."""

import logging
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdhooks.classes.rows import Rows
from kdhooks.classes.shards import world
from kdhooks.declarations import Step
from kdhooks.errors import KDHooksError
from kdhooks.guards import out_of_range
from kdhooks.later import Sent
from kdhooks.teacher.teacher import TeacherOutput

log = logging.getLogger("kdhooks")

_SAME = 0.9999  # mean cosine above which embeddings of different faces say nothing
_TOP1 = 0.5  # a right class order gives about 0.95 and more, a wrong one about 1/classes


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


def check_teacher(output: TeacherOutput, images: Tensor) -> None:
    """Finite taps, and different embeddings for different images."""
    named = {"embedding": output.embedding, **output.features}
    for name, tensor in named.items():
        if not torch.isfinite(tensor).all():
            raise KDHooksError(
                f"teacher tap '{name}' is not finite on the first batch; an untrained network or "
                "a wrong input range does that (the trainer's images are RGB in [-1, 1])"
            )
    same = _mean_cosine(output.embedding)
    if same > _SAME and (images[1:] != images[:1]).any():
        raise KDHooksError(
            "teacher gives all images of the first batch the same embedding (mean cosine "
            f"{same:.5f}): it is untrained, or its input transform is wrong; set teacher.input"
        )


def _mean_cosine(embedding: Tensor) -> float:
    """(b e) -> the mean cosine of two different samples; -1 for a single sample."""
    b = len(embedding)
    if b < 2:
        return -1.0
    unit = F.normalize(embedding.detach().double())
    return float((unit.sum(dim=0).square().sum() - b) / (b * (b - 1)))


def check_class_order(rows: Rows, embedding: Tensor, labels: Tensor) -> None:
    """The teacher's embeddings must find their own rows, else the classes are ordered otherwise."""
    known = labels >= 0
    if not known.any():
        return
    if int(labels.max()) >= rows.total:
        raise KDHooksError(out_of_range(labels, rows.total))
    hits = rows.nearest(embedding.detach().float()[known]) == labels[known]
    top1 = float(hits.float().mean())
    if top1 < _TOP1:
        raise KDHooksError(
            "teacher classifier: its classes must be in the order of the training labels; the "
            f"teacher's embeddings of the first batch find their own row in {top1:.0%} of "
            f"{len(hits)} samples (at least {_TOP1:.0%} wanted); use the classifier of this very "
            "teacher and data set, or class means made with kdhooks.class_means"
        )


def check_terms(values: dict[str, Tensor]) -> None:
    """Every loss finite."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            found = float(value.detach())
            raise KDHooksError(
                f"{name}: its loss is {found} in the first step; check the ranges of its taps"
            )


def check_nonfinite(found: object, where: str = "") -> None:
    if found not in ("raise", "skip"):
        raise KDHooksError(f"{where}nonfinite must be 'raise' or 'skip'; found {found!r}")


class Finite:
    """Counts steps, and whether the terms and teacher embeddings of each were finite.

    It doesn't wait for the device to know, unless it is to skip.
    """

    def __init__(self, nonfinite: Literal["raise", "skip"]) -> None:
        check_nonfinite(nonfinite)
        self._skip = nonfinite == "skip"
        self._last: tuple[_Noted, Sent] | None = None
        self.classes = 0  # of the teacher's classifier, if there is one
        self.step = 0  # how many were taken, with their terms or without
        self.skipped = 0

    def usable(self, step: Step, unchecked: Tensor | None) -> bool:
        """Whether the losses may see this: a bank would keep what is not finite for good.

        Where they may not, the step is over. unchecked (b e): the teacher's embedding, or None if
        there is none, or if it is known to be finite.
        """
        if not self._skip:
            return True
        tapped = [*step.teacher_features.values(), *step.student_features.values()]
        noted, numbers = self._noted(self.step + 1, {}, step, unchecked, None)
        # 0 times a number is 0 where it is finite, and else it is not a number.
        zeros = [(tensor.detach() * 0).sum() for tensor in (*tapped, numbers)]
        usable = self._all_ranks(torch.stack(zeros).sum() == 0, noted, numbers)
        if not usable:
            self.step += 1
        return usable

    def note(
        self,
        values: Mapping[str, Tensor],
        step: Step,
        unchecked: Tensor | None,
        beyond: Tensor | None = None,
    ) -> bool:
        """Of this step, which is over; False: go on without its terms.

        unchecked: as in `usable`. beyond: what `check_range` says of the labels.
        """
        self.step += 1
        if self._skip:  # `usable` has looked at the embedding
            noted, numbers = self._noted(self.step, values, step, None, beyond)
            return self._all_ranks(torch.isfinite(numbers).all(), noted, numbers)
        noted, numbers = self._noted(self.step, values, step, unchecked, beyond)
        known = not numbers.is_cuda and not noted.fault(numbers)
        self._last = None if known else (noted, Sent(numbers))
        return True

    def _noted(
        self,
        number: int,
        values: Mapping[str, Tensor],
        step: Step,
        unchecked: Tensor | None,
        beyond: Tensor | None,
    ) -> "tuple[_Noted, Tensor]":
        """And the numbers by which to tell, on the device."""
        numbers = [value.reshape(1) for value in values.values()]
        if beyond is not None:
            numbers.append(beyond)
        if unchecked is not None:
            numbers.append(unchecked.sum(dim=1))
        if len(numbers) == 1:
            joined = numbers[0]
        else:
            joined = torch.cat(numbers) if numbers else step.student.new_zeros(0)
        classes = 0 if beyond is None else self.classes
        return _Noted(number, tuple(values), step.labels, classes), joined

    def _all_ranks(self, fine: Tensor, noted: "_Noted", numbers: Tensor) -> bool:
        if world() is not None:
            fine = fine.float()
            dist.all_reduce(fine, dist.ReduceOp.MIN)
        if fine:
            return True
        self.skipped += 1
        found = noted.fault(numbers) or f"step {noted.step}: a tap, or another rank, is not finite"
        log.warning("%s; the step goes on without its terms", found)
        return False

    def check(self) -> None:
        """Of the step before."""
        last, self._last = self._last, None
        if last is None:
            return
        noted, sent = last
        if fault := noted.fault(sent.read()):
            raise KDHooksError(
                f"{fault}; lower the weight or the learning rate, or look at these samples; "
                "nonfinite = 'skip' goes on without the terms of such a step"
            )


class _Noted(NamedTuple):
    step: int
    names: tuple[str, ...]
    labels: Tensor  # (b)
    classes: int  # 0: nothing is said of the labels

    def fault(self, numbers: Tensor) -> str:
        """Of each term's value, then each sample's sum of the teacher's embedding; "" is none.

        Raises KDHooksError if a label is beyond the classes, since no step can go on then.
        """
        finite = list(map(math.isfinite, numbers.cpu().tolist()))
        if all(finite):
            return ""
        if self.classes and not finite.pop(len(self.names)):
            raise KDHooksError(f"step {self.step}: {out_of_range(self.labels, self.classes)}")
        bad = [name for name, fine in zip(self.names, finite, strict=False) if not fine]
        what = [f"{', '.join(bad)} not finite"] if bad else []
        samples = zip(self.labels.cpu().tolist(), finite[len(self.names) :], strict=False)
        lost = [label for label, fine in samples if not fine]
        if lost:
            what.append(
                f"the teacher's embedding not finite for {len(lost)} of {len(self.labels)} samples "
                f"(labels {lost[:8]})"
            )
        return f"step {self.step}: {' and '.join(what)}"
