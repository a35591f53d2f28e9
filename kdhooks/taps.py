"""Records the outputs of named modules, and refuses outputs that would train the wrong thing."""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, listed, near_miss

HALF = (torch.float16, torch.bfloat16)
# The attributes of DDP, DataParallel, torch.compile and Fabric that hold the wrapped model.
_WRAPPERS = ("module", "_orig_mod", "_original_module", "_forward_module")
_SUFFIX = re.compile(r"(.*)(:in|\[-?\d+\]|@[^@:\[]*)")


class Removable(Protocol):
    """What every torch hook registration returns."""

    def remove(self) -> None: ...


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, torch.compile and Fabric, however nested."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    data_parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    children = dict(model.named_children())  # a module with two names appears once
    names = ("module",) if data_parallel else _WRAPPERS[1:]
    return next((children[name] for name in names if name in children), None)


def find(model: nn.Module, path: str, side: str) -> nn.Module:
    """Return the submodule at a path, in which wrappers may be left out.

    `path@2`, `path[-1]` and `path:in` name the same submodule as `path`.
    """
    path = split_path(path, side).name
    if path == "":
        return model
    known = submodules(model)
    module = known.get(without_wrappers(path))
    if module is None:
        raise KDHooksError(
            f"{side} has no submodule '{path}'; {near_miss(path, known)}"
            f"its children are: {listed(children_of(model))}"
        )
    return module


def submodules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all submodules under each of their paths, in which wrappers are left out."""
    named = model.named_modules(remove_duplicate=False)
    return {without_wrappers(name): module for name, module in named if name}


def children_of(model: nn.Module) -> list[str]:
    """Return the names of a model's children, in which wrappers are left out."""
    return [without_wrappers(name) for name, _ in model.named_children()]


class TapPath(NamedTuple):
    """A parsed path such as `path:in[-1]@2`, the last input of the submodule's second call."""

    name: str  # of the submodule; "" is the model itself
    place: int | None = None  # the number in []; None if there is one tensor
    call: int = 0  # the number after @; 0 without one
    inner: bool = False  # whether `:in` asks for the input instead of the output


def split_path(path: str, side: str) -> TapPath:
    """Parse a path, in which `:in`, [n] and @n may follow in any order, each at most once."""
    found: dict[str, str] = {}
    name = path
    while (match := _SUFFIX.fullmatch(name)) and match[2][0] not in found:
        name = match[1]
        found[match[2][0]] = match[2][1:].removesuffix("]")
    call = found.get("@")
    if call is not None and not (call.isdecimal() and int(call) > 0):
        raise KDHooksError(f"{side} tap '{path}' must name a call by its number, as in '{name}@2'")
    if ":" in found and not name:
        raise KDHooksError(
            f"{side} tap '{path}' must name a submodule in front of ':in', since the input of the "
            "whole network is the images"
        )
    place = int(found["["]) if "[" in found else None
    return TapPath(name, place, int(call or 0), ":" in found)


def without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS) or path


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
        self._none_called = dict.fromkeys(self._paths, 0)
        self._calls = dict(self._none_called)  # number of calls in this forward
        self._handles: list[Removable] = [self._watch(path, module) for path, module in found]

    def _watch(self, path: str, module: nn.Module) -> Removable:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Taps":
        return _disarmed()

    def __reduce__(self) -> tuple[Any, ...]:
        return _disarmed, ()


def _disarmed() -> Taps:
    """Create the taps of a copy or a pickle of a tapped model, which record nothing."""
    return Taps(nn.Identity(), (), "copy")


Entrance: TypeAlias = Callable[
    [tuple[Any, ...], dict[str, Any], Tensor | None], tuple[tuple[Any, ...], dict[str, Any]] | None
]
"""Called with the arguments of a forward and their images; returns other arguments, or None."""


