"""Parameters for an optimizer, some of them without weight decay."""

from typing import Any

from torch import nn

from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.names import declared_inside


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return one group with weight decay, and one without it for parameters that must not decay.

    A submodule names the latter in `no_weight_decay() -> set[str]`, as in timm.
    """
    spared = declared_inside(module, "no_weight_decay")
    named = dict(module.named_parameters())
    if unknown := spared - named.keys():
        raise KDHooksError(
            f"no_weight_decay names '{min(unknown)}', which is not a parameter; "
            f"{near_miss(min(unknown), named)}the losses have: {listed(named)}"
        )
    groups = [
        {
            "params": [p for name, p in named.items() if name not in spared],
            "weight_decay": weight_decay,
        },
        {"params": [named[name] for name in named if name in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
