"""Images as the input of networks, and the embeddings of many images."""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 128


def as_input(images: Tensor) -> Tensor:
    """(b 3 h w) uint8 -> (b 3 h w) in [-1, 1], as the trainers scale images."""
    return ((images.float() - 127.5) / 127.5).contiguous(memory_format=layout(images.device))


def layout(device: torch.device) -> torch.memory_format:
    """Channels last, which is faster on a processor.

    It is slower on a GPU: cuDNN's grouped convolutions in float32 are slow there, and PyTorch's own
    depthwise kernels need contiguous channels.
    """
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


@torch.no_grad()
def embed(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    chunk: int = CHUNK,
    device: torch.device | None = None,
) -> Tensor:
    """(n 3 112 112) uint8 -> (n d), on the images' device. The model runs on `device`."""
    parts = [model(as_input(some.to(device or images.device))) for some in images.split(chunk)]
    return torch.cat(parts).to(images.device)
