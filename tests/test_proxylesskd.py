"""ProxylessKD in one process: margins, options and frozen rows; test_shards.py tests two ranks."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import (
    ClassifierShare,
    Distiller,
    InheritedClassifier,
    KDHooksError,
    Model,
    Varying,
)
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_plugins._margin import MOST
from kdhooks_plugins.proxylesskd import ProxylessKD
from tests import golden
from tests.compared import whole
from tests.maps import normal
from tests.references import fcd as fcd_reference
from tests.references import proxylesskd as reference
from tests.references.differences import central_differences

drawn = settings(deadline=None, max_examples=40)
sizes = st.tuples(
    st.integers(1, 6), st.integers(2, 7), st.integers(2, 8), st.integers(0, 2**16)
)  # b, c, d, seed

# Options of the method, and the margin of the equation that they select.
MARGINS: list[tuple[dict[str, Any], reference.Margin]] = [
    ({}, reference.Margin(0.5)),
    ({"m": 0.8}, reference.Margin(0.8)),
    ({"m": 0.0}, reference.Margin(0.0)),
    ({"monotone": False}, reference.Margin(0.5, monotone=False)),
    ({"m": 1.2, "monotone": False}, reference.Margin(1.2, monotone=False)),
    ({"margin_type": "cosface"}, reference.Margin(0.0, 0.35)),
    ({"margin_type": "cosface", "m": 0.2}, reference.Margin(0.0, 0.2)),
    ({"margin_type": "combined", "m": 0.3, "m2": 0.2}, reference.Margin(0.3, 0.2)),
    ({"margin_type": "combined", "m2": 0.1}, reference.Margin(0.5, 0.1)),
    (
        {"margin_type": "combined", "m": 0.9, "m2": 0.1, "monotone": False},
        reference.Margin(0.9, 0.1, monotone=False),
    ),
]


def declared(d: int = 6, e: int = 6, **options: Any) -> ClassifierShare:
    method = ProxylessKD(**options)
    return method.classifier_share(Model(None, d), Model(None, e))


def inheriting(**options: Any) -> InheritedClassifier:
    tap = declared(**options)
    assert isinstance(tap, InheritedClassifier)
    return tap


def made(d: int = 6, e: int = 6, **options: Any) -> nn.Module:
    return declared(d, e, **options).loss.double()


def labels_of(seed: int, b: int, c: int) -> Tensor:
    return torch.randint(c, (b,), generator=torch.Generator().manual_seed(seed))


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


# --- golden values and the equation ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"monotone": False}, golden.PROXYLESSKD_ARCFACE),
        ({}, golden.PROXYLESSKD_ARCFACE_MONOTONE),
        ({"margin_type": "cosface"}, golden.PROXYLESSKD_COSFACE),
        ({"m": 0.0}, golden.PROXYLESSKD_NO_MARGIN),
        ({"margin_type": "cosface", "m": 0.0}, golden.PROXYLESSKD_NO_MARGIN),
    ],
)
def test_gives_the_golden_value(options: dict[str, Any], expected: float) -> None:
    value, _ = made(**options)(golden.S, None, golden.Y, whole(golden.W))
    assert_close(value.item(), expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, golden.PROXYLESSKD_TRAINED_ARCFACE),
        ({"margin_type": "cosface"}, golden.PROXYLESSKD_TRAINED_COSFACE),
    ],
)
def test_gives_the_golden_value_of_a_trained_student(
    options: dict[str, Any], expected: float
) -> None:
    value, _ = made(**options)(golden.S2, None, golden.Y2, whole(golden.W2))
    assert_close(value.item(), expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("scale", [4.0, 64.0])
@pytest.mark.parametrize(("b", "c", "d"), [(1, 2, 3), (6, 5, 4), (4, 9, 8)])
@pytest.mark.parametrize(("options", "margin"), MARGINS)
def test_agrees_with_the_equation(
    options: dict[str, Any],
    margin: reference.Margin,
    b: int,
    c: int,
    d: int,
    scale: float,
    straight_through: bool,
) -> None:
    student, rows, labels = normal(1, b, d), 2 * normal(2, c, d), labels_of(3, b, c)
    student.requires_grad_()
    module = made(d, d, scale=scale, straight_through_margin=straight_through, **options)
    value, _ = module(student, None, labels, whole(rows))
    value.backward()
    given_ = student.detach().numpy(), labels.numpy(), rows.numpy(), margin, scale
    assert_close(value.item(), reference.margin_softmax(*given_))
    by_hand = reference.margin_softmax_gradient(*given_, straight_through)
    assert_close(gradient(student).numpy(), by_hand)


@pytest.mark.parametrize("margin", [margin for _, margin in MARGINS])
def test_the_reference_gradient_is_that_of_the_reference(margin: reference.Margin) -> None:
    labels, rows, at = golden.Y.numpy(), golden.W.numpy(), golden.S.numpy()
    by_hand = reference.margin_softmax_gradient(at, labels, rows, margin, 4.0, False)
    by_difference = central_differences(
        lambda x: reference.margin_softmax(x, labels, rows, margin, 4.0), at
    )
    assert_close(by_hand, by_difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("m", [0.2, 0.5, 1.0, float(MOST)])
def test_with_monotone_a_larger_angle_never_lowers_the_loss(m: float) -> None:
    """The own class's logit falls with the angle everywhere; without `monotone` it rises again."""
    angles = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def target_logits(monotone: bool) -> Tensor:
        module = made(2, 2, m=m, monotone=monotone, scale=1.0)
        students = torch.stack([angles.cos(), -angles.sin()], dim=1)
        losses = torch.stack(
            [module(s[None], None, torch.tensor([0]), whole(rows))[0] for s in students]
        )
        others = -angles.sin()  # l = log(1 + e^{other - own})
        return others - losses.expm1().log()

    assert (target_logits(True).diff() < 0).all()
    assert (target_logits(False).diff() > 0).any()


