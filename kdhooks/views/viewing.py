"""Runs a view on a batch, reproducibly, and leaves torch's random generators unchanged."""

import inspect
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, shown_tensor
from kdhooks.generators import undisturbed_generators
from kdhooks.views.draws import Draws


class Viewing:
    """A view (b 3 h w) -> (b 3 h w), run without gradients and outside of autocast.

    The view's forward takes the images, and may take `draws`, of class `Draws`. If it does not,
    torch's generators are seeded in each step with a number from seed, step and position.
    """

    def __init__(self, view: nn.Module, seed: int = 0) -> None:
        if not isinstance(view, nn.Module):
            raise KDHooksError(
                "student_view must be a module (b 3 h w) -> (b 3 h w), such as "
                f"StudentView(mask={{'p': 0.5}}); found {type(view).__name__}"
            )
        self.view, self.seed = view, seed
        for name, parameter in view.named_parameters():
            if parameter.requires_grad:
                raise KDHooksError(
                    "student_view must have no trainable parameters, since it runs without "
                    f"gradients; found '{name}'; call requires_grad_(False) on the view"
                )
        self._device: torch.device | None = None  # where the view is
        self._takes_draws = "draws" in inspect.signature(view.forward).parameters

    def __call__(self, images: Tensor, step: int = 0, first: int = 0) -> Tensor:
        """first: the position of the first image in the step's batch of all ranks."""
        if images.ndim != 4 or not images.is_floating_point():
            raise KDHooksError(
                "student_view needs floating-point images (b 3 h w), (pixel - 127.5) / 127.5; "
                f"found {shown_tensor(images)}; scale the images before the student"
            )
        if images.requires_grad:
            raise KDHooksError(
                "student_view runs without gradients, and the images require one; give the student "
                "images.detach(), or run this forward inside `with kd.paused():`"
            )
        if self._device != images.device:
            self._device = images.device
            self.view.to(images.device)
        version = None if images.is_inference() else images._version
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind)  # entering torch.autocast needlessly is slower
        with torch.no_grad(), torch.autocast(kind, enabled=False) if autocast else nullcontext():
            draws = Draws(self.seed, step, first, images.shape[0], images.device)
            seen: object = self._run(images, draws)
        if not isinstance(seen, Tensor) or (seen.shape, seen.dtype) != (images.shape, images.dtype):
            raise KDHooksError(
                "student_view must return images of the same shape and dtype as its input, "
                f"{shown_tensor(images)}; found {shown_tensor(seen)}"
            )
        if version is not None and version != images._version:
            raise KDHooksError(
                "student_view must not change the trainer's images in place, since the teacher "
                "sees them too; let it change a clone"
            )
        return _laid_out_like(images, seen)

    def _run(self, images: Tensor, draws: Draws) -> object:
        if self._takes_draws:
            return self.view(images, draws)
        with undisturbed_generators(draws.generator_seed(), images.device):
            return self.view(images)


def _laid_out_like(images: Tensor, seen: Tensor) -> Tensor:
    """The student then runs in the memory format that the trainer has chosen."""
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return seen
    return seen.contiguous(memory_format=torch.channels_last)


def viewed(
    view: nn.Module, images: Tensor, *, seed: int = 0, step: int = 0, first: int = 0
) -> Tensor:
    """(b 3 h w) -> (b 3 h w): the view, always the same for the same seed, step and first.

    seed, step: as in a Distiller, whose student sees `viewed(kd.student_view, images, …)`.
    first: the index of the first image in its set; an image then has the same view with every
        batch size.
    """
    return Viewing(view, seed)(images, step, first)
