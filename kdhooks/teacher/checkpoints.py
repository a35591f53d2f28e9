"""Loads weights from files, and checks that they are complete and belong to the network."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, listed
from kdhooks.tensor_files import named_tensors, read_tensors, user_path

log = logging.getLogger("kdhooks")

_OURS = "kdhooks."  # if the teacher was distilled, its checkpoint also holds its methods' weights
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_KINDS = "have other dtypes"
_COUNTER = "num_batches_tracked"  # torch adds it if an old file does not have it


def refuse_untrained(module: nn.Module, whose: str = "teacher") -> None:
    """Raise if the statistics of all BatchNorm layers still have their initial values."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [m for m in norms if m.running_mean is not None and m.running_var is not None]
    if tracked and not any(_has_statistics(norm) for norm in tracked):
        raise KDHooksError(
            f"{whose} was never trained: the running statistics of all {len(tracked)} BatchNorm "
            "layers are at their initial values; load a checkpoint into it first"
        )


def _has_statistics(norm: "nn.modules.batchnorm._BatchNorm") -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())


@dataclass(frozen=True)
class Weights:
    """The tensors of one dictionary in a checkpoint that share a prefix, named without it."""

    place: str  # the dictionary's path and the prefix, as "state_dict.backbone"; "." if both empty
    tensors: Mapping[str, Tensor]

    def is_at(self, place: str) -> bool:
        """Whether this is the given place, or is inside it."""
        return f"{self.place}.".startswith(f"{place.rstrip('.')}.")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file, in any structure: nested dictionaries, and prefixes before names."""

    path: Path
    content: object
    whose: str = "teacher"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file, by their paths."""
        return dict(named_tensors(self.content))

    def largest(self) -> dict[str, Tensor]:
        """The tensors of the largest dictionary, for a factory that reads a network's width."""
        found = max(_dictionaries(self.content), key=lambda one: len(one.tensors))
        state = {key: value for key, value in found.tensors.items() if not key.startswith(_OURS)}
        while state and all(key.startswith(_WRAPPERS) for key in state):
            state = {key.partition(".")[2]: value for key, value in state.items()}
        return state

    def of(self, network: nn.Module, wanted: str = "", preferred: str = "") -> Weights | None:
        """Return the only place that holds all weights of the network and nothing else, if any.

        wanted: consider only this place. preferred: choose this place if several fit.
        """
        needed = _needed(network)
        distinct: list[Weights] = []
        for place in self._places(needed, wanted):
            fits = not _differences(place, needed)
            if fits and not any(_equal(place, other, needed) for other in distinct):
                distinct.append(place)
        if len(distinct) > 1 and preferred:
            distinct = [place for place in distinct if place.is_at(preferred)] or distinct
        if len(distinct) > 1:
            names = [f"'{place.place}'" for place in distinct]
            raise KDHooksError(
                f"{self.whose} checkpoint: '{self.path}' holds several different sets of weights "
                f"that fit the network, at {listed(names)}; specify one of them, as weights = "
                f"{names[0]} (or --weights)"
            )
        return distinct[0] if distinct else None

    def _places(self, needed: Mapping[str, Tensor], wanted: str = "") -> list[Weights]:
        """Return each dictionary and prefix with at least one full name of a network's weight."""
        found = []
        for dictionary in _dictionaries(self.content):
            for prefix in _prefixes(dictionary.tensors, needed):
                place = f"{dictionary.place}.{prefix}".strip(".") or "."
                tensors = {
                    key.removeprefix(prefix): tensor
                    for key, tensor in dictionary.tensors.items()
                    if key.startswith(prefix) and not key.startswith(f"{prefix}{_OURS}")
                }
                found.append(Weights(place, tensors))
        return [place for place in found if not wanted or place.is_at(wanted)]

    def no_fit(self, network: nn.Module, wanted: str = "") -> str:
        """Describe why no place fits, by the differences of the place that has the fewest."""
        where = f"{self.whose} checkpoint: '{self.path}'"
        needed = _needed(network)
        places = self._places(needed, wanted)
        if wanted and not places:
            known = [f"'{place.place}'" for place in self._places(needed)]
            return f"{where} has no weights at '{wanted}'; it has some at: {listed(known[:8])}"
        text = f"{where} does not fit the network"
        if not places:
            names, own = list(self.tensors), list(needed)
            return (
                f"{text}: none of its {len(names)} tensors ({listed(names[:3])}, …) is named like "
                f"one of the network's {len(own)} ({listed(own[:3])}, …); specify the network that "
                "was trained, or the file of its weights"
            )
        nearest = min(places, key=lambda place: sum(map(len, _differences(place, needed).values())))
        kinds = [
            f"{len(keys)} {kind} ({listed(keys[:4])}{', …' if len(keys) > 4 else ''})"
            for kind, keys in _differences(nearest, needed).items()
        ]
        at = "" if nearest.place == "." else f"at '{nearest.place}' "
        return (
            f"{text}: of its weights {at}{', '.join(kinds)}; specify the network that was trained, "
            "with the same width"
        )


