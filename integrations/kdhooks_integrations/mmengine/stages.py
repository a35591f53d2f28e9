"""Where the stages of a backbone end, by how it is built: its class is not asked."""

from collections.abc import Iterator, Mapping

from torch import nn

_NUMBERED = ("layer", "stage", "stage_")  # layer1, layer2, …
_LISTED = ("stages", "layers", "blocks", "features")  # one child that holds them
_MOST = 4  # of the deepest ones, where there are more


def stages_of(backbone: nn.Module) -> list[str] | None:
    """Paths, shallow to deep; None if nothing of it is known.

    A stage ends in front of what halves the map next, and the last one at the end. Where nothing
    does, as in a vision transformer, the stages are the quarters of the depth.
    """
    children = dict(backbone.named_children())
    if len(children) == 1:  # mmpretrain's TIMMBackbone
        ((name, child),) = children.items()
        inside = stages_of(child) if name not in _LISTED else None
        if inside is not None:
            return [f"{name}.{stage}" for stage in inside]
    for prefix in _NUMBERED:
        numbered = dict(_counted(children, prefix))
        if len(numbered) >= _MOST:
            return [_end(path, numbered[path]) for path in _ends(numbered, named=True)]
    for name in _LISTED:
        listed = children.get(name)
        if isinstance(listed, nn.ModuleList | nn.Sequential) and len(listed):
            parts = {f"{name}.{key}": part for key, part in listed.named_children()}
            return [_end(path, parts[path]) for path in _ends(parts, name == "stages")]
    return None


def _counted(children: Mapping[str, nn.Module], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    number = 1
    while (name := f"{prefix}{number}") in children:
        yield name, children[name]
        number += 1


def _ends(parts: Mapping[str, nn.Module], named: bool) -> list[str]:
    """parts: what runs one after the other; named: as stages, which they are unless too many."""
    names = list(parts)
    if named and len(names) <= _MOST:
        return names
    ends = [names[n - 1] for n in range(1, len(names)) if _halves(parts[names[n]])]
    if not ends:
        return list(dict.fromkeys(names[max(len(names) * n // 4, 1) - 1] for n in (1, 2, 3, 4)))
    return [*ends, names[-1]][-_MOST:]


def _end(path: str, stage: nn.Module) -> str:
    """Its last block where it runs these by itself, since it may halve the map behind them."""
    blocks = dict(stage.named_children()).get("blocks")
    if isinstance(blocks, nn.ModuleList) and len(blocks):
        return f"{path}.blocks.{len(blocks) - 1}"
    return path


def _halves(module: nn.Module) -> bool:
    """Whether it holds a convolution or a pooling with a stride."""
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    strides = [one.stride for one in module.modules() if isinstance(one, kinds)]
    return any(stride not in (1, (1, 1)) for stride in strides)
