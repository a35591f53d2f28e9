"""Determines the normalisation of a model's images from its data_preprocessor, or refuses.

If the data_preprocessor does not specify something, the error names the key to set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor, BaseModel, BaseModule
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.teacher.input_transform import channels

_LOADED = "as loaded"  # mmpretrain's to_rgb = False: RGB or BGR, as the files are read
_TURNED = "reversed"  # bgr_to_rgb or rgb_to_bgr


@dataclass(frozen=True)
class Seen:
    """The images of a model: (pixel - mean) / std, and the order of their channels.

    mean and std are None, and order is "", if they are not specified.
    """

    mean: Tensor | None
    std: Tensor | None
    order: str
    tells: bool = True  # whether the data_preprocessor is of a known kind

    @staticmethod
    def of(model: object) -> "Seen":
        found: Any = getattr(model, "data_preprocessor", None)
        normalises = getattr(found, "_enable_normalize", None)
        mean, std = (
            value if normalises is not False and isinstance(value, Tensor) else None
            for value in (getattr(found, "mean", None), getattr(found, "std", None))
        )
        to_rgb = getattr(found, "to_rgb", None)
        order = "" if to_rgb is None else "rgb" if to_rgb else _LOADED
        if not order and getattr(found, "_channel_conversion", False):
            order = _TURNED
        known = found is None or type(found) is BaseDataPreprocessor or normalises is not None
        return Seen(mean, std, order, known or mean is not None)

    def but(self, given: Mapping[str, Any]) -> "Seen":
        """Return the same with the values of a config's `input` in place of its own."""
        told = {
            key: torch.tensor(channels(given[key], f"mmengine: input.{key}"), dtype=torch.float32)
            for key in ("mean", "std")
            if key in given
        }
        order = given.get("order", self.order)
        if "order" in given and order not in ("rgb", "bgr"):
            raise KDHooksError(f"mmengine: input.order must be 'rgb' or 'bgr'; found {order!r}")
        mean, std = told.get("mean", self.mean), told.get("std", self.std)
        if std is not None and not (std > 0).all():
            raise KDHooksError(
                f"mmengine: input.std must be positive; found {given.get('std', std.tolist())!r}"
            )
        return Seen(mean, std, order)

    @property
    def usual(self) -> bool:
        """Whether it is the recipe's normalisation, or no other one is specified."""
        return all(value is None or bool((value == 127.5).all()) for value in (self.mean, self.std))

    def to_recipes(self) -> tuple[Tensor | None, Tensor | None, bool]:
        """Return the conversion to a recipe's images, which are RGB and (pixel - 127.5) / 127.5.

        The result is scale and shift (3 1 1), or None for both, and whether to flip the channels.
        """
        if self.usual:
            return None, None, self.order == "bgr"
        mean, std = (
            torch.full((1, 1, 1), 127.5) if value is None else value.float().reshape(-1, 1, 1)
            for value in (self.mean, self.std)
        )
        return std / 127.5, (mean - 127.5) / 127.5, self.order == "bgr"


def _in_short(values: Tensor) -> float | list[float]:
    """Return the numbers, or one number if all are the same."""
    numbers: list[float] = values.flatten().tolist()
    return numbers[0] if len(set(numbers)) == 1 else numbers


def check_order(student: Seen, teacher: object, said: Mapping[str, Any]) -> None:
    """Refuse a student whose order of channels is unknown and may differ from the teacher's."""
    if student.order == _TURNED:
        raise KDHooksError(
            "mmengine: the student's data_preprocessor reverses the channels; specify the "
            "resulting order: input = dict(order='rgb') after bgr_to_rgb, 'bgr' after rgb_to_bgr"
        )
    alike = isinstance(teacher, BaseModel) and Seen.of(teacher).order in (_LOADED, "")
    if student.order == _LOADED and not (alike and "order" not in said):
        raise KDHooksError(
            "mmengine: the student's data_preprocessor has to_rgb = False, so its channels stay in "
            "the order in which they are loaded, which is BGR if mmcv reads the files; specify the "
            "order: input = dict(order='bgr'), or 'rgb'"
        )


def teachers_input(student: Seen, teacher: nn.Module, said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `teacher.input`, completed from the teacher's data_preprocessor.

    A plain torch module gets the images of every recipe.
    """
    if not isinstance(teacher, BaseModule):
        return said
    own = Seen.of(teacher)
    derived: dict[str, Any] = {}
    if own.mean is not None and own.std is not None:
        derived = {"mean": _in_short(own.mean), "std": _in_short(own.std)}
    elif not {"mean", "std"} <= set(said) and not (own.tells and student.usual):
        raise KDHooksError(
            "mmengine: the teacher's own config does not specify how its images are normalised "
            "(mmpretrain specifies it as data_preprocessor at the top level of the config, outside "
            "the model); set teacher.input = dict(mean=…, std=…), add the data_preprocessor to "
            "the network, or use the whole file: teacher = dict(config='config.py', checkpoint=…)"
        )
    if "order" not in said:
        if own.order == _TURNED:
            raise KDHooksError(
                "mmengine: the teacher's data_preprocessor reverses the channels; specify the "
                "resulting order: teacher.input = dict(order='rgb') after bgr_to_rgb, 'bgr' after "
                "rgb_to_bgr"
            )
        if own.order == _LOADED and student.order in ("rgb", "bgr"):
            raise KDHooksError(
                "mmengine: the teacher's data_preprocessor has to_rgb = False, so its channels "
                "stay in the order in which they are loaded, but the student's are known to be "
                f"{student.order.upper()}; specify the order that the teacher was trained with: "
                "teacher.input = dict(order='bgr'), or 'rgb'"
            )
    return {**derived, **said}
