"""One step of a distillation as arcface_torch takes it, with a head of our own, on one device."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks_integrations.arcface_torch import Attachment


class Head(nn.Module):
    """The trainer's PartialFC on one rank: all classes, and its softmax without the margin."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width) / 100)

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b) -> ()."""
        cosine = F.linear(F.normalize(embedding.float()), F.normalize(self.weight))
        return F.cross_entropy(64 * cosine, labels)


@dataclass
class Trial:
    """A student in training, attached to its head."""

    backbone: nn.Module
    head: Head
    attachment: Attachment
    images: Tensor
    labels: Tensor

    def step(self) -> Tensor:
        """The trainer's: forward, head, backward. -> the whole loss ()."""
        loss: Tensor = self.head(self.backbone(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def forget(self) -> None:
        for module in (self.backbone, self.head):
            module.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, tuple[float, float]]:
        """Each loss, and the length of its gradient in the student; "task" is the head's own."""
        distiller = self.attachment.distiller
        taps = {tap.name: tap for tap in distiller.taps if distiller.weight(tap) != 0}
        embedding = self.backbone(self.images)
        terms = {"task": self.head.forward(embedding, self.labels)}
        terms |= {
            name: term for name, term in distiller(self.images, self.labels).items() if name in taps
        }
        found = {name: (float(term.detach()), self._length(term)) for name, term in terms.items()}
        for name, (value, length) in found.items():
            if value != 0 and not length > 0:
                raise KDHooksError(
                    f"{name}: its loss is {value:.4g}, and no gradient of it reaches the student; "
                    "take taps that the student trains"
                )
        return found

    def _length(self, term: Tensor) -> float:
        trained = [p for p in self.backbone.parameters() if p.requires_grad]
        parts = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        return float(sum(float(g.double().square().sum()) for g in parts if g is not None) ** 0.5)
