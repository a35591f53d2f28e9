"""Adaptable Instance-Relation Distillation (AIRD), Shi, Guo, Ge, 2024, arXiv:2409.02049.

Reconstruction: only the abstract could be read. From the abstract: the teacher sees a face at high
resolution and the student at low resolution; the student learns each instance, and the relations
between instances of the two resolutions; its batch normalisation is adapted when it is tested
(`kdhooks_plugins.batch_norm`).
Ours: both equations. A relation is the softmax of one face's similarities to all faces of the
batch, between the student's low-resolution face and the teacher's high-resolution ones. The target
is the teacher's own softmax, and not a class for each face, which would push images of one person
apart.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, Model, Options, Scheduled, Varying, Weight, hookimpl, option
from kdhooks.classes.ranks import gather, world
from kdhooks_plugins._widths import projection


class InstancesAndRelations(nn.Module):
    """1 - cos of each face, and the divergence of its similarities to the teacher's faces."""

    def __init__(
        self,
        relation_weight: Scheduled = 0.1,
        temperature: Scheduled = 0.1,
        *,
        global_batch: bool = True,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.relation_weight, self.temperature = Varying(relation_weight), Varying(temperature)
        self.global_batch = global_batch
        self.projector = projector

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b) -> ()."""
        teacher = F.normalize(teacher.detach())
        if self.projector is not None:
            student = self.projector(student)
        student = F.normalize(student)
        instance = (1 - (student * teacher).sum(dim=1)).mean()
        if self.global_batch:
            student, teacher = gather(student, world()), gather(teacher, world())
        ours, theirs = (
            F.log_softmax(x @ teacher.T / self.temperature.now, dim=1) for x in (student, teacher)
        )
        relation = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        notes = {"instance": instance.detach(), "relation": relation.detach()}
        return instance + self.relation_weight.now * relation, notes


class AIRD(Options):
    """L = mean(1 - cos(s, t)) + relation_weight · mean KL(softmax(t Tᵀ/τ) ‖ softmax(s Tᵀ/τ))."""

    weight: Weight = option(32.0, "The factor of both terms together.", least=0)
    relation_weight: Scheduled = option(
        0.1, "The factor of the relations' divergence; with 0 only fcd remains.", least=0
    )
    temperature: Scheduled = option(
        0.1,
        "τ, which divides the cosines. A lower τ gives more weight to the face itself among the "
        "faces of the batch.",
        above=0,
    )
    global_batch: bool = option(
        True,
        "Compare with the faces of all ranks, and not only with those of each rank's batch.",
    )
    projector: bool = option(
        False,
        "Learn a linear map of the student's embedding to the teacher's width. The map is not "
        "part of the student.",
    )

    @hookimpl
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
        loss = InstancesAndRelations(
            self.relation_weight,
            self.temperature,
            global_batch=self.global_batch,
            projector=projection("aird", student, teacher, self.projector),
        )
        return EmbeddingTap("aird", loss, self.weight, needs_labels=False)
