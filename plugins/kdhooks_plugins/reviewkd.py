"""ReviewKD, Chen et al., CVPR 2021, arXiv:2104.09044.

Student features are fused from deep to shallow (ABF), and each fused feature is compared with the
teacher's stage at several scales (HCL). A shallow stage of the teacher thus guides all deeper
stages of the student. Blocks, initial weights and scales are those of the authors' code.
Differs from the code: only stages are reviewed, and not the pooled embedding; only the output of a
fused feature is resized to the teacher's size, and the review continues at the student's size;
stages are tapped as the host returns them (the code takes the teacher's before their activation).
The paper's warm-up over epochs is `weight = { value = 1.0, warmup = 20, unit = "epoch" }`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import FeatureTap, Model, Options, Weight, hookimpl, option
from kdhooks_plugins._maps import Grid, paired_grids, pool

LEVELS = (4, 2, 1)
_WIDEST = 512


class ReviewedFeatures(nn.Module):
    """HCL between the teacher's stages and the student's, each fused with all deeper ones."""

    def __init__(self, ours: Sequence[Grid], theirs: Sequence[Grid], mid: int) -> None:
        super().__init__()
        self.ours, self.theirs = tuple(ours), tuple(theirs)
        self.path = ReviewPath([grid.channels for grid in ours], mid)
        self.outputs = nn.ModuleList(
            nn.Sequential(conv(mid, grid.channels, 3), nn.BatchNorm2d(grid.channels))
            for grid in theirs
        )

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        targets = [grid(x.detach()) for grid, x in zip(self.theirs, teacher, strict=True)]
        fused = self.path([grid(x) for grid, x in zip(self.ours, student, strict=True)])
        terms = [
            pyramid(F.mse_loss, output(_resized(x, target)), target, LEVELS)
            for output, x, target in zip(self.outputs, fused, targets, strict=True)
        ]
        notes = {f"stage{k}": term.detach() for k, term in enumerate(terms, start=1)}
        return torch.stack(terms).sum(), notes


class ReviewPath(nn.Module):
    """ABF without its output: each stage is gated with all deeper ones, the deepest first."""

    def __init__(self, channels: Sequence[int], mid: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(
            nn.Sequential(conv(k, mid, 1), nn.BatchNorm2d(mid)) for k in channels
        )
        self.gates = nn.ModuleList(nn.Conv2d(2 * mid, 2, 1) for _ in channels[1:])

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[(b k h w)] -> [(b m h w)], m the same for all."""
        fused = [reduce(x) for reduce, x in zip(self.inputs, features, strict=True)]
        for k in reversed(range(len(self.gates))):
            own, deeper = fused[k], _resized(fused[k + 1], fused[k])
            both = self.gates[k](torch.cat([own, deeper], dim=1)).sigmoid()
            fused[k] = own * both[:, :1] + deeper * both[:, 1:]
        return fused


def pyramid(
    distance: Callable[[Tensor, Tensor], Tensor],
    ours: Tensor,
    theirs: Tensor,
    levels: Sequence[int],
) -> Tensor:
    """(b k h w), (b k h w) -> (): HCL, the weighted mean distance at full size and pooled l x l.

    Weights are 1, ½, ¼, … A level that is no coarser than the map is left out.
    """
    total, weight, weights = distance(ours, theirs), 1.0, 1.0
    for level in levels:
        if level < min(ours.shape[-2:]):
            weight /= 2
            weights += weight
            size = (level, level)
            total = total + weight * distance(pool(ours, size), pool(theirs, size))
    return total / weights


def conv(inside: int, outside: int, size: int) -> nn.Conv2d:
    """A bias-free convolution that keeps the size, initialised as in the authors' code."""
    layer = nn.Conv2d(inside, outside, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    return layer


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """(b k h w): resized by nearest neighbours, or unchanged if it has that size already."""
    size = like.shape[-2:]
    return x if x.shape[-2:] == size else F.interpolate(x, size)


class ReviewKD(Options):
    """L = Σ_k HCL(ABF_k(F_k, …, F_n), F'_k)."""

    weight: Weight = option(
        1.0,
        "The factor of the term. The authors' scripts use 0.6 to 8, depending on the pair of "
        "networks, and 1 for ResNet-18. In the paper's CIFAR-100 training it grows over the first "
        "20 of 240 epochs.",
        least=0,
    )
    mid: int | None = option(
        None,
        "The number of channels in the fusion blocks. The default is that of the student's deepest "
        "stage, but at most 512. A step keeps several tensors (b mid h w) of the shallowest stage.",
        least=1,
    )

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours, theirs = paired_grids("reviewkd", student, teacher, at_least=2)
        mid = self.mid or min(_WIDEST, ours[-1].channels)
        return FeatureTap(
            "reviewkd",
            ReviewedFeatures(ours, theirs, mid),
            self.weight,
            student=tuple(stage.path for stage in student.stages),
            teacher=tuple(stage.path for stage in teacher.stages),
            needs_labels=False,
        )
