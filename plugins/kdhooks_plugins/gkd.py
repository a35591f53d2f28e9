"""Grouped knowledge distillation (GKD), Zhao et al., AAAI 2023, arXiv:2304.04462.

From the paper and its code: each sample's classes are divided into a primary group, which the
student finds likely, and the rest. The student follows the teacher inside of the group, and in the
probability of the whole group. The order among the rest is noise, and is ignored.
By default a group has a fixed size, as in the code. With `tau` its size is specific to each sample,
as in the paper. Scores are scale · cos, with the code's margin.
By default scores are divided by their standard deviation over the classes before they are softened
(Sun et al., CVPR 2024, arXiv:2403.01731). Without that, the term's gradient is 30 times that of the
labels' loss at scale 64; `standardize = false` is the paper's form.
The paper's warm-up is `weight = { value = 1.0, warmup = 10, unit = "epoch" }`.
"""

import torch
from torch import Tensor, nn

from kdhooks import (
    ClassShard,
    ComparedClassifiers,
    Options,
    Scheduled,
    Varying,
    Wanted,
    Weight,
    hookimpl,
    option,
)
from kdhooks_plugins._margin import GONE, scores
from kdhooks_plugins._standard_scores import standard

_BINS = 1 << 12  # in float32, the bins that split one of these bins are as narrow as rounding


