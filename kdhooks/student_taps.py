"""Records each forward of the student in training, for the terms that kd computes after it."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdhooks.errors import KDHooksError
from kdhooks.taps import Taps

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
        self._handles: list[RemovableHandle] = [
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
