"""Measure where on an aligned face a frozen network is active, for cakd's distance "saliency"."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from kdhooks import KDHooksError, Stage
from kdhooks.tensor_files import read_tensors, user_path
from kdhooks_plugins._maps import Grid

_SUBJECT = "cakd: saliency"


@torch.no_grad()
def saliency_map(teacher: nn.Module, stage: str, batches: Iterable[Tensor]) -> Tensor:
    """Module, path, [(b 3 h w)] -> (h w), from 0 to 1: the mean energy ‖f_i‖² of a stage.

    batches: a few thousand aligned faces, preprocessed for this network, which is put in eval mode.
    """
    energies: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        grid = Grid.of(Stage.of(teacher, stage, output), "saliency_map")
        energies.append(grid(output).float().square().sum(dim=(0, 1)).cpu())

    if not isinstance(batches, Iterable):
        raise KDHooksError(
            "saliency_map: batches must be a list or a loader of images (b 3 h w); found "
            f"{type(batches).__name__}"
        )
    teacher.eval()  # not chained: in mmpretrain it returns None
    try:
        tapped = teacher.get_submodule(stage)
    except AttributeError as error:
        raise KDHooksError(
            f"saliency_map: the network has no submodule '{stage}' ({error}); `kdhooks taps` lists "
            "the submodules of a network"
        ) from error
    with tapped.register_forward_hook(note):
        for number, images in enumerate(batches):
            if not isinstance(images, Tensor):
                raise KDHooksError(
                    "saliency_map: batches must be tensors of images (b 3 h w), without labels; "
                    f"found {type(images).__name__}"
                )
            _run(teacher, images)
            if not torch.isfinite(energies[-1]).all():
                raise KDHooksError(
                    f"saliency_map: the output of '{stage}' is not finite in batch {number}; check "
                    "the batch's images and the network's weights"
                )
    if not energies:
        raise KDHooksError("saliency_map needs at least one batch of images; found none")
    shapes = {tuple(energy.shape) for energy in energies}
    if len(shapes) > 1:
        raise KDHooksError(f"saliency_map: images must have one size; found maps of {shapes}")
    return load_saliency(torch.stack(energies).sum(dim=0))


def _run(teacher: nn.Module, images: Tensor) -> None:
    try:
        teacher(images)
    except KDHooksError:
        raise
    except Exception as error:
        raise KDHooksError(
            f"saliency_map: the network must run on images {tuple(images.shape)} of "
            f"{images.dtype}; it raises {type(error).__name__}: {error}; preprocess the images for "
            "this network"
        ) from error


def load_saliency(source: Tensor | str | Path) -> Tensor:
    """A map (h w), or a file of one written by torch.save -> (h w), scaled to 0 to 1."""
    content: object = source
    if isinstance(source, str | Path):
        content = read_tensors(user_path(source, _SUBJECT), _SUBJECT)
    if not isinstance(content, Tensor) or content.ndim != 2 or not content.numel():
        found = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise KDHooksError(
            f"{_SUBJECT} must be a map (h w); found {found}; save the result of "
            "kdhooks_plugins.saliency.saliency_map with torch.save"
        )
    plain = content.layout is torch.strided and not (content.is_meta or content.is_quantized)
    if not plain or content.is_complex() or content.dtype == torch.bool:
        raise KDHooksError(
            f"{_SUBJECT} must be a plain tensor of real numbers; found {content.dtype}, "
            f"{content.layout} on {content.device}"
        )
    numbers = content.detach().cpu().double()
    low, high = numbers.min(), numbers.max()
    if not torch.isfinite(high - low) or high == low:
        raise KDHooksError(
            f"{_SUBJECT} must be finite and differ between pixels; found {low} to {high}"
        )
    return (numbers - low) / (high - low)
