"""Whether files are shards of one classifier of one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdhooks.errors import KDHooksError, listed

_COMPARED = ("global_step", "epoch")  # of arcface_torch's checkpoints
_PER_RANK = ("running_mean", "running_var", "num_batches_tracked")  # each rank has its own


def check_one_run(
    parts: Sequence[Tensor], contents: Sequence[object], paths: Sequence[Path]
) -> None:
    """Raise unless the parts are an even split of one classifier, saved in one step of one run."""
    sizes = [len(part) for part in parts]
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1 or sizes != sorted(sizes, reverse=True) or sizes[0] - sizes[-1] > 1:
        shapes = ", ".join(
            f"{path.name} {tuple(part.shape)}" for path, part in zip(paths, parts, strict=True)
        )
        raise KDHooksError(
            f"teacher classifier: shards of one run differ by one row at most; found {shapes}"
        )
    for key in _COMPARED:
        values = [
            content.get(key) if isinstance(content, Mapping) else None for content in contents
        ]
        if any(not _equal(value, values[0]) for value in values):
            found = listed(f"{p.name} {v}" for p, v in zip(paths, values, strict=True))
            raise KDHooksError(
                f"teacher classifier: shards must be of one step of one run; their {key} differs: "
                f"{found}; remove those that another run left behind"
            )
    for path, part, content in list(zip(paths, parts, contents, strict=True))[1:]:
        first, other = backbone_of(contents[0]), backbone_of(content)
        if first and other and not alike(first, other):
            raise KDHooksError(
                f"teacher classifier: shards must be of one run; '{paths[0]}' and '{path}' hold "
                "different backbones; remove those that another run left behind"
            )
        twins = [p for p, other in zip(paths, parts, strict=True) if same(other, part)]
        if len(twins) > 1:
            raise KDHooksError(
                "teacher classifier: each shard must hold its own classes; "
                f"{listed(map(str, twins))} hold the same rows; copy the missing shard again"
            )


def _equal(one: object, other: object) -> bool:
    """Compares tensors by their numbers; a tensor never equals another object."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def backbone_of(content: object) -> dict[str, Tensor]:
    found: Any = content.get("state_dict_backbone") if isinstance(content, Mapping) else None
    items = found.items() if isinstance(found, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, Tensor)}


def alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two backbones have the same names, and weights as close as the ranks of one run."""
    ours, theirs = _without_wrappers(one), _without_wrappers(other)
    return ours.keys() == theirs.keys() and all(
        ours[key].shape == theirs[key].shape
        and torch.allclose(ours[key].float(), theirs[key].float(), rtol=1e-2, atol=1e-4)
        for key in ours
    )


def _without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace("_orig_mod.", "").removeprefix("module."): tensor.detach().cpu()
        for key, tensor in state.items()
        if not key.endswith(_PER_RANK) and not key.startswith("kdhooks.")
    }


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one[:1], other[:1]) and torch.equal(one, other)
