"""Replaces the images in the arguments of the student's forward by the student's view."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from kdhooks.classes.ranks import world
from kdhooks.copies import NotCopied
from kdhooks.errors import KDHooksError
from kdhooks.views.viewing import Viewing

Look: TypeAlias = Callable[[Tensor], Tensor]
Around: TypeAlias = Callable[[Look, Tensor, tuple[Any, ...], dict[str, Any]], Tensor | None]
"""A host's own function, which applies the view to images; None leaves the forward unchanged."""


class Entrance(NotCopied):
    """Returns the arguments of the student's forward with the view in place of the images."""

    def __init__(self, viewing: Viewing, clock: Callable[[], tuple[int, int]]) -> None:
        """clock: returns the number of earlier batches, and of batches per optimizer step."""
        self._viewing, self._clock = viewing, clock
        self.around: Around | None = None

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], images: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if images is None:
            raise KDHooksError(
                "student_view needs images (b 3 h w) among the arguments of the student's forward; "
                "found no tensor"
            )
        look = partial(self._look, images.shape[0])
        if self.around is None:
            seen: Tensor | None = look(images)
        else:
            seen = self.around(look, images, args, kwargs)
        if seen is None:
            return None
        replaced = _Replaced(images, seen)
        changed = replaced.of(args), replaced.of(kwargs)
        if not replaced.count:
            raise KDHooksError(
                "student_view needs the student's images in an argument of their own, or in a "
                "dict, list or tuple; found them in another container; take the images out of it"
            )
        return changed

    def described(self) -> str:
        """Return one line, which is the same on every rank with the same view."""
        view = " ".join(repr(self._viewing.view).split())
        return f"a student's view {view}, seed {self._viewing.seed}"

    def _look(self, count: int, images: Tensor) -> Tensor:
        batches, accumulation = self._clock()
        step, batch = divmod(batches, accumulation)
        rank, ranks = (0, 1) if world() is None else (dist.get_rank(), dist.get_world_size())
        return self._viewing(images, step, (batch * ranks + rank) * count)


class _Replaced:
    """Replaces one tensor by another in nested dicts, lists and tuples."""

    def __init__(self, old: Tensor, new: Tensor) -> None:
        self._old, self._new = old, new
        self.count = 0

    def of(self, value: Any) -> Any:
        if value is self._old:
            self.count += 1
            return self._new
        if type(value) in (list, tuple):
            return type(value)(map(self.of, value))
        if type(value) is dict:
            return {key: self.of(inner) for key, inner in value.items()}
        return value
