"""Names of parameters and buffers, as the modules inside of a module declare them."""

from typing import Any

from torch import nn


def full_name(prefix: str, name: str) -> str:
    """The name in the whole module; prefix "" is that of the module itself."""
    return f"{prefix}.{name}".lstrip(".")


def declared_inside(module: nn.Module, method: str) -> set[str]:
    """The full names that modules inside return from a method `() -> set[str]`, if they have it."""
    found = set[str]()
    for prefix, inner in module.named_modules():
        names: Any = getattr(inner, method, None)
        if names is not None:
            found |= {full_name(prefix, name) for name in names()}
    return found