def load_checkpoint(path: str | Path, whose: str = "teacher") -> Checkpoint:
    """Read `model.pt`, `checkpoint_gpu_{rank}.pt` or any other file, and log its hash."""
    subject = f"{whose} checkpoint"
    path = user_path(path, subject)
    checkpoint = Checkpoint(path, read_tensors(path, subject), whose)
    if not checkpoint.tensors:
        raise KDHooksError(
            f"{subject}: '{path}' holds no state dict; save model.state_dict() with torch.save"
        )
    log.info("%s %s sha256 %s", whose, path, sha256(path))
    return checkpoint


def load_strictly(
    module: nn.Module, checkpoint: Checkpoint, weights: str = "", preferred: str = ""
) -> nn.Module:
    """Load every weight of the module from one place in the file that holds nothing else.

    weights: use only this place. preferred: choose this place if several fit.
    """
    found = checkpoint.of(module, weights, preferred)
    if found is None:
        # The module's own load hooks may accept older names of its weights.
        found = Weights(".", checkpoint.largest())
        if weights or _KINDS in _differences(found, _needed(module)):
            raise KDHooksError(checkpoint.no_fit(module, weights))
    where = f"{checkpoint.whose} checkpoint: '{checkpoint.path}'"
    try:
        module.load_state_dict(dict(found.tensors), strict=True)
    except RuntimeError as error:
        raise KDHooksError(checkpoint.no_fit(module)) from error
    for name, tensor in _needed(module).items():
        if not torch.isfinite(tensor).all():
            raise KDHooksError(
                f"{where} holds weights that are not finite, in '{name}'; its training diverged, "
                "or the file is damaged; specify an earlier one"
            )
    if found.place != ".":
        left = len(checkpoint.tensors) - len(found.tensors)
        log.info("%s: weights taken from '%s'; %d other tensors unused", where, found.place, left)
    return module


def _needed(network: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in network.state_dict().items() if isinstance(v, Tensor)}


def _dictionaries(content: object, path: str = "") -> Iterator[Weights]:
    """Yield the tensors of each dictionary, with its path; the outer ones first."""
    items: Any = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    pairs = [(str(key), value) for key, value in items]
    yield Weights(path, {key: value for key, value in pairs if isinstance(value, Tensor)})
    for key, value in pairs:
        yield from _dictionaries(value, f"{path}.{key}".lstrip("."))


def _prefixes(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> list[str]:
    """Return all prefixes of the network's full weight names, in the order of the file."""
    found = (
        key.removesuffix(name)
        for key in tensors
        for name in needed
        if key.endswith(name) and (key == name or key.removesuffix(name).endswith("."))
    )
    return list(dict.fromkeys(found))


def _differences(place: Weights, needed: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the weights that differ from the network's, by kind of difference; {} if it fits."""
    both = [key for key in needed if key in place.tensors]
    odd = [key for key in both if not _is_plain(place.tensors[key])]
    shapes = [
        f"{key} {tuple(place.tensors[key].shape)} for {tuple(needed[key].shape)}"
        for key in both
        if key not in odd and not _same_shape(place.tensors[key], needed[key])
    ]
    kinds = [
        f"{key} {place.tensors[key].dtype} for {needed[key].dtype}"
        for key in both
        if needed[key].is_floating_point() and not place.tensors[key].is_floating_point()
    ]
    missing = [key for key in needed if key not in both and not key.endswith(_COUNTER)]
    found = {
        "are missing": missing,
        "are not the network's": [key for key in place.tensors if key not in needed],
        "have other shapes": shapes,
        _KINDS: kinds,
        "are sparse, nested or on the meta device": odd,
    }
    return {kind: keys for kind, keys in found.items() if keys}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested)


def _same_shape(found: Tensor, wanted: Tensor) -> bool:
    """Compare shapes as load_state_dict does: torch before 0.4 had no scalars."""
    return found.shape == wanted.shape or (wanted.ndim == 0 and found.shape == (1,))


def _equal(one: Weights, other: Weights, needed: Mapping[str, Tensor]) -> bool:
    pairs = ((one.tensors.get(key), other.tensors.get(key)) for key in needed)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
