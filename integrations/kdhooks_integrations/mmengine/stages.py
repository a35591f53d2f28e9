"""Finds the ends of a backbone's stages from its structure, whatever its class."""

from collections.abc import Iterator, Mapping

from torch import nn

_NUMBERED = ("layer", "stage", "stage_")  # layer1, layer2, …
_LISTED = ("stages", "layers", "blocks", "features")  # one child that holds all stages
_MOST = 4  # if there are more stages, the deepest four are used


def stages_of(backbone: nn.Module) -> list[str] | None:
    """Return the paths of the stages, shallow to deep; None if the structure is unknown.

    A stage ends before the next module that halves the feature map, and the last stage at the end.
    If no module does, as in a vision transformer, the stages are the quarters of the depth.
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
    """Return the names of the last part of each stage.

    parts: the modules that run one after the other.
    named: whether their names say that they are stages; they are, unless there are too many.
    """
    names = list(parts)
    if named and len(names) <= _MOST:
        return names
    ends = [names[n - 1] for n in range(1, len(names)) if _halves(parts[names[n]])]
    if not ends:
        return list(dict.fromkeys(names[max(len(names) * n // 4, 1) - 1] for n in (1, 2, 3, 4)))
    return [*ends, names[-1]][-_MOST:]


def _end(path: str, stage: nn.Module) -> str:
    """Return the path of the stage's output.

    If a stage has a list of blocks, this is the last block, since the stage may halve the map after
    it.
    """
    blocks = dict(stage.named_children()).get("blocks")
    if isinstance(blocks, nn.ModuleList) and len(blocks):
        return f"{path}.blocks.{len(blocks) - 1}"
    return path


def _halves(module: nn.Module) -> bool:
    """Whether the module has a convolution or a pooling with a stride."""
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    strides = [one.stride for one in module.modules() if isinstance(one, kinds)]
    return any(stride not in (1, (1, 1)) for stride in strides)
