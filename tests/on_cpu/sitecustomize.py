"""Replaces the calls of CUDA and NCCL that arcface_torch makes, so that it runs on a CPU.

Python imports this module automatically from PYTHONPATH, so it has a folder of its own. The
trainer's scripts then run without a GPU and unedited, however they are started.
"""

import contextlib
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Stream:
    def __init__(self, *args: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...


def _itself(self: Any, *args: object, **kwargs: object) -> Any:
    return self


def _on_cpu(make: Any) -> Any:
    """Create on the CPU, whichever device is named."""

    def made(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})

    return made


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _without_devices(init: Any) -> Any:
    def wrapped(self: Any, module: nn.Module, device_ids: object = None, **kwargs: Any) -> None:
        init(self, module, **kwargs)

    return wrapped


def _by_gloo(init: Any) -> Any:
    def wrapped(backend: str = "", init_method: str | None = None, **kwargs: Any) -> None:
        if init_method is not None:  # the trainer's fixed port
            init_method = f"tcp://127.0.0.1:{_free_port()}"
        init("gloo", init_method=init_method, **kwargs)

    return wrapped


_ANSWERS: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "set_device", lambda *args: None),
    (torch.cuda, "Stream", Stream),
    (torch.cuda, "current_stream", Stream),
    (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
    (Tensor, "cuda", _itself),
    (nn.Module, "cuda", _itself),
    (Tensor, "to", _on_cpu(Tensor.to)),
    (torch, "tensor", _on_cpu(torch.tensor)),
    (dist, "init_process_group", _by_gloo(dist.init_process_group)),
    (DistributedDataParallel, "__init__", _without_devices(DistributedDataParallel.__init__)),
)
for _owner, _name, _answer in _ANSWERS:
    setattr(_owner, _name, _answer)
