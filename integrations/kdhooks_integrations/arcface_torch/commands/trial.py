"""Runs a training step as arcface_torch does, but with our own head and on one device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.declarations import Tap
from kdhooks.errors import KDHooksError
from kdhooks.schedules import Schedule
from kdhooks_integrations.arcface_torch import Attachment
from kdhooks_integrations.arcface_torch.commands.balance import Balance, Pull
from kdhooks_integrations.arcface_torch.commands.settings import Settings

_SCALE = 64.0  # the scale of the trainer's CombinedMarginLoss
_TASK = ""  # a name that no term can have
_LOSS_SCALE = 65536.0  # the initial scale of torch's GradScaler


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
    fp16: bool = False

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
        distiller = self.attachment.distiller
        taps = {tap.name: tap for tap in distiller.taps}
        weights = {name: _full_weight(tap, distiller.step) for name, tap in taps.items()}
        embedding = self.backbone(self.images)
        losses = {_TASK: self.head.forward(embedding, self.labels) * self.attachment.task_weight}
        distiller.taps = tuple(replace(tap, weight=weights[name]) for name, tap in taps.items())
        try:
            terms = distiller(self.images, self.labels)
        finally:
            distiller.taps = tuple(taps.values())
        losses |= {name: term for name, term in terms.items() if weights[name] != 0}
        whole = [torch.zeros_like(p) for p in self.backbone.parameters()]
        pulls: dict[str, Pull] = {}
        for name, loss in losses.items():
            parts = self._gradient(loss)
            value, length = float(loss.detach()), _length(parts)
            _check_gradient(name or "task", value, length)
            weight = weights.get(name, self.attachment.task_weight)
            pulls[name] = Pull(value, length, weight, name in taps and callable(taps[name].weight))
            for total, part in zip(whole, parts, strict=True):
                total += 0 if part is None else part
        task = pulls.pop(_TASK)
        return Balance(task, pulls, _length(whole), distiller.accumulation)

    def _gradient(self, loss: Tensor) -> list[Tensor | None]:
        """Return the gradient at each parameter of the backbone, None if the loss has none there.

        It uses backward(), since checkpointed blocks do not support grad(). In float16, the loss is
        scaled as in GradScaler, which halves the scale until nothing overflows.
        """
        scale = _LOSS_SCALE if self.fp16 else 1.0
        while True:
            self.forget()
            (loss * scale).backward(retain_graph=True)
            found = [p.grad for p in self.backbone.parameters()]
            parts = [None if grad is None else grad / scale for grad in found]
            if scale <= 1 or math.isfinite(_length(parts)):
                self.forget()
                return parts
            scale /= 2


def _full_weight(tap: Tap, step: int) -> float:
    """Return the weight; for a schedule, its value after the warm-up, at any step."""
    if isinstance(tap.weight, Schedule):
        return tap.weight.value
    return float(tap.weight(step) if callable(tap.weight) else tap.weight)


def _length(parts: Sequence[Tensor | None]) -> float:
    squares = [part.double().square().sum() for part in parts if part is not None]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


def _check_gradient(name: str, value: float, length: float) -> None:
    if not math.isfinite(length):
        raise KDHooksError(
            f"{name}: the gradient of its loss must be finite; found {length}, with a loss of "
            f"{value:.4g}; lower its weight, or use other taps"
        )
    if value != 0 and length == 0:
        raise KDHooksError(
            f"{name}: its loss is {value:.4g}, but no gradient reaches the student; use taps whose "
            "parameters the student trains"
        )
