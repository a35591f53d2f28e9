"""Correlation Congruence (CC, CCKD), Peng et al., ICCV 2019, arXiv:1904.01802.

Two samples should be as correlated for the student as for the teacher. The correlation is a
Gaussian RBF kernel in the form of its Taylor series, whose higher powers emphasise similar samples.
From the paper: the kernel and its series. γ is that of TFace's comparison of face distillation
(Huang et al., CVPR 2022), which has the same form on embeddings; the default weight is ours.
Differs from the paper: this method has only the relations. The paper adds them to the consistency
of single instances, which `kd` or `fcd` can compute next to this method. TFace sums two terms of
the series, which is `sp` times a constant; three are the default here. RepDistiller names another
loss after the paper: products of the differences of neighbours in a batch.
Pairs include the batches of all ranks, unless global_batch is False.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import EmbeddingTap, Options, Schedule, Scheduled, Varying, Weight, hookimpl, option
from kdhooks.classes.ranks import gather, world

_SHARE = 0.01  # the least part of the kernel; a smaller series has almost no gradient
_ENOUGH = 200  # further terms change nothing for any allowed gamma


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
        """(b d) -> (b b): the series of exp(-γ ‖a - b‖²) in cos(a, b), by Horner's rule."""
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
    """L = mean (K_s - K_t)², K = e^(-2γ) Σ_p (2γ cos)^p / p! of all pairs of a batch."""

    weight: Weight = option(400.0, "The factor of the term.", least=0)
    gamma: Scheduled = option(0.4, "γ of the Gaussian kernel exp(-γ ‖a - b‖²).", above=0, most=40)
    terms: int = option(
        3,
        "The number of terms of the series, including the constant one. With two terms the loss is "
        "sp times (2γ)² e^(-4γ), which is 0.1292 for γ = 0.4.",
        least=2,
    )
    global_batch: bool = option(
        True,
        "Compare pairs across the batches of all ranks, and not only within each rank's batch.",
    )

    def check(self) -> None:
        numbers: list[object] = [self.gamma]
        if isinstance(self.gamma, Schedule):
            numbers = [self.gamma.value, self.gamma.initial]
        for gamma in numbers:
            if isinstance(gamma, int | float) and share(gamma, self.terms) < _SHARE:
                raise self.refused(
                    "terms",
                    f"must be enough for the series to approximate the kernel, at gamma = "
                    f"{gamma:g} about {math.ceil(4 * gamma + 3)}; found {self.terms}, which reach "
                    "less than a hundredth of it for equal samples; set more, or a smaller gamma",
                )

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        loss = Correlations(self.gamma, self.terms, global_batch=self.global_batch)
        return EmbeddingTap("cc", loss, self.weight, needs_labels=False)
