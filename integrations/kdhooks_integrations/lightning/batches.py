"""Finds images and labels in a LightningModule's batch, by convention or at a given place."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from kdhooks.errors import KDHooksError

Place: TypeAlias = str | int
"""A position in a batch, a key, or several of these joined by dots: `0.labels`."""

_NAMES = ("labels", "label", "targets", "target", "y")


def labels_in(batch: object, place: Place | None) -> Tensor:
    """(b): the labels at the place; by default, the second element, or those under a usual key."""
    places: Sequence[Place] = [place] if place is not None else _NAMES
    if place is None and isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        places = [1]
    for one in places:
        found = _at(batch, one)
        if isinstance(found, Tensor):
            return found
    wanted = f"at {place!r}" if place is not None else f"in {', '.join(_NAMES)}"
    if places == [1]:
        wanted = "in second place"
    raise KDHooksError(
        f"lightning: the batch must hold labels (b) as a tensor {wanted}; found "
        f"{_described(batch)}; name their place as Distill(…, labels='key') or labels=2, or, if "
        "there are none, set labels = false in the recipe, which leaves the methods that need none"
    )


def images_in(batch: object, place: Place) -> Tensor:
    """(b 3 h w): the teacher's images."""
    found = _at(batch, place)
    if isinstance(found, Tensor):
        return found
    raise KDHooksError(
        f"lightning: the batch must hold images (b 3 h w) as a tensor at {place!r}; found "
        f"{_described(batch)}; correct Distill(…, images=…), or leave it out, so that the teacher "
        "sees the images that the student was given"
    )


def _at(batch: object, place: Place) -> object:
    """The value at the place, or None."""
    value: Any = batch
    for part in [place] if isinstance(place, int) else place.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(part, str) and not part.lstrip("-").isdecimal():
            value = getattr(value, part, None)
        elif isinstance(value, list | tuple) and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_described(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_described, value)) + "]"
    return type(value).__name__