class GroupedScores(nn.Module):
    """T² · (primary · KL inside of the group + binary · KL of the probability of the group)."""

    def __init__(
        self,
        primary: Scheduled,
        binary: Scheduled,
        tau: float,
        largest: int,
        temperature: Scheduled,
        scale: float,
        margin: Scheduled,
        standardize: bool,
    ) -> None:
        super().__init__()
        self.primary, self.binary = Varying(primary), Varying(binary)
        self.tau, self.largest, self.scale = tau, largest, scale
        self.standardize = standardize
        self.temperature, self.margin = Varying(temperature), Varying(margin)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        classifier: ClassShard,
        head: ClassShard,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier, head -> ()."""
        teacher, temperature = teacher.detach(), self.temperature.now
        classifier = classifier.frozen().measured()
        head = head.measured()
        least, size = self.group(student, labels, head)

        z = None
        if self.standardize:
            z = standard(
                (student, head),
                (teacher, classifier),
                labels,
                scale=self.scale,
                margin=self.margin.now,
                temperature=temperature,
            )

        def compare(student: Tensor, chunk: ClassShard) -> Wanted:
            z_s = scores(student, labels, chunk, self.scale, self.margin.now)
            z_t = scores(teacher, labels, classifier.part(chunk), self.scale, self.margin.now)
            rest = (_own_first(z_s.detach(), labels, chunk) < least[:, None]).to(z_s)
            moments = z.moments(z_s) if z else []
            z_s, z_t = z(z_s, z_t) if z else (z_s / temperature, z_t / temperature)
            in_s, in_t = z_s + GONE * rest, z_t + GONE * rest
            out_s, out_t = z_s + GONE * (1 - rest), z_t + GONE * (1 - rest)
            means = [(z_t - z_s, in_t)]
            if z:
                means += [(z_s.detach(), by.detach()) for by in (in_t, in_s, out_s)] + moments
            return Wanted(logs=[in_s, out_s, in_t, out_t], means=means)

        (in_s, out_s, in_t, out_t), (gap, *rest) = head.over_classes(compare, student)
        if z:  # adds the gradient through the deviation of the student's scores
            *means, mean, square = rest
            change = z.change(mean, square)
            by_teacher, inside, outside = (mean * change for mean in means)
            gap, in_s, out_s = gap - by_teacher, in_s + inside, out_s + outside
        primary = gap - in_t + in_s
        log_s, log_t = _shares(in_s, out_s), _shares(in_t, out_t)
        binary = (log_t.exp() * (log_t - log_s)).sum(dim=0)
        divergence = self.primary.now * primary + self.binary.now * binary
        loss = temperature**2 * divergence.mean()
        return loss, {
            "primary": primary.detach().mean(),
            "binary": binary.detach().mean(),
            "group": size.mean(),
        }

    @torch.no_grad()
    def group(self, student: Tensor, labels: Tensor, head: ClassShard) -> tuple[Tensor, Tensor]:
        """(b d), (b), head -> (b), (b): the lowest score in a sample's group, and its size.

        The own class always comes first. The likeliest others follow until the group reaches the
        probability tau, or is full. Equal scores join the group together, so ties may exceed its
        largest size. The search divides the range of scores into bins, finds the bin that holds the
        lowest score, and divides that bin again, until the bins are as narrow as rounding.
        """
        low, width = student.new_full((len(student),), -1.1 * self.scale), 2.2 * self.scale
        while True:
            # The range is slightly wider than the bin: rounding may have put a class into it.
            low, width = low - 0.01 * width, 1.02 * width / _BINS
            low, size = self._last_full(student, labels, head, low, width)
            if width < 2 * torch.finfo(low.dtype).eps * self.scale:
                return low, size

    def _last_full(
        self, student: Tensor, labels: Tensor, head: ClassShard, low: Tensor, width: float
    ) -> tuple[Tensor, Tensor]:
        """(b d), (b), head, (b) -> (b), (b): the highest score low + k · width that fills a group.

        It is low if no such score does. The second result is the size of that group.
        """
        count, mass = head.sum(self._at_least(student, labels, head, low, width))
        enough = self.tau if self.tau < 1 else torch.inf
        full = (mass >= enough) | (count >= self.largest)  # true up to some k, then false
        place = (full.sum(dim=1, keepdim=True) - 1).clamp(min=0)
        return low + place[:, 0].to(low) * width, count.gather(1, place)[:, 0]

    def _at_least(
        self, student: Tensor, labels: Tensor, head: ClassShard, low: Tensor, width: float
    ) -> Tensor:
        """(b d), (b), head, (b) -> (2 b n): the number and the probability of classes for each k.

        Counted are the classes of this rank that score low + k · width or more, and the own class.
        """
        bins = student.new_zeros(2, len(student), _BINS + 2)  # the outer two: all below, all above
        peak = torch.full_like(low, -torch.inf)
        for chunk in head.chunks(student):
            z = scores(student, labels, chunk, self.scale, self.margin.now)
            before, peak = peak, torch.maximum(peak, z.amax(dim=1))
            place = (_own_first(z, labels, chunk) - low[:, None]) / width + 1
            index = place.nan_to_num().clamp(0, _BINS + 1).long()
            bins[0].scatter_add_(1, index, z.new_ones(()).expand_as(z))
            bins[1] *= (before - peak).exp()[:, None]
            bins[1].scatter_add_(1, index, (z - peak[:, None]).exp())
        count, mass = bins.flip(2).cumsum(dim=2).flip(2)
        log_all = head.logsumexp(mass[:, 0].log() + peak)
        return torch.stack([count, mass * (peak - log_all).exp()[:, None]])[:, :, 1:-1]


def _own_first(z: Tensor, labels: Tensor, chunk: ClassShard) -> Tensor:
    """(b k), (b), chunk -> (b k): scores in which the own class ranks above all others."""
    return chunk.add(z, labels, z.new_full((len(z),), -GONE))


def _shares(inside: Tensor, outside: Tensor) -> Tensor:
    """(b), (b) -> (2 b): the log-probabilities of a group and of the rest in a softmax."""
    both = torch.stack([inside, outside])
    return both - both.logsumexp(dim=0)


class GKD(Options):
    """L = T² · mean(primary · KL inside of the group + binary · KL of its probability)."""

    weight: Weight = option(
        1.0, "The factor of the term. The paper warms it up over ten epochs.", least=0
    )
    primary: Scheduled = option(
        8.0, "λ1, the factor of the KL divergence inside of the group.", least=0
    )
    binary: Scheduled = option(
        1.0, "λ2, the factor of the KL divergence of the group's total probability.", least=0
    )
    tau: float = option(
        1.0,
        "The total probability of a group's classes, for the student at temperature 1; the paper "
        "has 0.93. With 1 a group always has `largest` classes.",
        above=0,
        most=1,
    )
    largest: int = option(10_000, "The largest number of classes in a group.", least=1)
    temperature: Scheduled = option(4.0, "T, which softens the scores of both sides.", above=0)
    scale: float = option(
        64.0, "σ, the factor of the cosines of both sides; usually the trainer's scale.", above=0
    )
    margin: Scheduled = option(
        0.4,
        "m, subtracted from the cosine of the sample's own class on both sides, as in CosFace. "
        "With `tau` and without a margin a group soon holds only the own class, and `primary` "
        "trains nothing.",
        least=0,
        most=2,
    )

    standardize: bool = option(
        True,
        "Divide each sample's scores by their standard deviation over the classes before T; false: "
        "keep them at scale σ, as in the paper. Groups always use the scores at scale σ.",
    )

    def check(self) -> None:
        if self.primary == self.binary == 0:
            raise self.refused("primary", "or binary must be above 0; found 0 twice")

    @hookimpl
    def classifier_share(self) -> ComparedClassifiers:
        loss = GroupedScores(
            self.primary,
            self.binary,
            self.tau,
            self.largest,
            self.temperature,
            self.scale,
            self.margin,
            self.standardize,
        )
        return ComparedClassifiers("gkd", loss, self.weight)
