"""Where on an aligned face a frozen network is active, for cakd's distance "saliency"."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from kdhooks import KDHooksError, Stage
from kdhooks_plugins._maps import Grid


@torch.no_grad()
def saliency_map(teacher: nn.Module, stage: str, batches: Iterable[Tensor]) -> Tensor:
    """Module, path, [(b 3 h w)] -> (h w), from 0 to 1: the mean energy ‖f_i‖² of a stage.

    batches: a few thousand aligned faces, as this network takes them; it is put in eval mode.
    """
    energies: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        grid = Grid.of(Stage.of(teacher, stage, output), "saliency_map")
        energies.append(grid(output).float().square().sum(dim=(0, 1)).cpu())

    teacher.eval()  # which returns nothing in mmpretrain
    with teacher.get_submodule(stage).register_forward_hook(note):
        for images in batches:
            teacher(images)
    if not energies:
        raise KDHooksError("saliency_map needs at least one batch of images; found none")
    return load_saliency(torch.stack(energies).sum(dim=0))


def load_saliency(source: Tensor | str) -> Tensor:
    """A map (h w), or a file that torch.save wrote of one -> (h w), scaled from 0 to 1."""
    content: object = source
    if isinstance(source, str):
        try:
            content = torch.load(Path(source).expanduser(), map_location="cpu", weights_only=True)
        except Exception as error:
            raise KDHooksError(
                f"cakd: saliency '{source}' can't be read as a tensor ({error}); save what "
                "kdhooks_plugins.saliency.saliency_map gives with torch.save"
            ) from error
    if not isinstance(content, Tensor) or content.ndim != 2:
        found = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise KDHooksError(f"cakd: saliency must be a map (h w); found {found}")
    low, high = content.min(), content.max()
    if not torch.isfinite(high - low) or high == low:
        raise KDHooksError(
            f"cakd: saliency must be finite and differ between pixels; found {low} to {high}"
        )
    return (content.detach().cpu().double() - low.item()) / (high - low).item()
