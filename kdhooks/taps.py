"""Recording what named modules put out, and refusing what would train the wrong thing."""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, listed, near_miss

HALF = (torch.float16, torch.bfloat16)
_WRAPPERS = ("module", "_orig_mod")  # DDP, DataParallel and torch.compile put these in front


class Removable(Protocol):
    """What every torch hook registration returns."""

    def remove(self) -> None: ...


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile, in any nesting."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    data_parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return dict(model.named_children()).get("module" if data_parallel else "_orig_mod")


def find(model: nn.Module, path: str, side: str) -> nn.Module:
    """The submodule at a path, whatever wrappers stand in front of it or in between."""
    if path == "":
        return model
    known: dict[str, nn.Module] = {
        _without_wrappers(name): module for name, module in model.named_modules() if name
    }
    module = known.get(_without_wrappers(path))
    if module is None:
        children = [_without_wrappers(name) for name, _ in model.named_children()]
        raise KDHooksError(
            f"{side} has no submodule '{path}'; {near_miss(path, known)}"
            f"its children are: {listed(children)}"
        )
    return module


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS) or path


class Taps:
    """Keeps the outputs of named modules between `open` and `close`, until they are taken."""

    def __init__(self, model: nn.Module, paths: Sequence[str], side: str) -> None:
        self._side = side
        self.recording = False
        self._records: dict[str, tuple[Tensor, int]] = {}  # with the version that each had
        self.fired = False
        self._paths = list(dict.fromkeys(paths))
        self._handles: list[Removable] = [
            find(model, path, side).register_forward_hook(partial(self._record, path))
            for path in self._paths
        ]

    def open(self) -> None:
        self._records.clear()
        self.recording = True

    def close(self, finished: bool = True) -> None:
        """finished: False where the forward raised; nobody takes what it left."""
        if self.recording and not finished:
            self._records.clear()
        self.recording = False

    __enter__ = open

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(kind is None)

    def _record(self, path: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not self.recording:
            return
        if isinstance(output, tuple | list) and len(output) == 1:
            output = output[0]  # mmpretrain's backbones and necks
        if not isinstance(output, Tensor):
            raise KDHooksError(
                f"{self._side} tap '{path or 'output'}' must put out a tensor; "
                f"found {type(output).__name__}; name a submodule that returns one tensor"
            )
        self.fired = True
        # An inference tensor has no version; nothing can be written into it outside of its mode.
        version = -1 if output.is_inference() else output._version
        self._records[path] = output, version

    def take(self) -> dict[str, Tensor]:
        """Each path's output of the last forward, in float32 at least; they are let go of here."""
        records, self._records = self._records, {}
        if len(records) < len(self._paths):
            raise KDHooksError(self._never_fired(records))
        outputs: dict[str, Tensor] = {}
        for path, (tensor, version) in records.items():
            if version < 0:
                tensor = tensor.clone()  # no loss could use it
            elif tensor._version != version:
                raise KDHooksError(
                    f"{self._side} tap '{path}' was overwritten in place after it was recorded "
                    "(an in-place ReLU, dropout or residual sum follows it); tap the module that "
                    "overwrites it, or the block around both"
                )
            outputs[path] = tensor.float() if tensor.dtype in HALF else tensor
        return outputs

    def _never_fired(self, fired: Collection[str]) -> str:
        missing = [path for path in self._paths if path not in fired]
        names = ", ".join(f"'{path or 'output'}'" for path in missing)
        if fired:
            return f"{self._side} tap {names} did not run in this forward; tap a module that does"
        return (
            f"{self._side} tap {names} recorded nothing; run the {self._side} in training mode "
            "with grad before each call, and attach before the first call of a compiled model "
            "(torch.compile ignores hooks that come later)"
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._records.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Taps":
        return _disarmed()

    def __reduce__(self) -> tuple[Any, ...]:
        return _disarmed, ()


def _disarmed() -> Taps:
    """What a copy or a pickle of a tapped model carries: taps that keep nothing."""
    return Taps(nn.Identity(), (), "copy")


class StudentTaps:
    """Taps of a model in training: each forward with grad records; `take` checks and lets go.

    A forward opens at the model's entrance and closes at its exit, so that neither evaluation
    nor the recomputation of activation checkpointing is recorded. `on_enter` is told its images,
    and what it gives is kept as `begun`.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.images: Tensor | None = None
        self.on_enter: Callable[[Tensor], object] | None = None
        self.begun: Any = None
        self._taps = Taps(model, paths, "student")
        self._handles: list[Removable] = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    @property
    def fired(self) -> bool:
        """Whether any tap ever ran in training."""
        return self._taps.fired

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # In a backward it is activation checkpointing that runs the model again.
        backward = torch._C._current_graph_task_id() != -1
        if self._handles and model.training and torch.is_grad_enabled() and not backward:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self.images = self.begun = None
            if tensors and self.on_enter is not None:
                self.begun = self.on_enter(tensors[0])
            self.images = tensors[0] if tensors else None
            self._taps.open()

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        # Torch calls this where the forward raised, too, with no output.
        finished = output is not None or sys.exc_info()[0] is None
        if self._taps.recording and not finished:
            self.images = self.begun = None
        self._taps.close(finished)

    def take(self) -> dict[str, Tensor]:
        self.images = self.begun = None
        outputs = self._taps.take()
        for path, tensor in outputs.items():
            if not tensor.requires_grad:
                raise KDHooksError(
                    f"student tap '{path or 'output'}' carries no gradient, so its loss would "
                    "train nothing (it lies inside a checkpointed block, or is frozen); "
                    "tap the checkpointed block itself, or a later module"
                )
        return outputs

    def remove(self) -> None:
        self.images = self.begun = self.on_enter = None
        self._taps.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StudentTaps":
        return _no_student_taps()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_student_taps, ()


def _no_student_taps() -> StudentTaps:
    taps = StudentTaps(nn.Identity(), ())
    taps.remove()
    return taps


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, each submodule's own mode put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
