"""Grouped knowledge distillation (GKD), Zhao et al., AAAI 2023, arXiv:2304.04462.

From the paper and what its code computes: each sample's classes fall into a primary group, which
the student finds likely, and the rest. The student follows the teacher inside of the group, and in
how much falls into it; the order among the rest is noise, and left out.
Differs from the code: each sample has a group of its own size, as in the paper, where the code
takes a fixed one, or one for a batch; scores are scale · cos, with the margin that the code's have.
The warm-up over ten epochs is `weight = { value = 1.0, warmup = … }`.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import ClassifierShare, ClassShard, KDHooksError, Wanted, hookimpl
from kdhooks.declarations import Weight
from kdhooks_plugins._margin import GONE, scores

_HALVINGS = 40  # of the range of scores, until a threshold lies between two of them


class GroupedScores(nn.Module):
    """T² · (primary · KL inside of the group + binary · KL of the shares of the group)."""

    def __init__(
        self,
        primary: float,
        binary: float,
        tau: float,
        largest: int,
        temperature: float,
        scale: float,
        margin: float,
    ) -> None:
        super().__init__()
        self.primary, self.binary, self.tau, self.largest = primary, binary, tau, largest
        self.temperature, self.scale, self.margin = temperature, scale, margin

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        classifier: ClassShard,
        head: ClassShard,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b), classifier, head -> ()."""
        teacher = teacher.detach()
        classifier = replace(classifier, weight=classifier.weight.detach())
        least, size = self.group(student, labels, head)

        def compare(student: Tensor, chunk: ClassShard) -> Wanted:
            z_s = scores(student, labels, chunk, self.scale, self.margin)
            z_t = scores(teacher, labels, classifier.part(chunk), self.scale, self.margin)
            first = least.new_full((len(least),), -GONE)
            inside = chunk.add(z_s.detach(), labels, first) >= least[:, None]
            z_s, z_t = z_s / self.temperature, z_t / self.temperature
            in_s, in_t = z_s.where(inside, GONE), z_t.where(inside, GONE)
            out_s, out_t = z_s.where(~inside, GONE), z_t.where(~inside, GONE)
            return Wanted(logs=[in_s, out_s, in_t, out_t], means=[(in_t - in_s, in_t)])

        (in_s, out_s, in_t, out_t), (gap,) = head.over_classes(compare, student)
        primary = gap - in_t + in_s
        log_s, log_t = _shares(in_s, out_s), _shares(in_t, out_t)
        binary = (log_t.exp() * (log_t - log_s)).sum(dim=0)
        loss = self.temperature**2 * (self.primary * primary + self.binary * binary).mean()
        return loss, {
            "primary": primary.detach().mean(),
            "binary": binary.detach().mean(),
            "group": size.mean(),
        }

    @torch.no_grad()
    def group(self, student: Tensor, labels: Tensor, head: ClassShard) -> tuple[Tensor, Tensor]:
        """(b d), (b), head -> (b), (b): the least score that a sample's group takes, and its size.

        The own class is always in it; the likeliest others follow until their probabilities reach
        tau, or the group is full.
        """
        likely, log_all = self._likeliest(student, labels, head)
        p = F.pad((likely - log_all[:, None]).exp().cumsum(dim=1), (1, 0))
        known = (labels >= 0).to(p)
        own = (self.scale * (head.own(student, labels) - self.margin) - log_all).exp() * known

        def above(threshold: Tensor) -> tuple[Tensor, Tensor]:
            """(b) -> (b), (b): how many classes are, and their probability."""
            place = torch.searchsorted(-likely, -threshold[:, None], right=True)
            counted = torch.stack([place[:, 0].to(p), p.gather(1, place)[:, 0]])
            count, mass = head.sum(counted)
            return count + known, mass + own

        enough = self.tau if self.tau < 1 else torch.inf
        high = p.new_full((len(p),), self.scale * (1 + self.margin) + 1)
        low = -high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            count, mass = above(middle)
            full = (mass >= enough) | (count >= self.largest)
            low, high = torch.where(full, middle, low), torch.where(full, high, middle)
        return low, above(low)[0]

    def _likeliest(
        self, student: Tensor, labels: Tensor, head: ClassShard
    ) -> tuple[Tensor, Tensor]:
        """(b k): this rank's highest scores of other classes, falling; (b): log Σ exp of all."""
        best: list[Tensor] = []
        log_all = student.new_full((len(student),), -torch.inf)
        gone = torch.full_like(log_all, GONE)
        for chunk in head.chunks(student):
            z = scores(student, labels, chunk, self.scale, self.margin)
            log_all = torch.logaddexp(log_all, z.logsumexp(dim=1))
            best.append(chunk.add(z, labels, gone))
            if sum(part.shape[1] for part in best) > 2 * self.largest:
                best = [torch.cat(best, dim=1).topk(self.largest, dim=1, sorted=False).values]
        found = torch.cat(best, dim=1)
        return found.topk(min(self.largest, found.shape[1]), dim=1).values, head.logsumexp(log_all)


def _shares(inside: Tensor, outside: Tensor) -> Tensor:
    """(b), (b) -> (2 b): the logarithms of a group's share of a softmax, and of the rest's."""
    both = torch.stack([inside, outside])
    return both - both.logsumexp(dim=0)


class GKD:
    """L = T² · mean(primary · KL inside of the group + binary · KL of the group's shares)."""

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        primary: float = 8.0,
        binary: float = 1.0,
        tau: float = 0.93,
        largest: int = 10_000,
        temperature: float = 4.0,
        scale: float = 64.0,
        margin: float = 0.4,
    ) -> None:
        """
        primary, binary: weights of the two parts; the paper's λ1 and λ2.
        tau: the student's probability that a group reaches, at temperature 1; 1: a group is always
            as large as it may be.
        largest: a group's size at most, which bounds memory and time.
        temperature: T.
        scale: σ of both sides, as a rule the trainer's.
        margin: taken off the cosine of the own class on both sides (CosFace). With none a group is
            soon the own class alone, and `primary` trains nothing.
        """
        for option, found in (("temperature", temperature), ("scale", scale)):
            if found <= 0:
                raise KDHooksError(f"gkd: {option} must be above 0; found {found}")
        for option, found in (("primary", primary), ("binary", binary), ("margin", margin)):
            if found < 0:
                raise KDHooksError(f"gkd: {option} must be at least 0; found {found}")
        if not 0 < tau <= 1:
            raise KDHooksError(f"gkd: tau must lie above 0 and at most at 1; found {tau}")
        if largest < 1:
            raise KDHooksError(f"gkd: largest must be at least 1; found {largest}")
        self.weight = weight
        self.parts, self.group = (primary, binary), (tau, largest)
        self.temperature, self.scale, self.margin = temperature, scale, margin

    @hookimpl
    def classifier_share(self) -> ClassifierShare:
        loss = GroupedScores(*self.parts, *self.group, self.temperature, self.scale, self.margin)
        return ClassifierShare("gkd", loss, self.weight, mode="compare")
