"""The loss of cakd: both sides' local features, and their attention to each other, are matched."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import KDHooksError, Scheduled, Varying
from kdhooks_plugins._urfm import LocalCentres, PixelFeatures, SelfAttention

_EPS = 1e-5  # added to a variance


class LocalFeatures(nn.Module):
    """λ_a · d(Attn_S, Attn_T) + λ_f · MSE(MSA(h_S), MSA(h_T)), h the local features (b l d)."""

    def __init__(
        self,
        ours: PixelFeatures,
        theirs: PixelFeatures,
        urfm: LocalCentres,
        msa: Sequence[SelfAttention],
        *,
        attention: str = "mse",
        attention_weight: Scheduled = 1.0,
        feature_weight: Scheduled = 1.0,
        standardise: bool = True,
        prompted: bool = False,
        detach_teacher_side: bool = False,
        collapse_below: float = 1e-3,
        check_every: int = 0,
    ) -> None:
        """msa: one for both sides, or the student's and the teacher's."""
        super().__init__()
        self.ours, self.theirs, self.urfm = ours, theirs, urfm
        self.msa = nn.ModuleList(msa)
        self.attention = attention
        self.attention_weight = Varying(attention_weight)
        self.feature_weight = Varying(feature_weight)
        self.standardise = standardise
        self.prompted, self.detach_teacher_side = prompted, detach_teacher_side
        self.collapse_below, self.check_every = collapse_below, check_every
        self._calls = 0

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        table = self.urfm.table
        h_s = self.urfm(*self.ours(student[0], table))
        h_t = self.urfm(*self.theirs(teacher[0] if self.prompted else teacher[0].detach(), table))
        y_s, map_s = self.msa[0](h_s)
        y_t, map_t = self.msa[-1](h_t)
        if self.detach_teacher_side:
            y_t, map_t = y_t.detach(), map_t.detach()
        variance = relative_variance(y_t.detach())
        if self.training and len(y_t) > 1:
            self._refuse_collapse(variance)
        if self.standardise:
            y_s, y_t = standardised(y_s), standardised(y_t)
        attention = attention_distance(map_s, map_t, self.attention)
        feature = F.mse_loss(y_s, y_t)
        total = self.attention_weight.now * attention + self.feature_weight.now * feature
        return total, {
            "attention": attention,
            "feature": feature,
            "token_variance": variance,
            "centre_cosine": self.urfm.similarity(),
        }

    def _refuse_collapse(self, variance: Tensor) -> None:
        """Looked at now and then, since it waits for the device."""
        self._calls += 1
        if self.check_every and self._calls % self.check_every == 0:
            found = float(variance)
            if found < self.collapse_below:
                raise KDHooksError(
                    "cakd: the teacher's local features must differ between the images of a "
                    f"batch; found a relative variance of {found:.1e}, below collapse.below = "
                    f"{self.collapse_below:.1e}: both sides agree on constants; set "
                    "matching.standardise = true, matching.detach_teacher_side = true, or a "
                    "smaller weight or learning rate"
                )


def relative_variance(y: Tensor) -> Tensor:
    """(b l d) -> (): over the batch, by the mean square; 0 where all samples are the same."""
    return y.var(dim=0, correction=0).mean() / y.square().mean().clamp(min=_EPS**2)


def standardised(y: Tensor) -> Tensor:
    """(b l d) -> (b l d): mean 0 and variance 1 over the batch, each number of each token."""
    centred = y - y.mean(dim=0)
    return centred * (centred.square().mean(dim=0) + _EPS).rsqrt()


def attention_distance(ours: Tensor, theirs: Tensor, kind: str) -> Tensor:
    """Logs of maps (b heads l l), twice -> (): KL of their rows, or l² · MSE."""
    if kind == "kl":
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1).mean()
    return ours.shape[-1] ** 2 * F.mse_loss(ours.exp(), theirs.exp())
