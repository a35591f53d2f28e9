"""Full names of parameters and buffers that submodules declare."""

from typing import Any

from torch import nn


def full_name(prefix: str, name: str) -> str:
    """Return the name in the whole module. prefix: the submodule's path, "" for the whole."""
    return f"{prefix}.{name}".lstrip(".")


def declared_inside(module: nn.Module, method: str) -> set[str]:
    """Collect the full names that submodules return from a method `() -> set[str]`, if any."""
    found = set[str]()
    for prefix, inner in module.named_modules():
        names: Any = getattr(inner, method, None)
        if names is not None:
            found |= {full_name(prefix, name) for name in names()}
    return found
