"""ACSR compares the gates of networks with CBAM, channel or spatial, by their logits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Teacher
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins.acsr import ACSR, ReviewedAttention, Source
from tests import maps
from tests.acsr_losses import gates, made, value
from tests.maps import Shape, features
from tests.references import acsr as reference
from tests.references import at as at_reference


class CBAM(nn.Module):
    """As in A-SKD: the logits of both gates come out of a submodule, then a sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(channels, channels)
        self.channel_logits, self.channel_sigmoid = nn.Identity(), nn.Sigmoid()
        self.conv, self.spatial_sigmoid = nn.Conv2d(2, 1, 3, padding=1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.channel_logits(self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3))))
        x = x * self.channel_sigmoid(logits)[:, :, None, None]
        both = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        gated: Tensor = x * self.spatial_sigmoid(self.conv(both))
        return gated


class AttentiveNet(TinyFaceNet):
    """A TinyFaceNet with CBAM behind its first two stages."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width=width)
        self.layer1.append(CBAM(width))
        self.layer2.append(CBAM(2 * width))


def attentive_teacher(width: int = 4) -> Teacher:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        network = AttentiveNet(width)
        for _ in range(40):
            network(tiny_batch()[0])
    return Teacher(network)


CBAM_OPTIONS: list[dict[str, Any]] = [
    {"source": "cbam_spatial", **gates("conv")},
    {"source": "cbam_spatial", "direction": "teacher_fused", **gates("conv")},
    {"source": "cbam_spatial", "center": False, **gates("spatial_sigmoid")},
    {"source": "cbam_channel", **gates("channel_logits")},
    {"source": "cbam_channel", "center": False, **gates("channel_sigmoid")},
]


@pytest.mark.parametrize("options", CBAM_OPTIONS)
def test_conforms_on_cbam(options: dict[str, Any]) -> None:
    check_method(ACSR, student=AttentiveNet, teacher=attentive_teacher, **options)


def cbam_loss(source: str, **options: Any) -> ReviewedAttention:
    return made((), (), source=source, **gates("conv"), **options)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("direction", ["student_review", "teacher_fused"])
def test_spatial_logits_agree_with_the_equation(direction: str, center: bool) -> None:
    loss = cbam_loss("cbam_spatial", direction=direction, center=center)
    ours: tuple[Shape, ...] = ((1, 6, 6), (1, 3, 3))
    theirs: tuple[Shape, ...] = ((1, 5, 5), (1, 4, 4))
    teacher = features(9, 3, *theirs)
    student = features(1, 3, *ours)[-len(loss.ours) :]
    targets = [y.numpy() for y in teacher]
    if direction == "teacher_fused":
        targets = [reference.fused(targets, center)]

    def expected(x: list[np.ndarray], weights: dict[str, np.ndarray]) -> float:
        if direction == "student_review":
            x = reference.amfm(x, weights, positive=False)
        pairs = zip(x, targets, strict=True)
        return sum(reference.hccsl(a, b, (4, 2), center) for a, b in pairs)

    found = value(loss, student, teacher)
    assert_close(found.item(), expected([x.numpy() for x in student], maps.weights(loss)))
    maps.check_gradients(loss, student, teacher, expected)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_channel_logits_are_compared_as_they_are(center: bool, flat: bool) -> None:
    loss = cbam_loss("cbam_channel", center=center)
    shapes: tuple[Shape, ...] = ((6,), (9,)) if flat else ((6, 1, 1), (9, 1, 1))
    student, teacher = features(1, 3, *shapes), features(9, 3, *shapes)

    def expected(x: list[np.ndarray], _: dict[str, np.ndarray]) -> float:
        total = 0.0
        for ours, theirs in zip(x, teacher, strict=True):
            for s, t in zip(ours, theirs.numpy(), strict=True):
                r = reference.cosine(at_reference.values(s), at_reference.values(t), center)
                total += (1 - r) / len(ours)
        return total

    assert_close(value(loss, student, teacher).item(), expected([x.numpy() for x in student], {}))
    assert not list(loss.parameters())
    maps.check_gradients(loss, student, teacher, expected)


@pytest.mark.parametrize(
    ("source", "logits", "sigmoid"),
    [
        ("cbam_spatial", "conv", "spatial_sigmoid"),
        ("cbam_channel", "channel_logits", "channel_sigmoid"),
    ],
)
def test_a_tapped_sigmoid_is_undone(source: Source, logits: str, sigmoid: str) -> None:
    images, targets = tiny_batch()
    found = []
    for name in (logits, sigmoid):
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            network = AttentiveNet().train()
        method = ACSR(source=source, **gates(name))
        with Distiller(network, attentive_teacher(), [method], input_shape=(3, 32, 32)) as kd:
            network(images)
            value = kd(images, targets)["acsr"]
        value.backward()
        gradient = network.get_parameter("layer1.0.weight").grad
        assert gradient is not None
        found.append((value.detach(), gradient))
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_networks_without_the_gates_are_refused() -> None:
    method = ACSR(source="cbam_spatial", **gates("conv"))
    for student, teacher, side in (
        (TinyFaceNet(), attentive_teacher(), "student"),
        (AttentiveNet(), tiny_teacher(), "teacher"),
    ):
        with pytest.raises(KDHooksError, match=f"acsr: {side} has no submodule 'layer1.3.conv'"):
            Distiller(student, teacher, [method], input_shape=(3, 32, 32))


@pytest.mark.parametrize(
    ("source", "shapes", "message"),
    [
        (
            "cbam_spatial",
            ((4, 8, 8), (4, 4, 4)),
            r"acsr: student attention 'layer1.3.conv' must put out one map \(b 1 h w\); found "
            r"\(2, 4, 8, 8\); name the convolution",
        ),
        (
            "cbam_channel",
            ((4, 8, 8), (4, 4, 4)),
            r"one number a channel \(b k 1 1\); found \(2, 4, 8, 8\); name the nn.Sigmoid",
        ),
    ],
)
def test_gates_of_the_other_kind_are_refused(
    source: str, shapes: tuple[Shape, ...], message: str
) -> None:
    with pytest.raises(KDHooksError, match=message):
        value(cbam_loss(source), features(1, 2, *shapes), features(9, 2, *shapes))


def test_other_channel_counts_are_refused() -> None:
    student, teacher = features(1, 2, (4, 1, 1), (8, 1, 1)), features(1, 2, (4, 1, 1), (6, 1, 1))
    with pytest.raises(KDHooksError, match="found 8 of the student and 6 of the teacher in pair 2"):
        value(cbam_loss("cbam_channel"), student, teacher)
