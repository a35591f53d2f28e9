"""Losses of ACSR between stages of given shapes, their costs, and the paths of CBAM's gates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from kdhooks import FeatureTap, Model
from kdhooks_plugins.acsr import ACSR, ReviewedAttention
from tests import maps
from tests.maps import Shape, labels, model
from tests.references import acsr as reference

Arrays = list[np.ndarray]


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


def gates(channel: str = "", spatial: str = "", stages: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """The options that name these submodules of AttentiveNet on both sides."""
    named = {"channel": channel, "spatial": spatial}
    return {
        f"{side}_{kind}_gates": [f"layer{k}.3.{name}" for k in stages]
        for kind, name in named.items()
        if name
        for side in ("student", "teacher")
    }


def expected_terms(
    ours: dict[str, Arrays],
    theirs: dict[str, list[Arrays]],
    weights: dict[str, np.ndarray],
    *,
    levels: Sequence[int] = (4, 2),
    center: bool = True,
    momentum: float = 0.99,
) -> dict[str, float]:
    """By kind of attention: the student's, and the teacher's in each step so far.

    -> the own and the fused distance of each stage and kind, by the names that are logged.
    """
    terms = {}
    for kind, student in ours.items():
        attention = student
        seen = [list(batches) for batches in zip(*theirs[kind], strict=True)]  # by stage
        if kind == "spatial":
            pairs = zip(attention, seen, strict=True)
            seen = [[_sized(batch, ours) for batch in batches] for ours, batches in pairs]
            attention = reference.sized(attention, theirs[kind][-1])
        seen = [[reference.unit(batch) for batch in batches] for batches in seen]
        means = [reference.mean(batches, momentum) for batches in seen]
        if not center:
            means = [np.zeros_like(mu) for mu in means]
        review = reference.channel_review if kind == "channel" else reference.spatial_review
        own, fused = review([reference.unit(a) for a in attention], weights)
        targets = [batches[-1] for batches in seen]
        first, second = reference.acsr(own, fused, targets, means, levels)
        terms |= {f"{kind}{k}": x for k, x in enumerate(first, start=1)}
        terms |= {f"{kind}{k}_fused": x for k, x in enumerate(second, start=1)}
    return terms


def _sized(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    [found] = reference.sized([x], [other])
    return found
