"""ACSR compares the logits of channel and spatial gates if both networks have CBAM."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Teacher
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins.acsr import ACSR, ReviewedAttention
from tests import maps
from tests.acsr_losses import Arrays, Expected, gates, made, value
from tests.maps import Shape, features, labels

STAGES = ["layer1", "layer2"]


class CBAM(nn.Module):
    """As in A-SKD: for both gates, a submodule returns the logits and another the sigmoid."""

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


def attentive_teacher(width: int = 6) -> Teacher:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        network = AttentiveNet(width)
        for _ in range(40):
            network(tiny_batch()[0])
    return Teacher(network)


CBAM_OPTIONS: list[dict[str, Any]] = [
    gates(channel="channel_logits", spatial="conv"),
    {"center": False, **gates(channel="channel_sigmoid", spatial="spatial_sigmoid")},
    {"attention": "spatial", **gates(spatial="conv")},
    {"attention": "channel", **gates(channel="channel_logits")},
    gates(channel="channel_logits"),  # with the energy of the pixels
    gates(spatial="conv"),
]


@pytest.mark.parametrize("options", CBAM_OPTIONS)
def test_conforms_on_cbam(options: dict[str, Any]) -> None:
    check_method(
        ACSR,
        student=AttentiveNet,
        teacher=attentive_teacher,
        student_stages=STAGES,
        teacher_stages=STAGES,
        **options,
    )


def cbam_loss(**options: Any) -> ReviewedAttention:
    """Return the loss of both gates between stages (3 6 6), (4 3 3) and (5 5 5), (6 4 4)."""
    ours: tuple[Shape, ...] = ((3, 6, 6), (4, 3, 3))
    return made(ours, ((5, 5, 5), (6, 4, 4)), **gates(channel="mlp", spatial="conv"), **options)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_the_logits_of_both_gates_agree_with_the_equations(center: bool, flat: bool) -> None:
    loss, ones = cbam_loss(center=center), () if flat else (1, 1)
    student = features(1, 3, (3, *ones), (4, *ones), (1, 6, 6), (1, 3, 3))
    teacher = features(9, 3, (5, *ones), (6, *ones), (1, 5, 5), (1, 4, 4))

    def by_kind(gates: Arrays) -> dict[str, list[Arrays]]:
        return {"channel": [[x.reshape(3, -1, 1, 1) for x in gates[:2]]], "spatial": [gates[2:]]}

    equations = Expected(by_kind([y.numpy() for y in teacher]), center=center)

    def expected(x: Arrays, weights: dict[str, np.ndarray]) -> float:
        return equations.mean(by_kind(x), weights)

    found = value(loss, student, teacher)
    assert_close(found.item(), expected([x.numpy() for x in student], maps.weights(loss)))
    maps.check_gradients(loss, student, teacher, expected)


def test_both_kinds_of_gates_are_compared_by_default() -> None:
    _, notes = cbam_loss()(
        features(1, 3, (3,), (4,), (1, 6, 6), (1, 3, 3)),
        features(9, 3, (5,), (6,), (1, 5, 5), (1, 4, 4)),
        labels(3),
    )
    names = ("channel1", "channel2", "channel1_fused", "spatial1", "spatial2", "spatial1_fused")
    assert tuple(notes) == names


@pytest.mark.parametrize(
    ("logits", "sigmoid"),
    [
        (gates(spatial="conv"), gates(spatial="spatial_sigmoid")),
        (gates(channel="channel_logits"), gates(channel="channel_sigmoid")),
    ],
)
def test_a_tapped_sigmoid_is_undone(logits: dict[str, Any], sigmoid: dict[str, Any]) -> None:
    images, targets = tiny_batch()
    found = []
    for paths in (logits, sigmoid):
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            network = AttentiveNet().train()
            kd = Distiller(
                network,
                attentive_teacher(),
                [ACSR(**paths)],
                student_stages=STAGES,
                teacher_stages=STAGES,
                input_shape=(3, 32, 32),
            )
        with kd:
            network(images)
            value = kd(images, targets)["acsr"]
        value.backward()
        gradient = network.get_parameter("layer1.0.weight").grad
        assert gradient is not None
        found.append((value.detach(), gradient))
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_networks_without_the_gates_are_refused() -> None:
    method = ACSR(**gates(spatial="conv"))
    for student, teacher, side in (
        (TinyFaceNet(), attentive_teacher(), "student"),
        (AttentiveNet(), tiny_teacher(), "teacher"),
    ):
        with pytest.raises(KDHooksError, match=f"acsr: {side} has no submodule 'layer1.3.conv'"):
            Distiller(
                student,
                teacher,
                [method],
                student_stages=STAGES,
                teacher_stages=STAGES,
                input_shape=(3, 32, 32),
            )


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            ((3,), (4,), (4, 6, 6), (1, 3, 3)),
            r"acsr: student spatial gate 'layer1.3.conv' must return one map \(b 1 h w\); found "
            r"\(2, 4, 6, 6\); name the convolution",
        ),
        (
            ((3, 6, 6), (4,), (1, 6, 6), (1, 3, 3)),
            r"acsr: student channel gate 'layer1.3.mlp' must return one number per channel "
            r"\(b k 1 1\); found \(2, 3, 6, 6\); name the nn.Sigmoid",
        ),
        (
            ((3,), (7,), (1, 6, 6), (1, 3, 3)),
            "acsr: student channel gate 'layer2.3.mlp' must have as many channels as its stage, 4; "
            "found 7; name the end of the block that the gate belongs to as the stage",
        ),
    ],
)
def test_gates_of_another_shape_are_refused(student: tuple[Shape, ...], message: str) -> None:
    teacher = features(9, 2, (5,), (6,), (1, 5, 5), (1, 4, 4))
    with pytest.raises(KDHooksError, match=message):
        value(cbam_loss(), features(1, 2, *student), teacher)
