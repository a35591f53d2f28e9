"""Attention cosine similarity review (ACSR), Wang et al., IET CV 2024, doi:10.1049/cvi2.12288.

From the paper (abstract and key points): attention is distilled along a path across stages, on
which the teacher's shallow attention guides the student's deep one; a module AMFM fuses the
attention of several stages, and HCCSL compares it by cosine at several levels of a spatial pyramid.
Reconstruction: everything else. Attention is the mean of each channel and the energy of each pixel,
or the logits of CBAM's gates, as in the code of A-SKD (ECCV 2022). HCCSL has the levels and weights
of ReviewKD (arXiv:2104.09044), except the 1 x 1, on which any two maps agree.
Ours: AMFM is a convex combination with one gate per stage, so no value of its weights can turn the
student's own attention away from the teacher's; the attention before AMFM counts as much as that
after it; and each side's mean over images is subtracted, because it makes up 0.9 and more of the
cosine between the attention of any two aligned faces.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from kdhooks import FeatureTap, KDHooksError, Model, Options, Weight, hookimpl, option
from kdhooks_plugins._attention import Energy, Logits, Squeeze, refuse_single_pixels, unit
from kdhooks_plugins._attention_fusion import ChannelFusion, SpatialFusion
from kdhooks_plugins._maps import Grid, paired_grids, pool, smaller
from kdhooks_plugins._running_mean import RunningMean
from kdhooks_plugins.reviewkd import pyramid

Kind: TypeAlias = Literal["channel", "spatial"]
Reader: TypeAlias = Callable[[Tensor], Tensor]
KINDS: tuple[Kind, ...] = ("channel", "spatial")
_SHORTEST = 1e-3  # attention of length 1 that is shorter than this without its mean is rounding
Place: TypeAlias = tuple[int, Reader]  # the index of a tapped tensor, and how to read attention


class ReviewedAttention(nn.Module):
    """The mean over kinds and stages of ½ (ℓ of the own attention + ℓ of the fused one)."""

    def __init__(self, kinds: "Mapping[str, AttentionReview]") -> None:
        super().__init__()
        self.kinds = nn.ModuleDict(kinds)

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        terms: list[Tensor] = []
        notes: dict[str, Tensor] = {}
        for kind, review in self.kinds.items():
            own, fused = review(student, teacher)
            terms += [(a + b) / 2 for a, b in zip(own, fused, strict=True)]
            notes |= {f"{kind}{k}": x.detach() for k, x in enumerate(own, start=1)}
            notes |= {f"{kind}{k}_fused": x.detach() for k, x in enumerate(fused[:-1], start=1)}
        return torch.stack(terms).mean(), notes


class AttentionReview(nn.Module):
    """One kind of attention in all stages: AMFM fuses the student's, and HCCSL compares it."""

    def __init__(
        self,
        ours: Sequence[Place],
        theirs: Sequence[Place],
        shapes: Sequence[tuple[int, int, int]],
        fusion: nn.Module,
        *,
        levels: Sequence[int] = (4, 2),
        momentum: float | None = 0.9,
    ) -> None:
        """shapes: [(k h w)] of the teacher's attention, in which both sides are compared.

        momentum: of the means over images; None to subtract no means.
        """
        super().__init__()
        self.ours, self.theirs = tuple(ours), tuple(theirs)
        self.sizes = tuple((h, w) for _, h, w in shapes)
        self.fusion, self.levels = fusion, tuple(levels)
        self.means = nn.ModuleDict()
        if momentum is not None:
            for name in ("teacher", "own", "fused"):
                self.means[name] = nn.ModuleList(
                    RunningMean(*shape, momentum=momentum) for shape in shapes
                )

    def forward(
        self, student: list[Tensor], teacher: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """[(b k h w)], [(b k h w)] -> [()], [()]: ℓ_k of the own attention and of the fused one."""
        with torch.no_grad():
            targets = self.less_mean("teacher", self.read(self.theirs, teacher))
        own, fused = self.fusion(self.read(self.ours, student))
        return (
            self.distances(self.less_mean("own", own), targets),
            self.distances(self.less_mean("fused", fused), targets),
        )

    def read(self, places: Sequence[Place], tapped: Sequence[Tensor]) -> list[Tensor]:
        """-> [(b k h w)]: the attention of each stage at length 1, in the size for comparison."""
        pairs = zip(places, self.sizes, strict=True)
        return [unit(pool(read(tapped[place]), size)) for (place, read), size in pairs]

    def less_mean(self, name: str, attention: list[Tensor]) -> list[Tensor]:
        """[(b k h w)] -> [(b k h w)]: subtract the mean over the images, as a constant."""
        if name not in self.means:
            return attention
        means = self.means[name].children()
        return [mean(x) for mean, x in zip(means, attention, strict=True)]

    def distances(self, ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
        """[(b k h w)], [(b k h w)] -> [()]."""
        pairs = zip(ours, theirs, strict=True)
        return [context_distance(a, b, self.levels) for a, b in pairs]


def context_distance(ours: Tensor, theirs: Tensor, levels: Sequence[int]) -> Tensor:
    """(b k h w), (b k h w) -> (): HCCSL, 1 - cos at full size and pooled.

    Attention that equals its mean, as in a first batch of one image, leaves only rounding, and
    scaling rounding to length 1 could make its gradient arbitrarily large.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        shortest = _SHORTEST * math.sqrt(a[0].numel() / ours[0].numel())  # pooled maps are shorter
        return 1 - (unit(a, shortest) * unit(b, shortest)).flatten(1).sum(dim=1).mean()

    return pyramid(distance, ours, theirs, levels)


class ACSR(Options):
    """L = mean over kinds and stages of ½ HCCSL(A_k, A'_k) + ½ HCCSL(Â_k, A'_k), Â = AMFM(A)."""

    weight: Weight = option(
        30.0,
        "The factor of the term, which is a mean over kinds and stages and therefore at most 2; "
        "try 10, 30 and 100.",
        least=0,
    )
    attention: Literal["both", "channel", "spatial"] = option(
        "both",
        "channel: the mean of each channel over the pixels; spatial: the energy of each pixel, "
        "mean |F|^p over the channels; both: both of them. If you name gates, their logits are "
        "used instead.",
    )
    p: float = option(2.0, "The power p of the pixels' energy.", least=1)
    student_channel_gates: Sequence[str] = option(
        (),
        "For CBAM: the path of a channel gate for each stage, shallow to deep. Name the module "
        "that returns the logits, or the nn.Sigmoid after it, which is inverted.",
    )
    teacher_channel_gates: Sequence[str] = option((), "The same paths in the teacher.")
    student_spatial_gates: Sequence[str] = option(
        (), "The path of a spatial gate for each stage, like student_channel_gates."
    )
    teacher_spatial_gates: Sequence[str] = option((), "The same paths in the teacher.")
    levels: Sequence[int] = option(
        (4, 2),
        "The sizes to which HCCSL pools maps in addition to their full size, with weights ½, ¼, …. "
        "1 is refused, since a map of one pixel has cosine 1 with any other.",
        least=2,
    )
    center: bool = option(
        True,
        "Subtract from the attention of each side its own mean over images before comparing. "
        "A-SKD, which compares gates, does not: false is its plain cosine.",
    )
    momentum: float = option(
        0.9,
        "The share of the old mean in each step's new one, if `center` is true. The first steps "
        "average the images so far. A student that changes quickly needs a lower momentum.",
        least=0,
        below=1,
    )

    def check(self) -> None:
        for kind in KINDS:
            names = [f"{side}_{kind}_gates" for side in ("student", "teacher")]
            ours, theirs = (len(getattr(self, name)) for name in names)
            if (ours or theirs) and self.attention not in (kind, "both"):
                raise self.refused(
                    "attention",
                    f"'{self.attention}' uses no {kind} gates; found {ours} of the student and "
                    f"{theirs} of the teacher; leave them out, or set attention = 'both'",
                )
            if ours != theirs:
                raise self.refused(
                    names[0],
                    f"and {names[1]} must name equally many, since both networks must have the "
                    f"gates of CBAM (a plain IResNet, MobileFaceNet or ViT has none); found {ours} "
                    f"and {theirs}; unless both sides have CBAM, name none",
                )
        if self.has("p") and (self.attention == "channel" or self.student_spatial_gates):
            raise self.refused(
                "p", "belongs to the pixels' energy, which is not compared here; leave it out"
            )
        if self.has("momentum") and not self.center:
            raise self.refused("momentum", "belongs to center = true; found center = false")

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours, theirs = paired_grids("acsr", student, teacher, at_least=2)
        sides = Side("student", student, ours), Side("teacher", teacher, theirs)
        kinds: dict[str, AttentionReview] = {}
        if self.attention != "spatial":
            kinds["channel"] = self._review(
                "channel",
                sides,
                [(grid.channels, 1, 1) for grid in theirs],
                ChannelFusion([grid.channels for grid in ours], [g.channels for g in theirs]),
            )
        if self.attention != "channel":
            refuse_single_pixels([*ours, *theirs])
            sizes = (smaller(a.size, b.size) for a, b in zip(ours, theirs, strict=True))
            kinds["spatial"] = self._review(
                "spatial", sides, [(1, *size) for size in sizes], SpatialFusion(len(ours))
            )
        return FeatureTap(
            "acsr",
            ReviewedAttention(kinds),
            self.weight,
            student=tuple(sides[0].paths),
            teacher=tuple(sides[1].paths),
            needs_labels=False,
        )

    def _review(
        self,
        kind: Kind,
        sides: "tuple[Side, Side]",
        shapes: Sequence[tuple[int, int, int]],
        fusion: nn.Module,
    ) -> AttentionReview:
        ours, theirs = (
            side.places(kind, getattr(self, f"{side.name}_{kind}_gates"), self.p) for side in sides
        )
        momentum = self.momentum if self.center else None
        return AttentionReview(ours, theirs, shapes, fusion, levels=self.levels, momentum=momentum)


class Side:
    """The taps of the student or of the teacher; both kinds can use the same tap."""

    def __init__(self, name: str, model: Model, grids: Sequence[Grid]) -> None:
        self.name, self.model, self.grids = name, model, grids
        self.paths: list[str] = []

    def places(self, kind: Kind, gates: Sequence[str], p: float) -> list[Place]:
        """Return, for each stage, the index of its tap and how to read the attention from it."""
        if not gates:
            paths = [stage.path for stage in self.model.stages]
            readers: list[Reader] = [
                Squeeze(grid) if kind == "channel" else Energy(grid, p) for grid in self.grids
            ]
        elif len(gates) != len(self.grids):
            raise KDHooksError(
                f"acsr: {self.name}_{kind}_gates must name one gate per stage; found {len(gates)} "
                f"gates and {len(self.grids)} stages; name as many as taps.{self.name}.stages, or "
                f"{self.name}_stages="
            )
        else:
            paths = list(gates)
            readers = [
                Logits.at(path, kind, self.model, f"acsr: {self.name}", grid.channels)
                for path, grid in zip(gates, self.grids, strict=True)
            ]
        self.paths += [path for path in paths if path not in self.paths]
        return [(self.paths.index(path), read) for path, read in zip(paths, readers, strict=True)]
