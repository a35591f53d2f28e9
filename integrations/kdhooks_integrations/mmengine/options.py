"""The options of `Distill` and `DistillHook`: a recipe's keys, and paths of the student."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from mmengine.config.lazy import LazyAttr, LazyObject

from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.generators import undisturbed_generators
from kdhooks.kinds import shown
from kdhooks.recipe import Recipe
from kdhooks_integrations.mmengine.models import initialised

_LIKE = (  # images, labels, indices, classifier
    "inputs", "data_samples.gt_label", "data_samples.sample_idx", "head.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The recipe, and where the student has its inputs and its classifier.

    The paths of images, labels and indices start at the arguments of the student's forward.
    """

    recipe: Recipe
    images: str  # path of the images
    labels: str  # path of the labels
    indices: str  # path of the samples' numbers in the training set, for a table of embeddings
    classifier: str  # path of the student's own rows (c d), for methods that compare logits
    input: Mapping[str, Any]  # mean, std and order of the student's images

    @classmethod
    def read(cls, recipe: str | Path | None, table: Mapping[str, Any], hint: str = "") -> "Options":
        """recipe: a TOML file, instead of a recipe's keys in the table.

        hint: an explanation for unknown keys that are not similar to a known one.
        """
        own = {field.name: "" for field in fields(cls)[1:-1]}
        known = [field.name for field in fields(Recipe)]
        for key in table:
            if key not in (*known, *own, "input"):
                every = ["recipe", *dict.fromkeys((*known, *own)), "input"]
                # A student in the wrong place is not a misspelt student_view.
                why = (hint if key == "student" else "") or near_miss(key, every) or hint
                raise KDHooksError(
                    f"mmengine: there is no key '{key}'; {why}the keys are: {listed(every)}"
                )
        given = {key: table[key] for key in known if key in table}
        if isinstance(table.get("labels"), str):  # a path, not the recipe's key
            del given["labels"]
        elif isinstance(table.get("labels"), bool):
            table = {key: value for key, value in table.items() if key != "labels"}
        for key, like in zip(own, _LIKE, strict=True):
            if not isinstance(table.get(key, ""), str):
                or_none = ", or False if there are none" if key == "labels" else ""
                raise KDHooksError(
                    f"mmengine: {key} must be a path like '{like}'{or_none}; found {table[key]!r}"
                )
        if recipe is not None and given:
            raise KDHooksError(
                f"mmengine: a recipe must come either from a file or from keys; found '{recipe}' "
                f"and {listed(given)}; write all of it in one place"
            )
        for method in _lazy(given.get("methods")):
            raise KDHooksError(
                f"mmengine: a config must name a method as a string; found the class {method}; "
                "write the name that `kdhooks methods` lists, or dict(name=…) with its options"
            )
        checked = Recipe.read(recipe if recipe is not None else _with_teacher(given))
        transform = table.get("input", {})
        if not isinstance(transform, Mapping):
            raise KDHooksError(
                f"mmengine: input must be dict(mean=…, std=…, order=…); found {transform!r}"
            )
        for key in transform:
            if key not in ("mean", "std", "order"):
                raise KDHooksError(
                    f"mmengine: input has no key '{key}'; its keys are: mean, std, order"
                )
        return cls(checked, **{key: table.get(key, "") for key in own}, input=transform)


def _lazy(methods: object) -> list[object]:
    """Return the classes that a config of the new style imports and uses as methods."""
    if not isinstance(methods, list | tuple):
        return []
    return [method for method in methods if isinstance(method, LazyObject | LazyAttr)]


def _with_teacher(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Build teacher.module if it is a model's config, whose init_cfg names its weights."""
    teacher = table.get("teacher")
    if isinstance(teacher, list | tuple):
        return {**table, "teacher": [_with_module(one) for one in teacher]}
    return {**table, "teacher": _with_module(teacher)} if "teacher" in table else table


def _with_module(teacher: object) -> object:
    if isinstance(teacher, Mapping) and "type" in teacher:
        raise KDHooksError(
            f"mmengine: teacher must be a table that contains the model's config; found type = "
            f"{shown(teacher['type'])} in it; write teacher = dict(network=dict(type=…), "
            "checkpoint=…), or dict(module=dict(type=…)) if its init_cfg names its weights"
        )
    if not isinstance(teacher, Mapping) or not isinstance(teacher.get("module"), Mapping):
        return teacher
    with undisturbed_generators(0, torch.device("cpu")):
        module = initialised(teacher["module"])
    return {**teacher, "module": module}
