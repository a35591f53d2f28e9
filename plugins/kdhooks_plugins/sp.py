"""Similarity-Preserving Knowledge Distillation (SP), Tung and Mori, ICCV 2019, arXiv:1907.09682.

Samples that are similar to the teacher should be similar to the student.
Differs from the paper: the similarities are cosines of embeddings, as in TFace's comparison of
face distillation (Huang et al., CVPR 2022). The paper has row-normalised Gram matrices of feature
maps; similarity = "gram" keeps that form, on embeddings. Both nearly coincide if different faces
are almost orthogonal, so the usual weight of the paper's form, 3000, is the default for both.
Pairs include the batches of all ranks, unless global_batch is False.
"""

from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, Options, Weight, hookimpl, option
from kdhooks.classes.ranks import gather, world

Similarity: TypeAlias = Literal["cosine", "gram"]


class PairSimilarities(nn.Module):
    """The mean square difference of both sides' similarity matrices."""

    def __init__(self, similarity: Similarity = "cosine", *, global_batch: bool = True) -> None:
        super().__init__()
        self.similarity = similarity
        self.global_batch = global_batch

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        teacher = teacher.detach()
        if self.global_batch:
            student, teacher = gather(student, world()), gather(teacher, world())
        return F.mse_loss(self._similarities(student), self._similarities(teacher))

    def _similarities(self, x: Tensor) -> Tensor:
        """(b d) -> (b b)."""
        if self.similarity == "gram":
            return F.normalize(x @ x.T)
        x = F.normalize(x)
        return x @ x.T


class SP(Options):
    """L = mean (G_s - G_t)², G the cosines of all pairs of a batch."""

    weight: Weight = option(3000.0, "The factor of the term.", least=0)
    similarity: Similarity = option(
        "cosine",
        "cosine: cosines of the embeddings; gram: the paper's form, their dot products with each "
        "row of the matrix at unit length.",
    )
    global_batch: bool = option(
        True,
        "Compare pairs across the batches of all ranks, and not only within each rank's batch.",
    )

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        loss = PairSimilarities(self.similarity, global_batch=self.global_batch)
        return EmbeddingTap("sp", loss, self.weight, needs_labels=False)