@pytest.mark.parametrize("angle", [0.0, math.pi])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_on_its_row_or_opposite_has_a_finite_gradient(
    angle: float, dtype: torch.dtype
) -> None:
    student = torch.tensor([[math.cos(angle), 0.0]], dtype=dtype, requires_grad=True)
    rows = torch.eye(2, dtype=dtype)
    for monotone in (True, False):
        module = made(2, 2, monotone=monotone).to(dtype)
        value, _ = module(student, None, torch.tensor([0]), whole(rows))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(gradient(student)).all()


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [1, 3, 4])
@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({"margin_type": "combined", "m": 0.4, "m2": 0.2}, reference.Margin(0.4, 0.2)),
        ({"m": 0.5, "monotone": False}, reference.Margin(0.5, monotone=False)),
        ({"margin_type": "cosface", "m": 0.35}, reference.Margin(0.0, 0.35)),
    ],
)
def test_margins_grow_over_a_warm_up(
    options: dict[str, Any], full: reference.Margin, warmup: int
) -> None:
    growing = {
        name: {"value": options[name], "warmup": warmup} for name in options.keys() & {"m", "m2"}
    }
    module = made(**{**options, **growing})
    for step in range(6):
        for margin in (module.m, module.m2):
            assert isinstance(margin, Varying)
            margin.move(step, None)
        ramp = min(1.0, step / warmup)
        expected = reference.margin_softmax(
            golden.S.numpy(),
            golden.Y.numpy(),
            golden.W.numpy(),
            replace(full, m=ramp * full.m, m2=ramp * full.m2),
            64.0,
        )
        value, _ = module(golden.S, None, golden.Y, whole(golden.W))
        assert_close(value.item(), expected)


