"""The stages of backbones that are known by their class, or that describe themselves."""

from typing import Any

from torch import nn

_MOST = 4  # of the deepest ones, if there are more


def known_stages(model: nn.Module) -> list[str] | None:
    """Paths of the stages' ends, shallow to deep; None if nothing of the backbone is known.

    Those of arcface_torch's backbones are at 1/2, 1/4, 1/8 and 1/16 of the input. A vision
    transformer keeps one size throughout; its stages are the quarters of its depth. timm's networks
    describe theirs as `feature_info`.
    """
    kind = type(model).__name__
    if kind == "IResNet":
        return ["layer1", "layer2", "layer3", "layer4"]
    if kind == "MobileFaceNet":
        return ["layers.1", "layers.3", "layers.5", "conv_sep"]
    if described := _described_stages(model):
        return described
    blocks = getattr(model, "blocks", None)  # other packages have classes of this name
    if kind == "VisionTransformer" and isinstance(blocks, nn.ModuleList | nn.Sequential):
        return _quarters([f"blocks.{number}" for number in range(len(blocks))]) or None
    return None


def _described_stages(model: nn.Module) -> list[str]:
    """By `feature_info`: a list of tables with `module` and `reduction`, or an object with such."""
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
    """The ends of the quarters of the depth; nothing if there are fewer than four blocks."""
    depth = len(paths)
    return [paths[depth * quarter // 4 - 1] for quarter in (1, 2, 3, 4)] if depth >= _MOST else []
