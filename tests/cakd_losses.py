"""CAKD losses between stages of given shapes, and their values."""

from typing import Any

from torch import Tensor

from kdhooks_plugins._local_features import LocalFeatures
from kdhooks_plugins.cakd import CAKD
from tests import maps
from tests.maps import Shape, features, labels, model, normal

SMALL: dict[str, Any] = {
    "urfm": {"centres": 3, "width": 4, "heads": 2},
    "collapse": {"every": 0},
}

# The last stage of student and teacher: maps, tokens (n k), and maps (h w k) as in timm's Swin.
SHAPES: list[tuple[Shape, Shape]] = [
    ((3, 3, 3), (3, 3, 3)),
    ((2, 3, 3), (5, 3, 3)),
    ((3, 2, 3), (2, 4, 4)),
    ((3, 2, 2), (9, 2)),
    ((9, 3), (2, 2, 2)),
    ((2, 2, 2), (3, 3, 9)),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"matching": {"attention": "kl"}},
    {"matching": {"standardise": False}},
    {"matching": {"share_msa": False}},
    {"matching": {"attention_weight": 0.0, "feature_weight": 3.0}},
    {
        "matching": {"attention_weight": 7.0, "feature_weight": 0.0},
        "positions": {"gamma": 0.0},
    },
    {"positions": {"distance": "saliency", "saliency": normal(3, 3, 3)}},
    {"positions": {"pieces": (1.9, 3.8, 15.2), "anchor": (10.0, 100.0)}},
]


def made(ours: Shape, theirs: Shape, **options: Any) -> LocalFeatures:
    """Return a loss that trains both sides, unless the options change `teacher_side`."""
    matching = {"teacher_side": "shared", **options.pop("matching", {})}
    method = CAKD(**{**SMALL, "prompts": {"number": 0}, "matching": matching, **options})
    loss = maps.seeded(method.feature_tap(model(ours), model(theirs)).loss)
    assert isinstance(loss, LocalFeatures)
    return loss


def inputs(ours: Shape, theirs: Shape, b: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    return features(1, b, ours), features(9, b, theirs)


def value(loss: LocalFeatures, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    result: Tensor = loss(student, teacher, labels(len(student[0])))[0]
    return result