class StudentTaps:
    """Taps of a model in training, which record each forward that has gradients.

    Recording starts and stops with the model's forward, so that neither evaluation nor the
    recomputation of activation checkpointing is recorded. The records must be taken before the next
    forward, which is refused otherwise.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.images: Tensor | None = None  # the model's input, until its outputs are taken
        self.inputs: list[Tensor] = []  # all tensors that the model got
        self.version = 0  # version of the images when the forward started
        self.waiting = False  # whether the outputs of a finished forward have not been taken
        self.paused = False
        self.on_enter: Callable[[Tensor], object] | None = None  # called with the images
        self.on_failure: Callable[[], object] | None = None  # called if the forward raises
        self.wrapper: ref[nn.parallel.DistributedDataParallel] | None = None
        self.view: Entrance | None = None  # replaces the model's arguments
        self._taps = Taps(model, paths, "student")
        self._handles: list[Removable] = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    @property
    def fired(self) -> bool:
        """Whether any tap ever ran in training."""
        return self._taps.fired

    def _enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # During a backward pass, it is activation checkpointing that runs the model again.
        backward = torch._C._current_graph_task_id() != -1
        if self.paused or not self._handles or not model.training or backward:
            if backward and self.view is not None and self._handles and model.training:
                raise KDHooksError(
                    "the whole student ran again in a backward pass, by activation checkpointing "
                    "around it, where its view would differ; checkpoint its blocks instead"
                )
            return None
        if not torch.is_grad_enabled():
            return None
        if self.waiting:
            self.discard()
            raise KDHooksError(
                "the student ran again in training before kd computed the terms of its last "
                "forward; call kd(images, labels) once after each forward, call kd.discard() if a "
                "batch is skipped, or run forwards that should not be distilled inside "
                "`with kd.paused():`"
            )
        images, tensors = None, list[Tensor]()
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                tensors.append(value)
                # Images are the first tensor (b 3 h w), or else the first floating-point one.
                better = value.ndim == 4 and (images is None or images.ndim != 4)
                if better or (images is None and value.is_floating_point()):
                    images = value
        if not tensors:
            images = _images_inside((*args, *kwargs.values()))
        changed = None if self.view is None else self._viewed(args, kwargs, images)
        if images is not None:
            if self.on_enter is not None and images.is_floating_point():
                self.on_enter(images)
            self.version = -1 if images.is_inference() else images._version
        if not self._taps.fired and not torch.compiler.is_compiling():
            self._note_wrapper()
        self.images, self.inputs = images, tensors
        self._taps.open()
        return changed

    def _viewed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], images: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        view: Any = self.view
        if torch.compiler.is_compiling():
            view = torch.compiler.disable(view)  # its step must not become a constant
        changed: tuple[tuple[Any, ...], dict[str, Any]] | None = view(args, kwargs, images)
        return changed

    def _note_wrapper(self) -> None:
        """Remember the DistributedDataParallel whose forward this is, if there is one."""
        active = nn.parallel.DistributedDataParallel._active_ddp_module
        self.wrapper = None if active is None else ref(active)

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not self._taps.recording:
            return
        # Torch calls this without an output when the forward has raised.
        finished = output is not None or sys.exc_info()[0] is None
        if not finished:
            self.images, self.inputs = None, []
            if self.on_failure is not None:
                self.on_failure()
        self.waiting = finished
        self._taps.close(finished)

    def take(self) -> dict[str, Tensor]:
        """Return each path's output of the last forward; refuse any that does not require grad."""
        self.images, self.inputs, self.waiting = None, [], False
        outputs = self._taps.take()
        for path, tensor in outputs.items():
            if not tensor.requires_grad:
                raise KDHooksError(
                    f"student tap '{path or 'output'}' carries no gradient, so its loss would "
                    "train nothing (it lies inside a checkpointed block, or is frozen); "
                    "tap the checkpointed block itself, or a later module"
                )
        return outputs

    def discard(self) -> None:
        """Drop the last forward."""
        self.images, self.inputs, self.waiting = None, [], False
        self._taps.discard()

    def remove(self) -> None:
        self.on_enter = self.on_failure = self.view = None
        self.discard()
        self._taps.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StudentTaps":
        return _no_student_taps()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_student_taps, ()


def _images_inside(value: object) -> Tensor | None:
    """The first tensor (b 3 h w) in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value if value.ndim == 4 else None
    inner = value.values() if isinstance(value, dict) else value
    for one in inner if isinstance(inner, Iterable) and not isinstance(inner, str) else ():
        if isinstance(one, Tensor | dict | list | tuple):
            found = _images_inside(one)
            if found is not None:
                return found
    return None


def _no_student_taps() -> StudentTaps:
    taps = StudentTaps(nn.Identity(), ())
    taps.remove()
    return taps


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode, then restore the mode of each submodule, and each buffer.

    Observers of quantisation-aware training update their buffers in eval mode, too.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (buffer, buffer.detach().clone())
        for buffer in model.buffers()
        if not (buffer.is_meta or isinstance(buffer, nn.UninitializedBuffer))
    ]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # a version may not show it
                    buffer.resize_(before.shape).copy_(before)
