"""Counts the Python calls of a step, and its bytes at the peak and afterwards."""

import gc
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = Callable[[], object]


class Calls(NamedTuple):
    python: int  # of functions written in Python
    c: int  # of functions written in C, made by those


def calls(work: Work) -> Calls:
    """Count the calls in this thread with sys.setprofile."""
    counted = {"call": 0, "c_call": 0}

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event in counted:
            counted[event] += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return Calls(counted["call"], counted["c_call"] - 1)  # the last one ends the counting


class Bytes(NamedTuple):
    peak: int  # the most at a time, in tensors that the work made
    held: int  # after it, in those


def tensor_bytes(work: Work) -> Bytes:
    """Return the bytes in tensors, measured between operators, on any device.

    So without the models, their gradients and what an operator needs while it runs; but with what
    autograd saves, and no matter who holds it.
    """
    made = _Made()
    with made:
        work()
    gc.collect()
    return Bytes(made.peak, made.bytes())


class _Made(TorchDispatchMode):
    """Knows the storages that operators made, and which of them are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._here: dict[int, tuple[StorageWeakRef, int]] = {}
        self._from_before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in self._here:
                self._from_before[reference.cdata] = reference
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in self._from_before:
                self._here[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self) -> int:
        for key in [key for key, (reference, _) in self._here.items() if reference.expired()]:
            del self._here[key]
        return sum(size for _, size in self._here.values())


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
