"""Finds the submodules of a model by their paths, in which wrappers such as DDP are left out."""

import re
from typing import NamedTuple

from torch import nn

from kdhooks.errors import KDHooksError, listed, near_miss

# The attributes of DDP, DataParallel, torch.compile and Fabric that hold the wrapped model.
_WRAPPERS = ("module", "_orig_mod", "_original_module", "_forward_module")
_SUFFIX = re.compile(r"(.*)(:in|\[-?\d+\]|@[^@:\[]*)")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, torch.compile and Fabric, however nested."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    data_parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    children = dict(model.named_children())  # a module with two names appears once
    names = ("module",) if data_parallel else _WRAPPERS[1:]
    return next((children[name] for name in names if name in children), None)


def find(model: nn.Module, path: str, side: str) -> nn.Module:
    """Return the submodule at a path, in which wrappers may be left out.

    `path@2`, `path[-1]` and `path:in` name the same submodule as `path`.
    """
    path = split_path(path, side).name
    if path == "":
        return model
    known = submodules(model)
    module = known.get(without_wrappers(path))
    if module is None:
        raise KDHooksError(
            f"{side} has no submodule '{path}'; {near_miss(path, known)}"
            f"its children are: {listed(children_of(model))}"
        )
    return module


def submodules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all submodules under each of their paths, in which wrappers are left out."""
    named = model.named_modules(remove_duplicate=False)
    return {without_wrappers(name): module for name, module in named if name}


def children_of(model: nn.Module) -> list[str]:
    """Return the names of a model's children, in which wrappers are left out."""
    return [without_wrappers(name) for name, _ in model.named_children()]


class TapPath(NamedTuple):
    """A parsed path such as `path:in[-1]@2`, the last input of the submodule's second call."""

    name: str  # of the submodule; "" is the model itself
    place: int | None = None  # the number in []; None if there is one tensor
    call: int = 0  # the number after @; 0 without one
    inner: bool = False  # whether `:in` asks for the input instead of the output


def split_path(path: str, side: str) -> TapPath:
    """Parse a path, in which `:in`, [n] and @n may follow in any order, each at most once."""
    found: dict[str, str] = {}
    name = path
    while (match := _SUFFIX.fullmatch(name)) and match[2][0] not in found:
        name = match[1]
        found[match[2][0]] = match[2][1:].removesuffix("]")
    call = found.get("@")
    if call is not None and not (call.isdecimal() and int(call) > 0):
        raise KDHooksError(f"{side} tap '{path}' must name a call by its number, as in '{name}@2'")
    if ":" in found and not name:
        raise KDHooksError(
            f"{side} tap '{path}' must name a submodule in front of ':in', since the input of the "
            "whole network is the images"
        )
    place = int(found["["]) if "[" in found else None
    return TapPath(name, place, int(call or 0), ":" in found)


def without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS) or path
