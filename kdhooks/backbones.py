"""The stages of backbones of known classes, and of backbones that describe their stages."""

from typing import Any

from torch import nn

_MOST = 4  # the number of stages to return; a longer list keeps its deepest ones


def known_stages(model: nn.Module) -> list[str] | None:
    """Return the paths of the stages' last submodules, shallow to deep; None if none is known.

    In arcface_torch's backbones, these have 1/2, 1/4, 1/8 and 1/16 of the input size. A vision
    transformer keeps one size throughout; its stages are the quarters of its depth. timm's networks
    describe their stages in `feature_info`.
    """
    kind = type(model).__name__
    if kind == "IResNet":
        return ["layer1", "layer2", "layer3", "layer4"]
    if kind == "MobileFaceNet":
        return ["layers.1", "layers.3", "layers.5", "conv_sep"]
    if described := _described_stages(model):
        return described
    blocks = getattr(model, "blocks", None)  # classes of this name may lack it
    if kind == "VisionTransformer" and isinstance(blocks, nn.ModuleList | nn.Sequential):
        return _quarters([f"blocks.{number}" for number in range(len(blocks))]) or None
    return None


def _described_stages(model: nn.Module) -> list[str]:
    """Read `feature_info`: dicts with `module` and `reduction` in a list, or in its `info`."""
    info: Any = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    ends: dict[Any, str] = {}  # the last module of each size; a dict keeps the order
    paths = []
    for entry in entries:
        path = entry.get("module") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not path:
            return []
        paths.append(path)
        ends[entry.get("reduction")] = path
    if len(ends) == 1:  # one size throughout
        return _quarters(paths) or paths
    return list(ends.values())[-_MOST:]


def _quarters(paths: list[str]) -> list[str]:
    """Return the last path of each quarter of the depth; none if there are fewer than four."""
    depth = len(paths)
    return [paths[depth * quarter // 4 - 1] for quarter in (1, 2, 3, 4)] if depth >= _MOST else []
