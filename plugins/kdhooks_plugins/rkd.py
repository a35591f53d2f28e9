"""Relational Knowledge Distillation (RKD), Park et al., CVPR 2019, arXiv:1904.05068.

It compares distances between two samples, and angles at a sample between two others, as in the
paper, with the weights that its authors use for classification: 25 and 50.
Differs from the paper: relations include the batches of all ranks, unless global_batch is False.
The paper's angle is undefined for samples at the same point; here it has cosine 0 and no gradient.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdhooks import EmbeddingTap, Options, Scheduled, Varying, Weight, hookimpl, option
from kdhooks.classes.ranks import gather, summed, world

_EPS = 1e-12  # a batch with a smaller mean distance is one point and has no scale


class DistancesAndAngles(nn.Module):
    """Huber loss of relative distances and of angles."""

    def __init__(
        self,
        distance_weight: Scheduled = 25.0,
        angle_weight: Scheduled = 50.0,
        *,
        unit_length: bool = False,
        global_batch: bool = True,
        anchors: int = 32,
    ) -> None:
        super().__init__()
        self.distance_weight, self.angle_weight = Varying(distance_weight), Varying(angle_weight)
        self.unit_length = unit_length
        self.global_batch = global_batch
        self.anchors = anchors

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b) -> ()."""
        teacher, group = teacher.detach(), world() if self.global_batch else None
        own = slice(0, len(student))  # the anchors of this rank
        if group is not None:
            first = dist.get_rank(group) * len(student)
            own = slice(first, first + len(student))
        student, teacher = gather(student, group), gather(teacher, group)
        if self.unit_length:
            student, teacher = F.normalize(student), F.normalize(teacher)
        loss, notes = student.new_zeros(()), {}
        if self.distance_weight.value:
            distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
            loss, notes["distance"] = loss + self.distance_weight.now * distance, distance.detach()
        if self.angle_weight.value:
            angle = summed(self._angles(student, teacher, own), group)
            loss, notes["angle"] = loss + self.angle_weight.now * angle, angle.detach()
        return loss, notes

    def _angles(self, student: Tensor, teacher: Tensor, own: slice) -> Tensor:
        """The part of the mean over b³ angles that is at the anchors `own`.

        A few anchors are computed at a time, and again in backward, to save memory.
        """
        total, b = student.new_zeros(()), len(student)
        for start in range(own.start, own.stop, self.anchors):
            some = slice(start, min(start + self.anchors, own.stop))
            part: Tensor = checkpoint(
                _angle_gap, student, teacher, some, use_reentrant=False, preserve_rng_state=False
            )
            total = total + part
        return total / (b * b * b)


def _relative_distances(x: Tensor) -> Tensor:
    """(b d) -> (b b): the distances divided by the mean of the nonzero ones."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=_EPS)


def _angle_gap(student: Tensor, teacher: Tensor, anchors: slice) -> Tensor:
    """(b d), (b e) -> (): the sum of Huber losses of all angles at these anchors."""
    ours, theirs = _angles_at(student, anchors), _angles_at(teacher, anchors)
    return F.smooth_l1_loss(ours, theirs, reduction="sum")


def _angles_at(x: Tensor, anchors: slice) -> Tensor:
    """(b d) -> (a b b): cos of the angle at each anchor between every two samples."""
    sides = x[None] - x[anchors, None]
    length: Tensor = torch.linalg.vector_norm(sides, dim=2, keepdim=True)
    directions: Tensor = sides / length.masked_fill(length == 0, torch.inf)
    return directions @ directions.transpose(1, 2)


class RKD(Options):
    """L = distance_weight · mean l(ψ_D(s), ψ_D(t)) + angle_weight · mean l(ψ_A(s), ψ_A(t))."""

    weight: Weight = option(1.0, "The factor of both terms together.", least=0)
    distance_weight: Scheduled = option(
        25.0, "The factor of the loss of distances; 0 leaves it out.", least=0
    )
    angle_weight: Scheduled = option(
        50.0, "The factor of the loss of angles; 0 leaves it out.", least=0
    )
    unit_length: bool = option(
        False,
        "Compare embeddings at unit length. The paper compares the raw ones.",
    )
    global_batch: bool = option(
        True,
        "Compare samples across the batches of all ranks, and not only within each rank's batch.",
    )
    anchors: int = option(
        32,
        "The number of samples whose angles are computed at the same time. Memory grows with "
        "anchors · b · (b + d).",
        least=1,
    )

    def check(self) -> None:
        if self.distance_weight == self.angle_weight == 0:
            raise self.refused("distance_weight", "or angle_weight must be above 0; found 0 twice")

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        loss = DistancesAndAngles(
            self.distance_weight,
            self.angle_weight,
            unit_length=self.unit_length,
            global_batch=self.global_batch,
            anchors=self.anchors,
        )
        return EmbeddingTap("rkd", loss, self.weight, needs_labels=False)
