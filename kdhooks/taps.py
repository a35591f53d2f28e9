"""Records the outputs of named modules in one forward; refuses those that were overwritten."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._script import RecursiveScriptModule
from torch.utils.hooks import RemovableHandle

from kdhooks.errors import KDHooksError
from kdhooks.paths import find, split_path

HALF = (torch.float16, torch.bfloat16)


class Taps:
    """Records outputs and inputs of named modules between `open` and `close`, for `take`."""

    def __init__(self, model: nn.Module, paths: Sequence[str], side: str) -> None:
        """
        paths: `path@2` names a call of a module that runs several times in one forward, `path[-1]`
            one of several tensors that it returns, and `path:in` its input.
        """
        self._side = side
        self.recording = False
        self._records: dict[str, tuple[Tensor, int]] = {}  # with the tensor's version
        self.fired = False
        self._paths = list(dict.fromkeys(paths))
        found = [(path, find(model, path, side)) for path in self._paths]
        for path, module in found:
            if isinstance(module, RecursiveScriptModule):
                raise KDHooksError(
                    f"{side} tap '{path or 'output'}' must be a plain module; found a scripted "
                    "one, which calls no hooks; pass the plain module"
                )
        self._none_called = dict.fromkeys(self._paths, 0)
        self._calls = dict(self._none_called)  # number of calls in this forward
        self._handles: list[RemovableHandle] = [self._watch(path, module) for path, module in found]

    def _watch(self, path: str, module: nn.Module) -> RemovableHandle:
        _, place, call, inner = split_path(path, self._side)
        if inner:
            record = partial(self._record_input, path, place, call)
            return module.register_forward_pre_hook(record, with_kwargs=True)
        return module.register_forward_hook(partial(self._record, path, place, call))

    def open(self) -> None:
        self._records.clear()
        self._calls.update(self._none_called)
        self.recording = True

    def close(self, finished: bool = True) -> None:
        """Stop recording. finished: False if the forward raised, which drops its records."""
        if self.recording and not finished:
            self.discard()
        self.recording = False

    __enter__ = open

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(kind is None)

    def _record(
        self,
        path: str,
        place: int | None,
        wanted: int,
        module: nn.Module,
        args: tuple[Any, ...],
        output: object,
    ) -> None:
        if not self.recording:
            return
        self._calls[path] += 1
        if wanted and self._calls[path] != wanted:
            return
        if path in self._records:
            raise KDHooksError(
                f"{self._side} tap '{path or 'output'}' ran twice in one forward; name the call "
                f"that is meant: '{path}@1' or '{path}@2'"
            )
        if place is not None or not isinstance(output, Tensor):  # avoids a call in each step
            output = self._chosen(output, path, place)
        self.fired = True
        # An inference tensor has no version, and cannot be changed outside inference mode.
        version = -1 if output.is_inference() else output._version
        self._records[path] = output, version

    def _record_input(
        self,
        path: str,
        place: int | None,
        wanted: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Record an input like an output: the only tensor among the arguments, or all arguments."""
        given: Any = (*args, *kwargs.values())
        if len(given) == 1:
            (given,) = given
        elif place is None and sum(isinstance(one, Tensor) for one in given) == 1:
            given = next(one for one in given if isinstance(one, Tensor))
        self._record(path, place, wanted, module, args, given)

    def _chosen(self, output: object, path: str, place: int | None) -> Tensor:
        """Return the tensor that a module returned or got; of several, the one at `place`."""
        inner = split_path(path, self._side).inner
        puts_out, returns, each = (
            ("get", "gets", "inputs") if inner else ("return", "returns", "outputs")
        )
        several = list(output) if isinstance(output, tuple | list) else None
        kind = type(output).__name__ + ("" if several is None else f" of {len(several)}")
        if several is None and place is not None:
            raise KDHooksError(
                f"{self._side} tap '{path}' must name one of several {each}; found {kind}; leave "
                f"out '[{place}]'"
            )
        if several is not None and (place is not None or len(several) == 1):
            place = place or 0  # a tuple of one, as from mmpretrain's backbones
            if not -len(several) <= place < len(several):
                raise KDHooksError(
                    f"{self._side} tap '{path}' must name one of several {each}; found {kind}"
                )
            output = several[place]
        if not isinstance(output, Tensor):
            raise KDHooksError(
                f"{self._side} tap '{path or 'output'}' must {puts_out} a tensor; "
                f"found {kind}; name a submodule that {returns} one tensor"
                f"{f', or one of these: {path}[-1] is the last' if several else ''}"
            )
        return output

    def take(self) -> dict[str, Tensor]:
        """Return each path's output of the last forward, at least in float32; drop the records."""
        records, self._records = self._records, {}
        if len(records) < len(self._paths):
            raise KDHooksError(self._never_fired(records))
        outputs: dict[str, Tensor] = {}
        for path, (tensor, version) in records.items():
            if version < 0:
                tensor = tensor.clone()  # no loss can use an inference tensor
            elif tensor._version != version:
                raise KDHooksError(
                    f"{self._side} tap '{path or 'output'}' was overwritten in place after it was "
                    "recorded (an in-place ReLU, dropout or residual sum follows it, or the loop "
                    "writes into it); tap the module that overwrites it, or clone it first"
                )
            outputs[path] = tensor.float() if tensor.dtype in HALF else tensor
        return outputs

    def _never_fired(self, fired: Collection[str]) -> str:
        missing = [path for path in self._paths if path not in fired]
        names = ", ".join(f"'{path or 'output'}'" for path in missing)
        if not self._handles:
            return f"{self._side} tap {names} recorded nothing, since remove() removed its hook"
        for path in missing:
            ran, wanted = self._calls[path], split_path(path, self._side).call
            if 0 < ran < wanted:
                return (
                    f"{self._side} tap '{path}' must name a call that happens in each forward; its "
                    f"submodule ran {ran} time{'s' if ran > 1 else ''} in this one; name an "
                    "earlier call"
                )
        if fired:
            return (
                f"{self._side} tap {names} did not run in this forward; tap a module that does, "
                "and attach before the first call of a compiled model"
            )
        if self._side == "teacher":
            return (
                f"teacher tap {names} recorded nothing: a compiled, scripted or exported model "
                "calls no hooks that were registered later; give Teacher the plain module"
            )
        return (
            f"{self._side} tap {names} recorded nothing; run the {self._side} in training mode "
            "with grad before each call, and attach before the first call of a compiled model "
            "(torch.compile ignores hooks that come later)"
        )

    def discard(self) -> None:
        """Drop the records of the last forward."""
        self._records.clear()
        self.recording = False

    def remove(self) -> None:
        self.discard()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return _disarmed, ()


def _disarmed() -> Taps:
    """Create the taps of a copy or a pickle of a tapped model, which record nothing."""
    return Taps(nn.Identity(), (), "copy")
