"""Grouped knowledge distillation (GKD), Zhao et al., AAAI 2023, arXiv:2304.04462.

From the paper and what its code computes: each sample's classes fall into a primary group, which
the student finds likely, and the rest. The student follows the teacher inside of the group, and in
how much falls into it; the order among the rest is noise, and left out.
Differs from the code: each sample has a group of its own size, as in the paper, where the code
takes a fixed one, or one for a batch; scores are scale · cos, a margin in them is an option. The
warm-up over ten epochs is `weight = { value = 1.0, warmup = … }`.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kdhooks import ClassifierShare, ClassShard, KDHooksError, hookimpl
from kdhooks.declarations import Weight
from kdhooks_plugins._margin import GONE, scores

_FIRST = -GONE  # added to a score, puts its class in front


class GroupedScores(nn.Module):
    """T² · (primary · KL inside of the group + binary · KL of the shares of the group)."""

    def __init__(
        self,
        primary: float = 8.0,
        binary: float = 1.0,
        tau: float = 0.93,
        largest: int = 10_000,
        temperature: float = 4.0,
        scale: float = 64.0,
        margin: float = 0.0,
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

        def compare(student: Tensor, chunk: ClassShard) -> tuple[Tensor, ...]:
            z_s = scores(student, labels, chunk, self.scale, self.margin)
            z_t = scores(teacher, labels, classifier.part(chunk), self.scale, self.margin)
            inside = _own_first(z_s.detach(), labels, chunk) >= least[:, None]
            z_s, z_t = z_s / self.temperature, z_t / self.temperature
            in_s, in_t = z_s.where(inside, GONE), z_t.where(inside, GONE)
            out_s, out_t = z_s.where(~inside, GONE), z_t.where(~inside, GONE)
            gap = (in_t.softmax(dim=1) * (in_t - in_s)).sum(dim=1)
            return *(z.logsumexp(dim=1) for z in (in_s, out_s, in_t, out_t)), gap

        *parts, gap = head.by_chunks(compare, student)
        in_s, out_s, in_t, out_t = (head.logsumexp(part) for part in parts)
        share = (parts[2] - in_t).exp()  # of the teacher's softmax inside of the group
        primary = head.sum(share * gap) - in_t + in_s
        log_s, log_t = _shares(in_s, out_s), _shares(in_t, out_t)
        binary = (log_t.exp() * (log_t - log_s)).sum(dim=0)
        loss = self.temperature**2 * (self.primary * primary + self.binary * binary).mean()
        return loss, {
            "primary": primary.detach().mean(),
            "binary": binary.detach().mean(),
            "group": size.to(loss).mean(),
        }

    @torch.no_grad()
    def group(self, student: Tensor, labels: Tensor, head: ClassShard) -> tuple[Tensor, Tensor]:
        """(b d), (b), head -> (b), (b): the lowest score in each sample's group, its classes.

        The own class comes first, then the likeliest, until their probabilities reach tau.
        """
        parts: list[Tensor] = []
        best: list[Tensor] = []
        for chunk in head.chunks(student):
            z = scores(student, labels, chunk, self.scale, self.margin)
            parts.append(z.logsumexp(dim=1))
            best.append(_own_first(z, labels, chunk))
            if sum(part.shape[1] for part in best) > 4 * self.largest:
                best = [torch.cat(best, dim=1).topk(self.largest, dim=1, sorted=False).values]
        top = head.topk(torch.cat(best, dim=1), min(self.largest, head.total))
        own = self.scale * (head.own(student, labels) - self.margin)
        z = torch.where(top > _FIRST / 2, own[:, None], top)
        p = (z - head.logsumexp(torch.stack(parts))[:, None]).exp()
        known = p.cumsum(dim=1)[
            :, :-1
        ]  # a group of all but the last, which goes in if all else did
        size = (known < self.tau).sum(dim=1) + 1
        if self.tau == 1:
            size = torch.full_like(size, top.shape[1])
        return top.gather(1, size[:, None] - 1)[:, 0], size


def _own_first(z: Tensor, labels: Tensor, rows: ClassShard) -> Tensor:
    """(b c), (b) -> (b c): the own class in front of all others."""
    return rows.add(z, labels, z.new_full((len(z),), _FIRST))


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
        margin: float = 0.0,
    ) -> None:
        """
        primary, binary: weights of the two parts; the paper's λ1 and λ2.
        tau: the student's probability that a group reaches, at temperature 1; 1: a group is always
            as large as it may be.
        largest: a group's size at most, which bounds memory and time.
        temperature: T.
        scale: σ of both sides, as a rule the trainer's.
        margin: taken off the cosine of the own class on both sides (CosFace); the code uses 0.4.
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
