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
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import FeatureTap, KDHooksError, Model, hookimpl
from kdhooks.declarations import Weight
from kdhooks_plugins._attention import Energy, Logits, refuse_single_pixels, unit
from kdhooks_plugins._maps import paired_grids, pool, to_smaller
from kdhooks_plugins._warmup import WarmUp
from kdhooks_plugins.reviewkd import ReviewPath, conv, pyramid

SOURCES = ("activation", "cbam_spatial", "cbam_channel")
DIRECTIONS = ("student_review", "teacher_fused")
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
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.ours, self.theirs = tuple(ours), tuple(theirs)
        self.fusion = fusion
        self.fuse_teacher = fuse_teacher
        self.levels, self.center = tuple(levels), center
        self.warmup = WarmUp(warmup_steps)

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
        if (
            self.fusion is not None
        ):  # which could learn the teacher's maps by itself: how is it without?
            with torch.no_grad():
                bypassed = self.terms(ours, theirs)
            notes |= {f"stage{k}_unfused": term for k, term in enumerate(bypassed, start=1)}
        return self.warmup(torch.stack(terms).sum()), notes

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


class ACSR:
    """L = Σ_k HCCSL(Â_k, A'_k), Â_k the student's map k fused with all deeper ones."""

    def __init__(
        self,
        *,
        weight: Weight = 5.0,
        source: str = "activation",
        p: float = 2.0,
        student_attention: Sequence[str] = (),
        teacher_attention: Sequence[str] = (),
        direction: str = "student_review",
        mid: int = 16,
        levels: Sequence[int] = (4, 2),
        center: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        """
        weight: A-SKD's, a map.
        source: "activation" mean |F|^p of each stage; "cbam_spatial", "cbam_channel" the logits of
            CBAM gates, which both networks must have.
        student_attention, teacher_attention: for CBAM, paths of what puts the logits out, shallow
            to deep; or of the nn.Sigmoid behind them, which is undone.
        direction: "student_review": each stage of the teacher guides the student's same and all
            deeper ones, through AMFM; "teacher_fused", the literal reading: the teacher's maps,
            averaged, guide the student's last one, and nothing is learned besides.
        mid: channels inside AMFM; small, lest it learn the teacher's maps by itself.
        levels: of HCCSL besides the full size, with weights ½, ¼, …; none is 1.
        center: compare by Pearson's r instead of the cosine.
        warmup_steps: let the loss grow from 0 over so many steps; 1/12 of a training, say.
        """
        _one_of("source", source, SOURCES)
        _one_of("direction", direction, DIRECTIONS)
        for option, least, found in (
            ("p", 1, p),
            ("mid", 1, mid),
            ("warmup_steps", 0, warmup_steps),
        ):
            _at_least(option, least, found)
        if any(level < 2 for level in levels):
            raise KDHooksError(
                "acsr: levels must be at least 2, since a map of one pixel has cosine 1 with any "
                f"other; found {list(levels)}"
            )
        if source != "activation" and p != 2.0:
            raise KDHooksError(f"acsr: p belongs to source 'activation'; found '{source}'")
        if source == "cbam_channel" and direction == "teacher_fused":
            raise KDHooksError(
                "acsr: cbam_channel can't be averaged over stages, whose channels differ; use "
                "direction = 'student_review', or source = 'cbam_spatial'"
            )
        self.weight = weight
        self.source, self.p = source, p
        self.ours, self.theirs = tuple(student_attention), tuple(teacher_attention)
        self._check_paths()
        self.direction, self.mid = direction, mid
        self.levels, self.center = tuple(levels), center
        self.warmup_steps = warmup_steps

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
            warmup_steps=self.warmup_steps,
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
            [(p, Logits.at(p, self.source, student, "acsr: student")) for p in self.ours],
            [(p, Logits.at(p, self.source, teacher, "acsr: teacher")) for p in self.theirs],
        )

    def _check_paths(self) -> None:
        cbam, found = self.source != "activation", (len(self.ours), len(self.theirs))
        if not cbam and any(found):
            raise KDHooksError(
                "acsr: student_attention and teacher_attention belong to the sources "
                "'cbam_spatial' and 'cbam_channel'; found 'activation'"
            )
        needed = 1 if self.source == "cbam_channel" else 2
        if cbam and (min(found) < needed or found[0] != found[1]):
            raise KDHooksError(
                f"acsr: source '{self.source}' reads the gates of CBAM, which both networks must "
                "have (a plain IResNet, MobileFaceNet or ViT has none): name at least "
                f"{needed} of them, and as many of both, as student_attention and "
                f"teacher_attention; found {found[0]} and {found[1]}; without CBAM use source = "
                "'activation'"
            )


def _one_of(option: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise KDHooksError(f"acsr: {option} must be one of {known}; found '{found}'")


def _at_least(option: str, least: int, found: float) -> None:
    if found < least:
        raise KDHooksError(f"acsr: {option} must be at least {least}; found {found}")
