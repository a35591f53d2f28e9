"""Keys that identify views, and headers that identify teachers."""

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError

Identity: TypeAlias = Mapping[str, object]
"""The properties that identify a teacher, as JSON values; None if a property is not comparable."""

HEADER = "teacher.json"
FORMAT = 1
IDENTITY = ("images", "weights", "input", "dtype")
"""The keys of a header that distinguish teachers."""

_SEED = 20180118  # of the weights of the hash; changing it invalidates every cache
_SAME = 0.05  # relative; another device or precision differs by less, another teacher by more
_STEPS = 15  # per grey level; odd, so that differences of whole levels keep their lowest bit
_WHOLE = 1.5 * 2**23  # a float32 plus this has no fraction bits: its low bits are a whole number


class ViewKeys:
    """Computes a 64-bit key for each image, from its content only.

    Pixels are rounded to 1/15 of a grey level, because trainers scale 8-bit pictures to [-1, 1] in
    slightly different ways, which must all result in the same key. Each half of the key is the sum
    of these numbers, each multiplied by a fixed random number, modulo 2^32. These are whole
    numbers, so the key depends neither on the device nor on the rest of the batch.

    Two different pictures share a key with probability 2^-64, or 2^-(64-2n) if all their
    differences are multiples of 2^n levels. Among 10^8 views, the probability that any two share a
    key is 0.0003. Views that differ by less than a rounding step in every pixel count as the same.
    """

    def __init__(self) -> None:
        self._weights = torch.empty(2, 0, dtype=torch.int32)

    def __call__(self, images: Tensor) -> Tensor:
        """(b 3 h w) in [-1, 1] -> (b) int64, on the same device."""
        count = images.shape[1:].numel()
        if self._weights.shape[1] != count or self._weights.device != images.device:
            self._weights = _weights(count).to(images.device)
        pixels = images.float().reshape(images.shape[0], 1, count)
        # Separate operators, each of which rounds: a fused multiply-add would change the keys.
        grid = pixels.add(1).mul_(127.5 * _STEPS).add_(_WHOLE).view(torch.int32)
        halves = (grid * self._weights).sum(2, dtype=torch.int32)
        # The two halves are adjacent in memory, so a view joins them without another operator for
        # the host to launch.
        key: Tensor = halves.view(torch.int64).squeeze(1)
        return key


def _weights(count: int) -> Tensor:
    """(2 count) int32: the weights for the two halves of a key, in their order in memory.

    numpy guarantees the same stream of bits in all its versions.
    """
    raw = np.random.PCG64(_SEED).random_raw(count)
    high_first = torch.from_numpy(raw.view(np.int32).reshape(2, count))
    return high_first.flip(0) if sys.byteorder == "little" else high_first


def probe_images(like: Tensor) -> Tensor:
    """(2 3 h w): random images in [-1, 1], which depend only on the shape."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(2, *like.shape[1:], generator=generator) * 2 - 1).to(like)


def weights_of(model: nn.Module | Callable[[Tensor], object]) -> str | None:
    """Return the SHA-256 of a model's weights; None for a function without a `sha256`."""
    return digest(model) if isinstance(model, nn.Module) else getattr(model, "sha256", None)


def digest(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with their names, shapes and dtypes."""
    found = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_header(folder: Path, teacher: Identity, probe: Tensor) -> None:
    """Check that the folder's header names this teacher. Write the header if there is none."""
    mine = {"dim": probe.shape[1], **teacher}
    write_header(folder, {"format": FORMAT, **mine, "probe": probe.double().cpu().tolist()})
    known = read_header(folder)
    for name, value in mine.items():
        if known.get(name) != value:
            raise KDHooksError(
                f"teacher cache: '{folder}' was filled with {name} {known.get(name)!r}, but this "
                f"teacher has {value!r}; remove the folder, or specify another"
            )
    check_same(folder, torch.tensor(known["probe"]), probe.cpu(), "embeddings of one fixed batch")


def check_same(folder: Path, found: Tensor, wanted: Tensor, what: str) -> None:
    """(n e), (n e): check that each row is within 5 % of the teacher's.

    This holds for the same teacher on any device and in any dtype.
    """
    length = wanted.float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    off = float(((found.float() - wanted.float()).norm(dim=1) / length).max())
    if not off <= _SAME:
        raise KDHooksError(
            f"teacher cache: '{folder}' was filled by another teacher: {what} are {off:.1%} off; "
            "remove the folder, or specify another"
        )


def read_header(folder: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise KDHooksError(
            f"teacher cache: '{folder}' holds no {HEADER}; specify the folder of a cache, as in "
            "teacher.cache"
        ) from error
    except (OSError, ValueError) as error:
        raise KDHooksError(
            f"teacher cache: '{folder / HEADER}' can't be read ({error}); remove the folder, or "
            "specify another"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise KDHooksError(
            f"teacher cache: '{folder / HEADER}' must have format {FORMAT}, as this version of "
            "kdhooks writes it; it has another; remove the folder, or specify another"
        )
    dim = header.get("dim")
    try:
        probe = torch.tensor(header.get("probe"), dtype=torch.double)
        shape = tuple(probe.shape) if probe.numel() and probe.isfinite().all() else ()
    except (TypeError, ValueError, RuntimeError):
        shape = ()
    if type(dim) is not int or shape != (2, dim) or not header.keys() >= set(IDENTITY):
        raise KDHooksError(
            f"teacher cache: '{folder / HEADER}' must hold dim, and probe with two embeddings of "
            f"that width, and {', '.join(IDENTITY)}; it is damaged; remove the folder, or specify "
            "another"
        )
    return header


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Write the header atomically, unless another process has already written one."""
    draft = folder / f"{HEADER}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / HEADER).is_file():
            return
        try:
            draft.write_text(json.dumps(header), encoding="utf-8")
            os.link(draft, folder / HEADER)
        except FileExistsError:
            pass
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise KDHooksError(
            f"teacher cache: '{folder}' can't be created ({error.strerror}); free some space, or "
            "specify another folder as teacher.cache"
        ) from error
