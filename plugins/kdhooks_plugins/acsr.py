"""Attention cosine similarity review (ACSR), Wang et al., IET CV 2024, doi:10.1049/cvi2.12288.

From the paper (abstract and key points): along a path across stages, the teacher's shallow
attention maps guide the student's deep one; a module AMFM fuses the maps of several stages, and
HCCSL compares them by cosine at several levels of a spatial pyramid.
Reconstruction: all else, from ReviewKD (arXiv:2104.09044) and the code of A-SKD (ECCV 2022).
AMFM is ReviewKD's review path on single-channel maps; HCCSL has its levels and weights, less the
1 x 1: one non-negative pixel has cosine 1 with any other, which only dilutes the mean. Pearson's
correlation stands in for the cosine by default, since the energy maps of wide stages are nearly
constant, so that their plain cosine is close to 1 from the start. Channel attention is neither
fused nor pooled, because channels have no order.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import FeatureTap, KDHooksError, Model, Options, Weight, hookimpl, option
from kdhooks_plugins._attention import Energy, Logits, refuse_single_pixels, unit
from kdhooks_plugins._maps import paired_grids, pool, to_smaller
from kdhooks_plugins.reviewkd import ReviewPath, conv, pyramid

Source: TypeAlias = Literal["activation", "cbam_spatial", "cbam_channel"]
Reader: TypeAlias = tuple[str, Energy | Logits]


class ReviewedAttention(nn.Module):
    """Σ_k ℓ_k, ℓ_k the HCCSL between map k of the teacher and of the student's review."""

    def __init__(
        self,
        ours: Sequence[Energy | Logits],
        theirs: Sequence[Energy | Logits],
        *,
        fusion: nn.Module | None = None,
        fuse_teacher: bool = False,
        levels: Sequence[int] = (4, 2),
        center: bool = True,
    ) -> None:
        super().__init__()
        self.ours, self.theirs = tuple(ours), tuple(theirs)
        self.fusion = fusion
        self.fuse_teacher = fuse_teacher
        self.levels, self.center = tuple(levels), center

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        ours = [read(x) for read, x in zip(self.ours, student, strict=True)]
        theirs = [read(x.detach()) for read, x in zip(self.theirs, teacher, strict=True)]
        if self.fuse_teacher:
            theirs = [average(theirs, self.center)]
        terms = self.terms(self.fusion(ours) if self.fusion is not None else ours, theirs)
        name = "fused" if self.fuse_teacher else "stage"
        notes = {f"{name}{k}": term.detach() for k, term in enumerate(terms, start=1)}
        if self.fusion is not None:
            # The fusion could learn the teacher's maps by itself: how far are they without it?
            with torch.no_grad():
                bypassed = self.terms(ours, theirs)
            notes |= {f"stage{k}_unfused": term for k, term in enumerate(bypassed, start=1)}
        return torch.stack(terms).sum(), notes

    def terms(self, ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
        """[(b 1 h w)], [(b 1 h w)] -> [()]: ℓ_k."""
        terms = []
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
            if a.shape[1] != b.shape[1]:
                raise KDHooksError(
                    "acsr: cbam_channel compares channel by channel, so both sides must have "
                    f"equally many; found {a.shape[1]} of the student and {b.shape[1]} of the "
                    f"teacher in pair {k}; use source = 'cbam_spatial'"
                )
            terms.append(context_distance(a, b, self.levels, self.center))
        return terms


class AttentionFusion(nn.Module):
    """AMFM: review single-channel maps from deep to shallow, and make each a map again."""

    def __init__(self, stages: int, mid: int, positive: bool) -> None:
        super().__init__()
        self.path = ReviewPath([1] * stages, mid)
        self.outputs = nn.ModuleList(conv(mid, 1, 3) for _ in range(stages))
        self.positive = positive

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """[(b 1 h w)] -> [(b 1 h w)]."""
        fused = [out(u) for out, u in zip(self.outputs, self.path(maps), strict=True)]
        return [F.softplus(x) for x in fused] if self.positive else fused


def context_distance(ours: Tensor, theirs: Tensor, levels: Sequence[int], center: bool) -> Tensor:
    """(b 1 h w), (b 1 h' w') -> (): HCCSL, 1 - cos at full size and pooled; if center, 1 - r."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - (unit(a, center) * unit(b, center)).sum(dim=1).mean()

    return pyramid(distance, *to_smaller(ours, theirs), levels)


def average(maps: Sequence[Tensor], center: bool) -> Tensor:
    """[(b 1 h w)] -> (b 1 h w): at the last one's size and at unit length, so none outweighs."""
    small = [pool(x, (maps[-1].shape[2], maps[-1].shape[3])) for x in maps]
    return torch.stack([unit(x, center).view_as(x) for x in small]).mean(dim=0)


class ACSR(Options):
    """L = Σ_k HCCSL(Â_k, A'_k), Â_k the student's map k fused with all deeper ones."""

    weight: Weight = option(
        5.0, "The factor of the term; try 1, 5 and 20. 5 is A-SKD's, for one map.", least=0
    )
    source: Source = option(
        "activation",
        "The source of the attention maps. activation: mean |F|^p of each stage; cbam_spatial, "
        "cbam_channel: the logits of the gates of CBAM, which both networks must have.",
    )
    p: float = option(2.0, "The power p of the source `activation`.", least=1)
    student_attention: Sequence[str] = option(
        (),
        "For CBAM: the paths of the modules that return the logits, shallow to deep; or of the "
        "nn.Sigmoid behind each of them, which is inverted.",
    )
    teacher_attention: Sequence[str] = option((), "The same paths in the teacher.")
    direction: Literal["student_review", "teacher_fused"] = option(
        "student_review",
        "student_review: each stage of the teacher guides the same stage of the student and all "
        "deeper ones, through AMFM; teacher_fused, the literal reading of the paper: the average "
        "of the teacher's maps guides the student's last map, and the loss learns nothing itself.",
    )
    mid: int = option(
        16,
        "The number of channels inside of AMFM. With many, AMFM learns the teacher's maps by "
        "itself.",
        least=1,
    )
    levels: Sequence[int] = option(
        (4, 2),
        "The sizes that HCCSL pools maps to, besides their full size, with weights ½, ¼, …. A map "
        "of one pixel would have cosine 1 with any other.",
        least=2,
    )
    center: bool = option(True, "Compare by Pearson's correlation instead of the cosine.")

    def check(self) -> None:
        cbam = self.source != "activation"
        if cbam and self.has("p"):
            raise self.refused("p", f"belongs to source 'activation'; found '{self.source}'")
        if self.source == "cbam_channel" and self.direction == "teacher_fused":
            raise self.refused(
                "source",
                "'cbam_channel' can't be averaged over stages, whose channels differ; use "
                "direction = 'student_review', or source = 'cbam_spatial'",
            )
        ours, theirs = len(self.student_attention), len(self.teacher_attention)
        if not cbam and (ours or theirs):
            raise self.refused(
                "student_attention",
                "and teacher_attention belong to the sources 'cbam_spatial' and 'cbam_channel'; "
                "found 'activation'",
            )
        needed = 1 if self.source == "cbam_channel" else 2
        if cbam and (ours < needed or ours != theirs):
            raise self.refused(
                "source",
                f"'{self.source}' reads the gates of CBAM, which both networks must have (a plain "
                f"IResNet, MobileFaceNet or ViT has none): name at least {needed} of them, and "
                f"as many of both, as student_attention and teacher_attention; found {ours} and "
                f"{theirs}; without CBAM use source = 'activation'",
            )

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours, theirs = self._readers(student, teacher)
        fuse_teacher = self.direction == "teacher_fused"
        if fuse_teacher:
            ours = ours[-1:]
        fusion = None
        if not fuse_teacher and self.source != "cbam_channel":
            fusion = AttentionFusion(len(ours), self.mid, positive=self.source == "activation")
        loss = ReviewedAttention(
            [read for _, read in ours],
            [read for _, read in theirs],
            fusion=fusion,
            fuse_teacher=fuse_teacher,
            levels=self.levels,
            center=self.center,
        )
        return FeatureTap(
            "acsr",
            loss,
            self.weight,
            student=tuple(path for path, _ in ours),
            teacher=tuple(path for path, _ in theirs),
            needs_labels=False,
        )

    def _readers(self, student: Model, teacher: Model) -> tuple[list[Reader], list[Reader]]:
        """What is tapped on both sides, and how it becomes a map."""
        if self.source == "activation":
            ours, theirs = paired_grids("acsr", student, teacher, at_least=2)
            refuse_single_pixels([*ours, *theirs])
            return (
                [(s.path, Energy(g, self.p)) for s, g in zip(student.stages, ours, strict=True)],
                [(s.path, Energy(g, self.p)) for s, g in zip(teacher.stages, theirs, strict=True)],
            )
        return (
            [
                (p, Logits.at(p, self.source, student, "acsr: student"))
                for p in self.student_attention
            ],
            [
                (p, Logits.at(p, self.source, teacher, "acsr: teacher"))
                for p in self.teacher_attention
            ],
        )