@pytest.mark.parametrize("extra", [0.5, 8.0])
def test_the_extra_term_is_one_minus_cosine_of_all_samples(extra: float) -> None:
    student, teacher = golden.S.clone().requires_grad_(), golden.T
    labels = torch.tensor([0, -1, 0, 2])
    value, _ = made(extra_fcd_weight=extra, scale=4.0)(student, teacher, labels, whole(golden.W))
    value.backward()

    def loss(x: np.ndarray) -> float:
        own = reference.margin_softmax(x, labels.numpy(), golden.W.numpy(), reference.Margin(), 4.0)
        return own + extra * fcd_reference.embedding_distance(x, teacher.numpy(), "cosine")

    assert_close(value.item(), loss(golden.S.numpy()))
    by_difference = central_differences(loss, golden.S.numpy())
    assert_close(gradient(student).numpy(), by_difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("extra", [0.0, 2.0])
@pytest.mark.parametrize(("d", "e"), [(3, 6), (6, 6), (8, 6)])
def test_the_projector_is_linear_then_batch_norm_and_trained(d: int, e: int, extra: float) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = made(d, e, projector=True, scale=4.0, extra_fcd_weight=extra)
    student = normal(1, 4, d).requires_grad_()
    value, _ = module(student, golden.T, golden.Y, whole(golden.W))
    value.backward()
    parameters = dict(module.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        "projector.0.weight": (e, d),
        "projector.0.bias": (e,),
        "projector.1.weight": (e,),
        "projector.1.bias": (e,),
    }
    matrix, bias, gain, shift = (p.detach().numpy() for p in parameters.values())

    def loss(x: np.ndarray, matrix: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> float:
        out = reference.batch_norm(fcd_reference.linear(x, matrix, bias), gain, shift)
        own = reference.margin_softmax(
            out, golden.Y.numpy(), golden.W.numpy(), reference.Margin(), 4.0
        )
        return own + extra * fcd_reference.embedding_distance(out, golden.T.numpy(), "cosine")

    at = student.detach().numpy()
    assert_close(value.item(), loss(at, matrix, gain, shift))
    found = [gradient(student), *(gradient(parameters[f"projector.{n}"]) for n in _TRAINED)]
    expected = [
        central_differences(lambda x: loss(x, matrix, gain, shift), at),
        central_differences(lambda x: loss(at, x, gain, shift), matrix),
        central_differences(lambda x: loss(at, matrix, x, shift), gain),
        central_differences(lambda x: loss(at, matrix, gain, x), shift),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.numpy(), theirs, rtol=1e-5, atol=1e-7)


_TRAINED = ("0.weight", "1.weight", "1.bias")  # 0.bias has no effect before a BatchNorm


@pytest.mark.parametrize("extra", [0.0, 2.0])
def test_samples_without_a_label_are_left_out(extra: float) -> None:
    labels = torch.tensor([0, -1, 3, -1, 2])
    student, rows, known = normal(1, 5, 6), golden.W, labels >= 0
    teacher = student if extra else None  # the extra term is 0 at equality
    student.requires_grad_()
    value, notes = made(extra_fcd_weight=extra)(student, teacher, labels, whole(rows))
    value.backward()
    few = student.detach()[known].requires_grad_()
    expected, expected_notes = made()(few, None, labels[known], whole(rows))
    expected.backward()
    assert_close(value, expected)
    assert_close(notes, expected_notes)
    assert_close(gradient(student)[known], gradient(few))
    assert_close(gradient(student)[~known], torch.zeros(2, 6, dtype=torch.float64))
    by_loop = reference.margin_softmax(
        student.detach().numpy(), labels.numpy(), rows.numpy(), reference.Margin(), 64.0
    )
    assert_close(value.item(), by_loop)


def test_a_batch_without_labels_has_zero_loss_and_gradient() -> None:
    student = golden.S.clone().requires_grad_()
    value, _ = made()(student, None, torch.full((4,), -1), whole(golden.W))
    value.backward()
    assert value == 0
    assert not gradient(student).any()


def test_logs_the_mean_cosine_with_the_own_row() -> None:
    _, notes = made()(golden.S, None, golden.Y, whole(golden.W))
    cosines = [
        fcd_reference.dot(fcd_reference.unit(z), fcd_reference.unit(golden.W.numpy()[y]))
        for z, y in zip(golden.S.numpy(), golden.Y, strict=True)
    ]
    assert_close(notes["cosine"].item(), sum(cosines) / 4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"margin_type": "cosface"}, "margin_type"),
        ({"margin_type": "combined", "m2": 0.1}, "margin_type, m2"),
        ({"m": 0.5}, "m"),
        ({"scale": 32.0}, "scale"),
        ({"monotone": False}, "monotone"),
        ({"straight_through_margin": True}, "straight_through_margin"),
        ({"m": {"value": 0.5, "warmup": 5}}, "m"),
        ({"projector": True}, "projector"),
        ({"extra_fcd_weight": 1.0}, "extra_fcd_weight"),
        ({"m": 0.4, "scale": 30.0}, "m, scale"),
    ],
)
def test_its_own_options_conflict_with_the_hosts_head(options: dict[str, Any], named: str) -> None:
    conflict = f"its options {named} ask for kdhooks' own (head = 'own')"
    assert inheriting(**options).host_conflict == conflict


def test_the_declaration_follows_the_options() -> None:
    assert inheriting().host_conflict == ""
    assert declared().inherits_classifier
    assert not declared(head="own").inherits_classifier
    assert not declared().needs_teacher
    assert declared(extra_fcd_weight=0.1).needs_teacher
    assert declared().weight == 1
    assert declared(weight=0.5).weight == 0.5


# --- properties ------------------------------------------------------------------------------


@drawn
@given(sizes, st.floats(0.01, 100), st.floats(0.01, 100))
def test_ignores_the_lengths_of_embeddings_and_rows(
    size: tuple[int, int, int, int], ours: float, theirs: float
) -> None:
    b, c, d, seed = size
    student, rows, labels = normal(seed, b, d), normal(seed + 1, c, d), labels_of(seed, b, c)
    expected = made(d, d)(student, None, labels, whole(rows))
    assert_close(made(d, d)(ours * student, None, labels, whole(theirs * rows)), expected)


