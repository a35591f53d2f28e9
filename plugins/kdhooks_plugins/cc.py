"""Correlation Congruence (CC, CCKD), Peng et al., ICCV 2019, arXiv:1904.01802.

Two samples are to be as correlated to the student as they are to the teacher, by a Gaussian RBF
kernel in the form of its Taylor series: the higher powers look more closely at similar samples.
From the paper: the kernel and its series. γ is that of TFace's comparison of face distillation
(Huang et al., CVPR 2022), which has the same form on embeddings; the default weight is ours.
Differs from the paper: it is the relations alone. The paper adds them to the consistency of single
instances, which `kd` or `fcd` beside this method compute. TFace sums two terms of the series, which
is `sp` times a constant; three are the default here. The loss that RepDistiller names after the
paper, products of the differences of neighbours in a batch, is another one.
Relations run over the batches of all ranks, unless global_batch is False.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, Options, Schedule, Scheduled, Varying, Weight, hookimpl, option
from kdhooks.classes.ranks import gather, world

_SHARE = 0.01  # of the kernel; a smaller series has next to no gradient
_ENOUGH = 200  # terms for any gamma that is allowed


class Correlations(nn.Module):
    """The mean square difference of both sides' correlation matrices."""

    def __init__(
        self, gamma: Scheduled = 0.4, terms: int = 3, *, global_batch: bool = True
    ) -> None:
        super().__init__()
        self.gamma = Varying(gamma)
        self.terms = terms
        self.global_batch = global_batch

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        teacher = teacher.detach()
        if self.global_batch:
            student, teacher = gather(student, world()), gather(teacher, world())
        return F.mse_loss(self._correlations(student), self._correlations(teacher))

    def _correlations(self, x: Tensor) -> Tensor:
        """(b d) -> (b b): the series of exp(-γ ‖a - b‖²) in the cosine, by Horner's rule."""
        x, twice = F.normalize(x), 2 * self.gamma.now
        argument = twice * (x @ x.T)
        series = 1 + argument / (self.terms - 1)
        for power in range(self.terms - 2, 0, -1):
            series = 1 + argument * series / power
        return math.exp(-twice) * series


def share(gamma: float, terms: int) -> float:
    """The series divided by the kernel, for samples of cosine 1: from 0 to 1."""
    powers = range(min(terms, _ENOUGH))
    return sum(math.exp(p * math.log(2 * gamma) - 2 * gamma - math.lgamma(p + 1)) for p in powers)


class CC(Options):
    """L = mean (K_s - K_t)², K = e^(-2γ) Σ_p (2γ cos)^p / p! of each two samples of a batch."""

    weight: Weight = option(400.0, "The factor of the term.", least=0)
    gamma: Scheduled = option(0.4, "γ of the Gaussian kernel exp(-γ ‖a - b‖²).", above=0, most=40)
    terms: int = option(
        3,
        "The number of terms of the series, the constant one included. Two terms are sp times "
        "(2γ)² e^(-4γ), which is 0.1292 for γ = 0.4.",
        least=2,
    )
    global_batch: bool = option(
        True,
        "Compare pairs across the batches of all ranks, and not within each rank's batch alone.",
    )

    def check(self) -> None:
        numbers: list[object] = [self.gamma]
        if isinstance(self.gamma, Schedule):
            numbers = [self.gamma.value, self.gamma.initial]
        for gamma in numbers:
            if isinstance(gamma, int | float) and share(gamma, self.terms) < _SHARE:
                raise self.refused(
                    "terms",
                    f"must be many enough for the series to come near the kernel, at gamma = "
                    f"{gamma:g} about {math.ceil(4 * gamma + 3)}; found {self.terms}, which is "
                    "less than a hundredth of it for equal samples; set more, or a smaller gamma",
                )

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        loss = Correlations(self.gamma, self.terms, global_batch=self.global_batch)
        return EmbeddingTap("cc", loss, self.weight, needs_labels=False)
