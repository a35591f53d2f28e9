"""APT: a frozen transformer learns to teach through prompt tokens alone.

For the time of one call each block gets another `forward`. Hooks can't do it: the bias of a
window's attention has a fixed size, and a block is checkpointed from outside.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdhooks_plugins._blocks import replaced_forward, run_prompted, width

# The tokens that a ViT learns from scratch start with this deviation. It is a factor of parameters
# that start with 1, so that an optimizer's step changes a prompt by little of its length: with a
# learning rate of 0.1 prompts would otherwise leave the range of the teacher's tokens.
_STD = 0.02


class Prompts(nn.Module):
    """t fresh prompts join the tokens of every block, and are left behind at its end."""

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        count: int,
        *,
        joined: tuple[str, str] | None = None,
        checkpointing: bool = False,
    ) -> None:
        """
        blocks: by path in the teacher; nothing of them is kept but paths and widths.
        joined: a stage, and the last block in it: who tapped the stage sees that block's prompts,
            and behind them the pixels; the teacher itself goes on with the pixels alone.
        checkpointing: compute each block anew in backward instead of keeping its activations.
        """
        super().__init__()
        self.paths = tuple(blocks)
        self.prompts = nn.ParameterList(
            nn.Parameter(torch.randn(count, width(block))) for block in blocks.values()
        )
        self.joined = joined
        self.checkpointing = checkpointing

    def no_weight_decay(self) -> set[str]:
        return {f"prompts.{number}" for number in range(len(self.prompts))}

    def forward(self, teacher: nn.Module, images: Tensor) -> Tensor:
        """The teacher, (b 3 h w) -> (b e)."""
        ends: dict[str, Tensor] = {}
        with ExitStack() as changed:
            for path, prompts in zip(self.paths, self.prompts, strict=True):
                block = teacher.get_submodule(path)
                run = partial(run_prompted, block, block.forward, _STD * prompts)
                prompted = partial(self._run, path, run, ends)
                changed.enter_context(replaced_forward(block, prompted))
            if self.joined is not None:
                stage, last = self.joined
                changed.enter_context(_joined(teacher.get_submodule(stage), last, ends))
            embedding: Tensor = teacher(images)
        return embedding

    def _run(
        self,
        path: str,
        run: Callable[..., tuple[Tensor, Tensor]],
        ends: dict[str, Tensor],
        x: Tensor,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        """A block's output; its prompts' are noted in ends."""
        forward = partial(run, x, *args, **kwargs)
        if self.checkpointing:
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        x, ends[path] = forward()
        return x


@contextmanager
def _joined(stage: nn.Module, last: str, ends: Mapping[str, Tensor]) -> Iterator[None]:
    """Hooks that the stage has already see (b t+n k); what follows the stage sees no prompts."""
    outputs: list[Tensor] = []

    def join(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output)
        return torch.cat([ends[last], output.flatten(1, -2)], dim=1)

    def split(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return outputs.pop()

    with stage.register_forward_hook(join, prepend=True), stage.register_forward_hook(split):
        yield
