"""APT: a frozen transformer learns to teach, and only its prompt tokens are trained.

During a call, each block temporarily gets another `forward`. Hooks are not enough: the bias of a
window's attention has a fixed size, and a block is checkpointed from outside.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdhooks_plugins._blocks import replaced_forward, run_prompted, width

# A ViT's learned tokens start with this standard deviation. Here it multiplies parameters with a
# standard deviation of 1, so an optimizer step changes a prompt by only a small part of its length.
# With a learning rate of 0.1 prompts would otherwise leave the range of the teacher's tokens.
_STD = 0.02


class Prompts(nn.Module):
    """t new prompts join the tokens of every block, and are removed after it."""

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        count: int,
        *,
        joined: tuple[str, str] | None = None,
        checkpointing: bool = False,
    ) -> None:
        """
        blocks: by path in the teacher; only their paths and widths are kept.
        joined: a stage, and its last block. A tap of the stage gets that block's prompts followed
            by the pixels; the teacher itself continues with only the pixels.
        checkpointing: compute each block again in backward instead of keeping its activations.
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
        """Return a block's output for its tokens; store that for its prompts in `ends`."""
        forward = partial(run, x, *args, **kwargs)
        if self.checkpointing:
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        x, ends[path] = forward()
        return x


@contextmanager
def _joined(stage: nn.Module, last: str, ends: Mapping[str, Tensor]) -> Iterator[None]:
    """Show (b t+n k) to the hooks that the stage already has, and no prompts to later modules."""
    outputs: list[Tensor] = []

    def join(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output)
        return torch.cat([ends[last], output.flatten(1, -2)], dim=1)

    def split(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return outputs.pop()

    with stage.register_forward_hook(join, prepend=True), stage.register_forward_hook(split):
        yield
