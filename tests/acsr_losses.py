"""ACSR losses between stages of given shapes, their values, and the paths of CBAM's gates."""

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


Steps = list[Arrays]  # the attention of each stage, in each step so far


class Expected:
    """The terms of the last step, from the equations, with the student's means held constant.

    The means are those of the first call. The loss does not differentiate them, so they must not
    change in a difference quotient either.
    """

    def __init__(
        self,
        theirs: dict[str, Steps],
        *,
        levels: Sequence[int] = (4, 2),
        center: bool = True,
        momentum: float = 0.9,
    ) -> None:
        self.theirs, self.levels, self.center, self.momentum = theirs, levels, center, momentum
        self.held: dict[str, Arrays] = {}

    def __call__(self, ours: dict[str, Steps], weights: dict[str, np.ndarray]) -> dict[str, float]:
        """Return the own and the fused distance of each stage and kind, named as in the log."""
        terms: dict[str, float] = {}
        for kind, steps in ours.items():
            review = reference.channel_review if kind == "channel" else reference.spatial_review
            targets, reviewed = [], []
            for student, teacher in zip(steps, self.theirs[kind], strict=True):
                x, y = student, teacher
                if kind == "spatial":
                    x, y = reference.sized(student, teacher), reference.sized(teacher, student)
                targets.append([reference.unit(stage) for stage in y])
                reviewed.append(review([reference.unit(stage) for stage in x], weights))
            teachers = self._means(targets)
            for place, name in enumerate(("", "_fused")):
                found = [both[place] for both in reviewed]
                means = self.held.setdefault(f"{kind}{name}", self._means(found))
                distances = [
                    reference.hccsl(a - mu, t - nu, self.levels)
                    for a, mu, t, nu in zip(found[-1], means, targets[-1], teachers, strict=True)
                ]
                terms |= {f"{kind}{k}{name}": x for k, x in enumerate(distances, start=1)}
        return terms

    def mean(self, ours: dict[str, Steps], weights: dict[str, np.ndarray]) -> float:
        terms = self(ours, weights).values()
        return sum(terms) / len(terms)

    def _means(self, steps: Steps) -> Arrays:
        by_stage = [list(batches) for batches in zip(*steps, strict=True)]
        means = [reference.mean(batches, self.momentum) for batches in by_stage]
        return means if self.center else [np.zeros_like(mu) for mu in means]