@drawn
@given(sizes)
def test_ignores_the_order_of_batch_and_classes(size: tuple[int, int, int, int]) -> None:
    b, c, d, seed = size
    student, rows, labels = normal(seed, b, d), normal(seed + 1, c, d), labels_of(seed, b, c)
    generator = torch.Generator().manual_seed(seed)
    batch, classes = torch.randperm(b, generator=generator), torch.randperm(c, generator=generator)
    expected = made(d, d)(student, None, labels, whole(rows))
    renamed = classes.argsort()[labels]  # row classes[n] is now row n
    assert_close(made(d, d)(student, None, renamed, whole(rows[classes])), expected)
    assert_close(made(d, d)(student[batch], None, labels[batch], whole(rows)), expected)


@drawn
@given(sizes, st.sampled_from([options for options, _ in MARGINS]))
def test_precisions_agree(size: tuple[int, int, int, int], options: dict[str, Any]) -> None:
    b, c, d, seed = size
    student, rows, labels = normal(seed, b, d), normal(seed + 1, c, d), labels_of(seed, b, c)
    exact, _ = made(d, d, **options)(student, None, labels, whole(rows))
    single, _ = made(d, d, **options).float()(student.float(), None, labels, whole(rows.float()))
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)
    ours, theirs = student.bfloat16(), rows.bfloat16()
    rounded, _ = made(d, d, **options)(ours.double(), None, labels, whole(theirs.double()))
    half, _ = made(d, d, **options)(ours.float(), None, labels, whole(theirs))
    assert half.dtype == torch.float32
    assert_close(half.double(), rounded, rtol=1e-4, atol=1e-4)


@drawn
@given(sizes)
def test_a_larger_margin_never_lowers_the_loss(size: tuple[int, int, int, int]) -> None:
    b, c, d, seed = size
    student, rows, labels = normal(seed, b, d), normal(seed + 1, c, d), labels_of(seed, b, c)
    losses = [
        made(d, d, m=m)(student, None, labels, whole(rows))[0].item()
        for m in (0.0, 0.1, 0.3, 0.5, 0.9)
    ]
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    "options",
    [{}, {"straight_through_margin": True}, {"projector": True}, {"extra_fcd_weight": 1.0}],
)
def test_only_the_student_and_the_projector_receive_gradients(
    options: dict[str, Any],
) -> None:
    module = made(**options)
    student, teacher, rows = (x.clone().requires_grad_() for x in (golden.S, golden.T, golden.W))
    value, notes = module(student, teacher, golden.Y, whole(rows))
    value.backward()
    assert gradient(student).any()
    assert all(gradient(p).any() for n, p in module.named_parameters() if n != "projector.0.bias")
    assert teacher.grad is None
    assert rows.grad is None
    assert value.ndim == 0
    assert list(notes) == ["cosine"]


def test_the_teachers_rows_are_neither_trained_nor_saved() -> None:
    student = TinyFaceNet()
    images, labels = tiny_batch()
    with Distiller(student, tiny_teacher(), [ProxylessKD()], input_shape=(3, 32, 32)) as kd:
        assert kd.teacher_rows is not None
        rows = kd.teacher_rows.rows
        before = rows.clone()
        student(images)
        kd(images, labels)["proxylesskd"].backward()
    assert not rows.requires_grad
    assert rows.grad is None
    assert torch.equal(rows, before)
    assert not list(kd.parameters())
    assert all(tensor.numel() < rows.numel() for tensor in kd.state_dict().values())


def test_resumes_bit_by_bit_from_its_state_dict() -> None:
    straight, resumed = made(projector=True), made(projector=True)
    for step in range(2):
        straight(normal(step, 4, 6), None, golden.Y, whole(golden.W))
    resumed.load_state_dict(straight.state_dict())
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
    for step in range(2, 6):
        arguments = normal(step, 4, 6), None, golden.Y, whole(golden.W)
        ours, theirs = straight(*arguments)[0], resumed(*arguments)[0]
        assert torch.equal(ours, theirs)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin_type": "sphere"}, "margin_type must be one of 'arcface', .*; found 'sphere'"),
        ({"head": "both"}, "head must be one of 'host', 'own'; found 'both'"),
        ({"m2": 0.1}, "m2 belongs to margin_type 'combined'; found 'arcface'"),
        ({"margin_type": "cosface", "m2": 0.1}, "m2 belongs to .*; found 'cosface'"),
        (
            {"m": 28.6},
            r"m must be .* at most 2 rad; found 28\.6; 28\.6 degrees are 0\.4992 rad",
        ),
        ({"m": -0.1}, r"m must be at least 0 and .*; found -0\.1"),
        ({"scale": 0.0}, r"scale must be above 0; found 0\.0"),
        ({"extra_fcd_weight": -1.0}, r"extra_fcd_weight must be at least 0; found -1\.0"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=f"proxylesskd: {message}"):
        declared(**options)


def test_other_widths_need_a_projector() -> None:
    with pytest.raises(KDHooksError, match=r"found 4 and 6; .*_size = 6.*projector = true"):
        declared(4, 6)
