"""A simulated second device: it computes on the CPU, but like a GPU it refuses to mix its tensors
with the CPU's, and it detects when the host waits for it.

Torch allows one such device per process and cannot remove it, so `in_a_process` creates a process
for it. On a machine with a GPU, the same tests also run on the GPU, in another process: see
`Native`.
"""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from tests import second_streams

python_devices = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch does not support devices written in Python",
)


def _has_cuda() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if the driver is too old
        return torch.cuda.is_available()


needs_cuda = pytest.mark.skipif(not _has_cuda(), reason="there is no CUDA device")
aten = torch.ops.aten
NAME = "far"
FAR = pytest.param(NAME, marks=python_devices)
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])
_COPIES = (aten._to_copy.default, aten.copy_.default)
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Far(Tensor):
    """A tensor of that device; `near` has its values."""

    near: Tensor
    held: second_streams.Held
    is_cuda = True  # so that code for CUDA runs here too

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        far: Far = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(NAME, 0),
        )
        far.near, far.held = near, second_streams.Held(near)
        return far

    def record_stream(self, s: Any) -> None:
        self.held.memory.recorded.add(s)

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch itself calls it so
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} outside of the device")


class Device(TorchDispatchMode):
    """While entered, tensors can be created on, and moved to, `torch.device(NAME, 0)`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._refusing = False

    @contextmanager
    def never_waited_for(self) -> Iterator[None]:
        """Inside, an operator that makes the host wait raises."""
        self._refusing = True
        try:
            yield
        finally:
            self._refusing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        _refuse_mixed(func, far, [x for x in tensors if not isinstance(x, Far)])
        target = given[1].get("device")
        to_far = bool(far) if target is None else torch.device(target).type == NAME
        if self._refusing and _waits(func, args, given[1], far, to_far):
            raise RuntimeError(f"the host waits for the device: {func}")
        found = _computed(func, given, far, to_far)
        made = [x.held for x in pytree.tree_leaves(found) if isinstance(x, Far)]
        second_streams.ran(func, args, [x.held for x in far], made)
        return found


def _refuse_mixed(func: Any, far: list[Far], near: list[Tensor]) -> None:
    """Allow only single numbers from the CPU, and copies in both directions."""
    if far and func not in _COPIES and any(x.ndim for x in near):
        raise RuntimeError(f"tensors must be on one device; {func} found {NAME}:0 and cpu")


def _waits(func: Any, args: Any, options: dict[str, Any], far: list[Far], to_far: bool) -> bool:
    if func is aten._to_copy.default:
        return bool(far) != to_far and not options.get("non_blocking")
    if func is aten.copy_.default:
        crosses = len({isinstance(x, Far) for x in args[:2]}) == 2
        return crosses and not (args[2] if len(args) > 2 else options.get("non_blocking"))
    if func in _INDEXED:
        chosen = [x for x in args[1] if x is not None]
        return bool(far) and any(x.dtype in (torch.bool, torch.uint8) for x in chosen)
    return bool(far) and not _WAITING.isdisjoint(func.tags)


def _computed(func: Any, given: Any, far: list[Far], to_far: bool) -> Any:
    """Compute on the CPU; a result that was written in place is the original tensor."""
    known = {id(x.near): x for x in far}

    def near(x: Any) -> Any:
        if isinstance(x, Far):
            return x.near
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def back(x: Any) -> Any:
        if id(x) in known:
            return known[id(x)]
        return Far(x) if to_far and isinstance(x, Tensor) else x

    args, kwargs = pytree.tree_map(near, given)
    return pytree.tree_map(back, func(*args, **kwargs))


class Native:
    """CUDA or the CPU, with the interface of `Device`."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda

    def __enter__(self) -> "Native":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @contextmanager
    def never_waited_for(self) -> Iterator[None]:
        """Inside, torch raises an error when the host waits for CUDA.

        Waiting for an event is allowed, and therefore `Sent.get` too: torch does not count it.
        """
        if not self._cuda:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def device_at(place: str) -> Device | Native:
    """Return the device of that name: NAME, "cuda" or "cpu"."""
    return Device() if place == NAME else Native(cuda=place == "cuda")


def in_a_process(place: str = NAME) -> ProcessPoolExecutor:
    """Start a process in which tensors can be created on that device and on the CPU."""
    prepare = _register if place == NAME else _prepare
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare)


def _prepare() -> None:
    """Make CUDA compute in full float32, and allow deterministic algorithms."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # avoids a pool of compiler processes
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def _register() -> None:
    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    torch.set_num_threads(1)
    second_streams.install()
    Tensor.pin_memory = lambda self: self  # type: ignore[assignment, method-assign, misc]
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # a Parameter stays the same object
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(…, device=NAME) bypasses us
