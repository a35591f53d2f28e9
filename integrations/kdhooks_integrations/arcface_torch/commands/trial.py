"""Runs a training step as arcface_torch does, but with our own head and on one device."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.balance import Balance, Parts, Weighted, compare
from kdhooks.terms import comparable, full_weight
from kdhooks_integrations.arcface_torch import Attachment
from kdhooks_integrations.arcface_torch.commands.settings import Settings

CLIP = 5.0
"""The trainer clips the gradient of the backbone to this norm before each optimizer step."""
_SCALE = 64.0  # the scale of the trainer's CombinedMarginLoss


class Head(nn.Module):
    """The trainer's PartialFC on one rank, with its margin loss."""

    def __init__(self, classes: int, width: int, settings: Settings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width) / 100)
        self._settings = settings

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b) -> ()."""
        rows, own = self._sampled(labels)
        cosine = F.linear(F.normalize(embedding.float()), F.normalize(rows)).clamp(-1, 1)
        return F.cross_entropy(_SCALE * self._with_margin(cosine, own), own)

    def _sampled(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of this step, and the position of each label's own row among them."""
        count = int(self._settings.sample_rate * len(self.weight))
        if count == len(self.weight):
            return self.weight, labels
        own = labels.unique()
        order = torch.rand(len(self.weight), device=labels.device)
        order[own] = 2.0  # the classes of the batch are always chosen
        chosen = order.topk(max(count, len(own))).indices.sort().values
        return self.weight[chosen], torch.searchsorted(chosen, labels)

    def _with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """(b c), (b) -> (b c)."""
        _, m2, m3 = self._settings.margin_list
        own = F.one_hot(labels, cosine.shape[1]).bool()
        if (limit := self._settings.interclass_filtering_threshold) > 0:
            cosine = cosine.masked_fill((cosine > limit) & ~own, 0.0)
        if m3 > 0:
            return torch.where(own, cosine - m3, cosine)
        # Like the trainer, add the angle outside the graph, so the gradient is that of the cosine.
        angle = cosine.detach().acos()
        return torch.where(own, cosine + ((angle + m2).cos() - cosine).detach(), cosine)


@dataclass
class Trial:
    """A student in training, attached to its head."""

    backbone: nn.Module
    head: Head
    attachment: Attachment
    images: Tensor
    labels: Tensor

    def step(self) -> Tensor:
        """Run the trainer's step, forward, head and backward, and return the total loss ()."""
        loss: Tensor = self.head(self.backbone(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def forget(self) -> None:
        for module in (self.backbone, self.head, self.attachment.distiller):
            module.zero_grad(set_to_none=True)

    def balance(self) -> Balance:
        """Return each loss and the norm of its gradient at the parameters that the trainer clips.

        The task is the head's own loss. If a weight follows a schedule, its highest value is used.
        """
        distiller, task_weight = self.attachment.distiller, self.attachment.task_weight
        taps, step = distiller.taps, distiller.step
        full = {tap.name: full_weight(tap, step) for tap in taps}
        embedding = self.backbone(self.images)
        task = self.head.forward(embedding, self.labels) * task_weight
        distiller.taps = tuple(replace(tap, weight=full[tap.name]) for tap in taps)
        try:
            terms = distiller(self.images, self.labels)
        finally:
            distiller.taps = taps
        return compare(
            Weighted(task, task_weight),
            {
                tap.name: comparable(tap, terms[tap.name], step)
                for tap in taps
                if full[tap.name] != 0
            },
            self._gradient,
            CLIP,
            distiller.accumulation,
        )

    def _gradient(self, loss: Tensor) -> Parts:
        """Return the gradient at each parameter of the backbone, None if the loss has none there.

        It uses backward(), since checkpointed blocks do not support grad().
        """
        self.forget()
        loss.backward(retain_graph=True)
        found = [parameter.grad for parameter in self.backbone.parameters()]
        self.forget()
        return found
