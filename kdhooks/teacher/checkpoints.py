"""Weights from files: surely the ones meant, and into the network that they are of."""

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError

log = logging.getLogger("kdhooks")

_PREFIXES = ("module.", "_orig_mod.")


def refuse_untrained(module: nn.Module) -> None:
    """A network whose every BatchNorm is still as it was made never saw a face."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [m for m in norms if m.running_mean is not None and m.running_var is not None]
    if tracked and not any(_has_statistics(norm) for norm in tracked):
        raise KDHooksError(
            f"teacher was never trained: the running statistics of all {len(tracked)} BatchNorm "
            "layers are at their initial values; load a checkpoint into it first"
        )


def _has_statistics(norm: "nn.modules.batchnorm._BatchNorm") -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())


def load_checkpoint(path: str | Path, whose: str = "teacher") -> dict[str, Tensor]:
    """The backbone's state dict of `model.pt` or `checkpoint_gpu_{rank}.pt`; its hash is logged.

    What DistributedDataParallel and torch.compile put before each key is left out.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise KDHooksError(f"{whose} checkpoint: there is no file '{path}'")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise KDHooksError(
            f"{whose} checkpoint: '{path}' can't be read as tensors alone ({error}); save "
            "model.state_dict() with torch.save"
        ) from error
    for key in ("state_dict_backbone", "state_dict"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise KDHooksError(f"{whose} checkpoint: '{path}' holds no state dict")
    log.info("%s %s sha256 %s", whose, path, sha256(path))
    # A distilled teacher's own training may have saved the methods' weights beside it.
    content = {key: value for key, value in content.items() if not key.startswith("kdhooks.")}
    while all(key.startswith(_PREFIXES) for key in content) and content:
        content = {key.partition(".")[2]: value for key, value in content.items()}
    return content


def load_strictly(
    module: nn.Module, state: dict[str, Tensor], path: str | Path, whose: str = "teacher"
) -> nn.Module:
    """Every weight of the module comes from the file, and every weight of the file is used."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise KDHooksError(
            f"{whose} checkpoint: '{path}' does not fit the network named for it; {error}"
        ) from error
    return module


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
