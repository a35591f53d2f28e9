"""The end of a stage of a backbone, as methods see it."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.taps import find

# How many tokens a transformer puts before those of its patches, where it says so: as mmpretrain
# and timm call it. And those tokens themselves, where it does not.
_COUNTS = ("num_extra_tokens", "num_prefix_tokens")
_TOKENS = (
    "cls_token", "class_token", "dist_token", "distillation_token",
    "reg_token", "reg_tokens", "register_tokens", "storage_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """The end of one stage of a backbone: its path, and what it put out when it was probed.

    probed: its output's shape without the batch; or why it has none, which who taps it is told.
    prefix: how many tokens, of classes and the like, precede those of the patches.
    """

    path: str
    probed: tuple[int, ...] | KDHooksError
    prefix: int = 0

    @staticmethod
    def of(module: nn.Module, path: str, output: Tensor) -> "Stage":
        """Of the submodule at a path, which put this out, (b …)."""
        shape = tuple(output.shape[1:])
        return Stage(path, shape, _prefix(module, path, *shape) if len(shape) == 2 else 0)

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.probed, KDHooksError):
            raise self.probed
        return self.probed

    @property
    def channels(self) -> int:
        """k of a map (k h w) or of tokens (n k)."""
        return self.shape[0] if len(self.shape) == 3 else self.shape[-1]


def _prefix(module: nn.Module, path: str, n: int, k: int) -> int:
    """How many of n tokens are none of the patches, by what their owner says or holds."""
    names = path.split(".")
    for end in reversed(range(len(names))):
        owner = find(module, ".".join(names[:end]), "")
        said = [vars(owner).get(name, getattr(type(owner), name, None)) for name in _COUNTS]
        tokens = [getattr(owner, name, None) for name in _TOKENS]
        held = [token.shape[-2] for token in tokens if isinstance(token, Tensor) and token.ndim > 1]
        counts = [count for count in said if type(count) is int] or (held and [sum(held)])
        if counts:
            # Some join later than this stage, and some never.
            patches = n - counts[0]
            return counts[0] if patches > 0 and math.isqrt(patches) ** 2 == patches else 0
    return 0
