"""A margin softmax with the classes split over the ranks, which overwrites its logits in place."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class MarginLoss(nn.Module):
    """cos(θ + m) at the own class; the gradient ignores the margin."""

    def __init__(self, scale: float, margin: float) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(b c), (b 1), -1 for classes of other ranks."""
        own = labels[:, 0].ge(0).nonzero()[:, 0]
        with torch.no_grad():
            logits.arccos_()
            logits[own, labels[own, 0]] += self.margin
            logits.cos_()
        return logits * self.scale


class PartialFC_V2(nn.Module):
    def __init__(
        self,
        margin_loss: nn.Module,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        super().__init__()
        assert dist.is_initialized()
        rank, world = dist.get_rank(), dist.get_world_size()
        self.num_local = num_classes // world + (rank < num_classes % world)
        self.class_start = num_classes // world * rank + min(rank, num_classes % world)
        self.num_sample = int(sample_rate * self.num_local)
        self.sample_rate = sample_rate
        self.weight = nn.Parameter(torch.normal(0, 0.01, (self.num_local, embedding_size)))
        self.margin_softmax = margin_loss

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """(b d), (b 1) or (b) -> (), the mean over the global batch."""
        local_labels.squeeze_()
        embeddings: Tensor = _Gather.apply(local_embeddings)  # type: ignore[no-untyped-call]
        gathered = [torch.empty_like(local_labels) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local_labels)
        labels = torch.cat(gathered).long()[:, None] - self.class_start
        labels[(labels < 0) | (labels >= self.num_local)] = -1
        weight = self.rows(labels)
        logits = F.linear(F.normalize(embeddings), F.normalize(weight)).clamp(-1, 1)
        logits = self.margin_softmax(logits, labels)
        loss: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
        return loss

    def rows(self, labels: Tensor) -> Tensor:
        """(c d): the rows of the sampled classes."""
        if self.sample_rate == 1:
            return self.weight
        return self.weight[self.sample(labels)]

    def sample(self, labels: Tensor) -> Tensor:
        """Return the batch's classes and random others; labels become indices into the result."""
        own = labels >= 0
        chance = torch.rand(self.num_local)
        chance[labels[own]] = 2.0
        count = max(self.num_sample, int((chance == 2.0).sum()))
        index = chance.topk(count).indices.sort().values
        labels[own] = torch.searchsorted(index, labels[own])
        return index


class PartialFC(PartialFC_V2):
    """The head before 2023: the sampled rows are a separate parameter, created again in each step.

    It replaces the first parameter in the optimizer's last group.
    """

    index: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows = self.weight.data
        del self.weight
        self.weight_activated = nn.Parameter(rows)
        if self.sample_rate < 1:
            self.register_buffer("weight", rows)
            self.weight_activated = nn.Parameter(torch.empty(0, 0))

    def forward(  # type: ignore[override]
        self, local_embeddings: Tensor, local_labels: Tensor, optimizer: torch.optim.Optimizer
    ) -> Tensor:
        self._optimizer = optimizer
        return super().forward(local_embeddings, local_labels)

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Assign the tensors directly, so that no hook is called."""
        for name in self.state_dict():
            if name != "weight_activated" or self.sample_rate == 1:
                getattr(self, name).data = state_dict[name]

    def rows(self, labels: Tensor) -> Tensor:
        if self.sample_rate < 1:
            if self.index is not None:
                self.weight.data[self.index] = self.weight_activated.data
            self.index = self.sample(labels)
            self.weight_activated = nn.Parameter(self.weight[self.index])
            last = self._optimizer.param_groups[-1]["params"]
            self._optimizer.state.pop(last[0], None)
            last[0] = self.weight_activated
        return self.weight_activated


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        peak = logits.amax(dim=1, keepdim=True)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        logits.sub_(peak).exp_()
        total = logits.sum(dim=1, keepdim=True)
        dist.all_reduce(total)
        logits.div_(total)
        own = labels[:, 0].ge(0).nonzero()[:, 0]
        probability = torch.zeros(len(logits))
        probability[own] = logits[own, labels[own, 0]]
        dist.all_reduce(probability)
        ctx.save_for_backward(logits, labels, own)
        return -probability.clamp(min=1e-30).log().mean()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, labels, own = ctx.saved_tensors  # type: ignore[attr-defined]
        logits[own, labels[own, 0]] -= 1
        logits.div_(len(logits))
        return logits * gradients[0].item(), None


class _Gather(torch.autograd.Function):
    """Its backward sums over the ranks, and multiplies by their number because DDP averages."""

    @staticmethod
    def forward(ctx: FunctionCtx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        world = dist.get_world_size()
        return gradient.chunk(world)[dist.get_rank()] * world
