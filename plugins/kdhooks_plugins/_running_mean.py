"""The running mean of a network's features over images, and its subtraction."""

import torch
from torch import Tensor, nn

from kdhooks import KDHooksError
from kdhooks.classes.ranks import gather, world

_LEAST = 1e-12  # the lower bound of the weights' sum, against division by 0 before the first batch


class RunningMean(nn.Module):
    """x - m, with m the exponential moving average of x over the images of all ranks.

    In training each batch moves m before m is subtracted from it. The average is divided by the sum
    of its weights, as in Adam, so in the first steps m is also a mean of the images seen so far.
    Before the first batch, m is 0.
    """

    average: Tensor
    weight: Tensor

    def __init__(self, *shape: int, momentum: float = 0.99) -> None:
        """shape: that of one image's features. momentum: 0.99 averages over about 100 batches."""
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(()))

    def buffers_by_rank(self) -> set[str]:
        """Every rank updates them with the batches of all ranks, so they need no averaging."""
        return {"average", "weight"}

    @property
    def mean(self) -> Tensor:
        """(*shape): m."""
        return self.average / self.weight.clamp(min=_LEAST)

    def forward(self, x: Tensor) -> Tensor:
        """(b *shape) -> (b *shape)."""
        if x.shape[1:] != self.average.shape:
            raise KDHooksError(
                f"a running mean over images needs features of the shape {(*self.average.shape,)}, "
                f"as they were probed; found {(*x.shape[1:],)}; set input_shape to the shape of "
                "the training images"
            )
        if self.training:
            self._move(x)
        return x - self.mean.to(x)

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        mean = gather(x.detach().mean(dim=0, keepdim=True), world()).mean(dim=0)
        self.average.lerp_(mean.to(self.average), 1 - self.momentum)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.momentum)
