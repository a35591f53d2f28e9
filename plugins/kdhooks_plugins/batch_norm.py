"""Batch normalisation that is adapted to the images of a test.

A network that was trained on different images, for example sharp ones, normalises with their means
and variances. AIRD (Shi, Guo, Ge, 2024, arXiv:2409.02049) also uses the test images' statistics
when the student is tested. This is a reconstruction from its abstract, with the mixture of
Schneider et al., NeurIPS 2020, arXiv:2006.16971.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdhooks import KDHooksError
from kdhooks.errors import shown_tensor


@torch.no_grad()
def adapted_batch_norm(
    model: nn.Module,
    batches: Iterable[Tensor],
    share: float = 0.5,
    run: Callable[[Any, Tensor], object] | None = None,
) -> nn.Module:
    """Return a copy of the model in eval mode, with batch norms adapted to the images of a test.

    Each mean becomes (1 - share) · the training's + share · that of all batches, and each variance
    likewise. While the batches run, each layer normalises with the mixture of the current batch, so
    later layers already get adapted inputs.

    batches: images (b 3 h w), one batch or several, without labels, on the model's device and
        preprocessed for it. A few hundred images are enough; with fewer use a smaller share.
    share: from 0, which changes nothing, to 1, which forgets the training's statistics.
    run: called as run(model, images), for a model that takes more than images.

    Raises:
        KDHooksError: the share is not a number from 0 to 1, the model has no batch norm with
            running statistics, there is no batch, a batch is not a tensor (b …), or a number is not
            finite.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise KDHooksError(
            f"adapted_batch_norm: share must be a number from 0 to 1; found {share!r}"
        )
    adapted = copy.deepcopy(model).eval()
    layers = [
        _Layer(module, share)
        for module in adapted.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not layers:
        raise KDHooksError(
            "adapted_batch_norm needs a model with batch norms that keep running statistics; "
            f"found none in {type(model).__name__}"
        )
    seen = 0
    for images in [batches] if isinstance(batches, Tensor) else batches:
        _check_batch(images)
        run(adapted, images) if run else adapted(images)
        seen += len(images)
    for layer in layers:
        layer.finish()
    if not seen:
        raise KDHooksError("adapted_batch_norm needs at least one batch of images; found none")
    return adapted


def _check_batch(images: object) -> None:
    if (
        isinstance(images, Tensor)
        and images.ndim > 1
        and images.is_floating_point()
        and len(images)
    ):
        return
    raise KDHooksError(
        "adapted_batch_norm: batches must be an iterable of floating-point images (b 3 h w), as "
        f"the model takes them; found {shown_tensor(images)}; from a loader with labels "
        "pass (images for images, labels in loader)"
    )


class _Layer:
    """One batch norm while the batches run: it accumulates the sums of its inputs."""

    def __init__(self, module: _BatchNorm, share: float) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        self._module, self._share = module, share
        self._trained = module.running_mean.double().clone(), module.running_var.double().clone()
        self._count = 0
        self._sums = torch.zeros_like(torch.stack(self._trained))
        self._handle = module.register_forward_pre_hook(partial(_Layer._look, self))

    def _look(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].transpose(0, 1).flatten(1).double()  # (k n)
        self._count += values.shape[1]
        sums = torch.stack([values.sum(1), values.square().sum(1)])
        self._sums = self._sums + sums
        self._mix(values.shape[1], sums)

    def _mix(self, count: int, sums: Tensor) -> None:
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp(min=0)
        if not torch.isfinite(variance).all():  # nor is it if the mean is not finite
            raise KDHooksError(
                "adapted_batch_norm: the images and the model's features must be finite; found "
                "others at a batch norm; check the images, or run half-precision models in float32"
            )
        for name, trained, found in zip(
            ("running_mean", "running_var"), self._trained, (mean, variance), strict=True
        ):
            mixed = (1 - self._share) * trained + self._share * found
            self._module.get_buffer(name).copy_(mixed)

    def finish(self) -> None:
        """Keep the mixture with all batches; a layer that never ran keeps the training's values."""
        self._handle.remove()
        if self._count:
            self._mix(self._count, self._sums)
