"""The last submodule of a backbone's stage, as methods see it."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.paths import find

# The attributes in which mmpretrain's and timm's transformers store how many tokens precede the
# patch tokens; and attributes that hold these tokens, for transformers without such a number.
_COUNTS = ("num_extra_tokens", "num_prefix_tokens")
_TOKENS = (
    "cls_token", "class_token", "dist_token", "distillation_token",
    "reg_token", "reg_tokens", "register_tokens", "storage_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """The last submodule of one stage of a backbone: its path, and its output when probed.

    probed: the output's shape without the batch; or the error to raise if a method taps the stage.
    prefix: the number of tokens, such as class tokens, before the patch tokens.
    """

    path: str
    probed: tuple[int, ...] | KDHooksError
    prefix: int = 0

    @staticmethod
    def of(module: nn.Module, path: str, output: Tensor) -> "Stage":
        """Create the stage of the submodule at a path, from its output (b …)."""
        shape = tuple(output.shape[1:])
        return Stage(path, shape, _prefix(module, path, shape[0]) if len(shape) == 2 else 0)

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.probed, KDHooksError):
            raise self.probed
        return self.probed

    @property
    def channels(self) -> int:
        """k of a map (k h w) or of tokens (n k)."""
        return self.shape[0] if len(self.shape) == 3 else self.shape[-1]


def _prefix(module: nn.Module, path: str, n: int) -> int:
    """Return how many of n tokens precede the patch tokens, by attributes of the modules above."""
    names = path.split(".")
    for end in reversed(range(len(names))):
        owner = find(module, ".".join(names[:end]), "")
        said = [vars(owner).get(name, getattr(type(owner), name, None)) for name in _COUNTS]
        tokens = [getattr(owner, name, None) for name in _TOKENS]
        held = [token.shape[-2] for token in tokens if isinstance(token, Tensor) and token.ndim > 1]
        counts = [count for count in said if type(count) is int] or (held and [sum(held)])
        if counts:
            # The model may add these tokens after this stage, or not at all.
            patches = n - counts[0]
            return counts[0] if patches > 0 and math.isqrt(patches) ** 2 == patches else 0
    return 0
