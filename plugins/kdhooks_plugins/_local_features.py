"""The loss of cakd: it matches both sides' local features and their attention to each other."""

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import KDHooksError, Scheduled, Varying
from kdhooks_plugins._urfm import LocalCentres, PixelFeatures, SelfAttention, standardised

_LEAST = 1e-10  # the lower bound of a mean square used as a divisor


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
        fixed: bool = False,
        anchor: nn.Linear | None = None,
        anchor_weight: Scheduled = 1.0,
        collapse_below: float = 1e-5,
        check_every: int = 0,
    ) -> None:
        """
        msa: one self-attention for both sides, or the student's and the teacher's.
        prompted: whether gradients flow back into the teacher's features.
        fixed: matching does not train the teacher's side, which gets its own URFM and
            self-attention, with the same initial weights.
        anchor: recovers the teacher's embedding, the second of its features, from y_T, which trains
            the teacher's side; without an anchor a fixed side keeps its initial weights.
        """
        super().__init__()
        self.ours, self.theirs, self.urfm = ours, theirs, urfm
        self.target = copy.deepcopy(urfm) if fixed else None
        self.msa = nn.ModuleList([*msa, copy.deepcopy(msa[0])] if fixed else msa)
        self.attention = attention
        self.attention_weight = Varying(attention_weight)
        self.feature_weight = Varying(feature_weight)
        self.standardise = standardise
        self.prompted = prompted
        self.collapse_below, self.check_every = collapse_below, check_every
        self.anchor, self.anchor_weight = anchor, Varying(anchor_weight)
        self._calls = 0
        if self.target is not None and anchor is None:
            for module in (self.theirs, self.target, self.msa[-1]):
                freeze(module)

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        h_s = self.urfm(*self.ours(student[0], self.urfm.table))
        y_s, map_s = self.msa[0](h_s)
        urfm = self.urfm if self.target is None else self.target
        theirs = teacher[0] if self.prompted else teacher[0].detach()
        y_t, map_t = self.msa[-1](urfm(*self.theirs(theirs, urfm.table)))
        variance = relative_variance(y_t.detach())
        if self.training and len(y_t) > 1:
            self._refuse_collapse(variance)
        if self.standardise:
            y_s, y_t = standardised(y_s), standardised(y_t)
        notes: dict[str, Tensor] = {}
        if self.anchor is not None:
            notes["anchor"] = self._distance_to_anchor(y_t, teacher[1])
            y_t, map_t = y_t.detach(), map_t.detach()
        attention = attention_distance(map_s, map_t, self.attention)
        feature = F.mse_loss(y_s, y_t)
        total = self.attention_weight.now * attention + self.feature_weight.now * feature
        if self.anchor is not None:
            total = total + self.anchor_weight.now * notes["anchor"]
        return total, {
            **notes,
            "attention": attention,
            "feature": feature,
            "token_variance": variance,
            "centre_cosine": self.urfm.similarity(),
        }

    def _distance_to_anchor(self, y: Tensor, embedding: Tensor) -> Tensor:
        """(b l d), (b e) -> (): 1 - cos of the anchor's output and the teacher's embedding."""
        assert self.anchor is not None
        return 1 - F.cosine_similarity(self.anchor(y.flatten(1)), embedding.detach()).mean()

    def _refuse_collapse(self, variance: Tensor) -> None:
        """Check only every `check_every` calls, because the check waits for the device."""
        self._calls += 1
        if self.check_every and self._calls % self.check_every == 0:
            found = float(variance)
            if found < self.collapse_below:
                raise KDHooksError(
                    "cakd: the teacher's local features must differ between the images of a "
                    f"batch; found a relative variance of {found:.1e}, below collapse.below = "
                    f"{self.collapse_below:.1e}: both sides agree on constants; set "
                    "matching.standardise = true, matching.teacher_side = 'fixed', or a smaller "
                    "weight or learning rate"
                )


def freeze(module: nn.Module) -> None:
    """Turn the module's parameters into buffers of the same names: saved, and never trained."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())


def relative_variance(y: Tensor) -> Tensor:
    """(b l d) -> (): variance over the batch by the mean square; 0 if all samples are the same."""
    return y.var(dim=0, correction=0).mean() / y.square().mean().clamp(min=_LEAST)


def attention_distance(ours: Tensor, theirs: Tensor, kind: str) -> Tensor:
    """Logs of maps (b heads l l), twice -> (): KL of their rows, or l² · MSE."""
    if kind == "kl":
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1).mean()
    return ours.shape[-1] ** 2 * F.mse_loss(ours.exp(), theirs.exp())
