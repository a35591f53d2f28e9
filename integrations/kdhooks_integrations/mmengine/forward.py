"""Finds images and labels among the arguments of a forward, by convention or at a given path."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, listed, near_miss

Arguments = dict[str, Any]

INDICES = ("indices", "sample_idx", "data_samples.sample_idx")
LABELS = (
    "labels", "label", "gt_labels", "gt_label", "targets", "target",
    "data_samples", "data_samples.gt_label", "data_samples.gt_label.label",
)  # fmt: skip


class Forward:
    """Reads the arguments of a model's forward by their names."""

    def __init__(
        self, model: nn.Module, images: str = "", labels: str = "", indices: str = ""
    ) -> None:
        """images, labels, indices: paths such as `data_samples.gt_label`; "": the usual places."""
        self._signature = inspect.signature(model.forward)
        self._images, self._labels, self._indices = images, labels, indices
        parameters = self._signature.parameters.values()
        known = [p.name for p in parameters]
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            given = {"images": images, "labels": labels, "indices": indices}
            for what, path in given.items():
                root = path.split(".")[0]
                if root and root not in known:
                    raise KDHooksError(
                        f"mmengine: {what} = '{path}': the student's forward has no argument "
                        f"'{root}'; {near_miss(root, known)}its arguments are: {listed(known)}"
                    )

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        bound = self._signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return arguments

    def call(self, model: nn.Module, images: Tensor, mode: str) -> object:
        """Run a forward with only images; other arguments without a default are None."""
        given: Arguments = {}
        for name, parameter in self._signature.parameters.items():
            if name == "mode":
                given[name] = mode
            elif not given or name == self._images:
                given[name] = images
            elif parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY,
            ):  # fmt: skip
                given[name] = None
        return model(**given)

    def images(self, arguments: Arguments) -> Tensor:
        """(b 3 h w): the images that the student saw."""
        found = [_at(arguments, self._images)] if self._images else list(arguments.values())
        for value in found:
            if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
                return value
        raise KDHooksError(
            f"mmengine: images must be a floating-point tensor (b 3 h w); found "
            f"{_described(arguments)}; name their place as images = 'argument.field'"
        )

    def labels(self, arguments: Arguments, count: int, first: bool = True) -> Tensor:
        """(b): the class of each image.

        first: whether this is the first batch, in which the host may wait for the device.
        """
        path, found = _first_numbers(arguments, self._labels, LABELS, count)
        if found is not None:
            if ".gt_label" in path:
                beside = f"{path.partition('.gt_label')[0]}.gt_score"
                _check_unmixed(_at(arguments, beside), found, first)
            return found
        raise KDHooksError(
            f"mmengine: labels must be one class number for each of {count} images, at "
            f"{path}; found {_described(arguments)}; "
            "name their place as labels = 'argument.field', or, if there are none, set labels = "
            "False and use methods that need no labels"
        )

    def indices(self, arguments: Arguments, count: int) -> Tensor:
        """(b): the number of each sample in the training set."""
        path, found = _first_numbers(arguments, self._indices, INDICES, count)
        if found is not None:
            return found
        raise KDHooksError(
            "mmengine: a table of embeddings needs the number of each sample in the training set, "
            f"of {count} images, at {path}; found {_described(arguments)}; pack "
            "sample_idx into the data samples (in mmpretrain: PackInputs(meta_keys="
            "('sample_idx',))), or name another place as indices = 'argument.field'"
        )


def _first_numbers(
    arguments: Arguments, named: str, usual: Sequence[str], count: int
) -> tuple[str, Tensor | None]:
    """Return the first place with a whole number for each image, and these numbers (b).

    If there is none, return a description of all places, and None.

    named: the only place to look at, unless it is "".
    """
    for path in [named] if named else usual:
        found = _whole_numbers(_at(arguments, path), count)
        if found is not None:
            return path, found
    return named or f"one of {', '.join(usual)}", None


def _at(arguments: Arguments, path: str) -> Any:
    """Return the value at a path, or None; for a list, the values of its elements."""
    root, *fields = path.split(".")
    value = arguments.get(root)
    for field in fields:
        if isinstance(value, list | tuple):
            value = [_field(element, field) for element in value]
        else:
            value = _field(value, field)
    return value


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _whole_numbers(value: Any, count: int) -> Tensor | None:
    """Return (b) int64 from a tensor (b) or (b 1), or from a list of numbers or tensors (1)."""
    if isinstance(value, list | tuple):
        if not all(isinstance(v, int) or (isinstance(v, Tensor) and v.numel() == 1) for v in value):
            return None
        tensors = [v.reshape(1) if isinstance(v, Tensor) else torch.tensor([v]) for v in value]
        value = torch.cat(tensors) if tensors else None
    if not isinstance(value, Tensor) or value.is_floating_point() or value.numel() != count:
        return None
    return value.reshape(-1).long()


def _check_unmixed(scores: Any, labels: Tensor, first: bool) -> None:
    """Refuse labels of mixed images; mmpretrain stores the share of each class in gt_score (c)."""
    if not isinstance(scores, list) or not all(isinstance(one, Tensor) for one in scores):
        return
    if len({one.shape for one in scores}) > 1 or scores[0].ndim != 1:
        return
    if scores[0].is_cuda and not first:
        return
    most, classes = torch.stack(scores).max(dim=1)
    mixed = (most < 0.999) | (classes.to(labels.device) != labels).to(most.device)
    if mixed.any():
        raise KDHooksError(
            "mmengine: labels must be one class number for each image, and "
            f"{int(mixed.sum())} of {len(labels)} have a gt_score that mixes several classes; "
            "remove the cause (Mixup, CutMix, label smoothing), or use methods without labels, "
            "such as fcd"
        )


def mixing_augments(model: nn.Module) -> list[str]:
    """Return the batch_augments of a model's data_preprocessor that mix images of two classes."""
    augments: Any = getattr(getattr(model, "data_preprocessor", None), "batch_augments", None)
    return [type(one).__name__ for one in getattr(augments, "augments", ()) if hasattr(one, "mix")]


def _described(arguments: Arguments) -> str:
    return ", ".join(f"{name}: {_kind(value)}" for name, value in arguments.items()) or "nothing"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list | tuple) and value:
        return f"{len(value)} of {_kind(value[0])}"
    keys: Any = getattr(value, "keys", tuple)
    fields = list(map(str, keys()))
    return type(value).__name__ + (f" with {', '.join(fields)}" if fields else "")
