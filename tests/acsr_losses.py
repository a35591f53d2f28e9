"""Losses of ACSR between stages of given shapes, their costs, and the paths of CBAM's gates."""

from typing import Any

from torch import Tensor, nn

from kdhooks import FeatureTap, Model
from kdhooks_plugins.acsr import ACSR, ReviewedAttention
from tests import maps
from tests.maps import Shape, labels, model


def declared(student: Model, teacher: Model, **options: Any) -> FeatureTap:
    return ACSR(**options).feature_tap(student, teacher)


def made(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...] | None = None, **options: Any
) -> ReviewedAttention:
    tap = declared(model(*ours), model(*(theirs or ours)), **options)
    loss = maps.seeded(tap.loss)
    assert isinstance(loss, ReviewedAttention)
    return loss


def value(loss: nn.Module, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    result: Tensor = loss(student, teacher, labels(len(student[0])))[0]
    return result


def gates(name: str) -> dict[str, Any]:
    paths = [f"layer{k}.3.{name}" for k in (1, 2)]
    return {"student_attention": paths, "teacher_attention": paths}
