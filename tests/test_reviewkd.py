"""ReviewKD: fusion and pyramid agree with their equations, computed with the module's weights."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import FeatureTap, KDHooksError, Model
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins.reviewkd import LEVELS, ReviewedFeatures, ReviewKD, pyramid
from tests import maps
from tests.maps import Shape, features, labels, model, normal
from tests.references import at as at_reference
from tests.references import reviewkd as reference

# Stage shapes of student and teacher: channels and sizes differ; either side may have tokens (n k).
SHAPES: list[tuple[tuple[Shape, ...], tuple[Shape, ...]]] = [
    (((2, 4, 4), (3, 2, 2)), ((2, 4, 4), (3, 2, 2))),
    (((2, 7, 7), (3, 4, 4), (4, 2, 2)), ((3, 7, 7), (2, 4, 4), (5, 2, 2))),
    (((2, 4, 4), (3, 2, 2)), ((3, 6, 6), (2, 3, 3))),
    (((2, 6, 6), (3, 3, 3)), ((3, 3, 3), (2, 1, 1))),
    (((2, 6, 3), (3, 3, 2)), ((2, 5, 4), (3, 2, 2))),
    (((9, 2), (9, 3)), ((2, 6, 6), (3, 3, 3))),
    (((2, 6, 6), (3, 3, 3)), ((9, 2), (4, 3))),
]
drawn = settings(deadline=None, max_examples=25)
sizes = st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**16))


def declared(student: Model, teacher: Model, **options: Any) -> FeatureTap:
    return ReviewKD(**options).feature_tap(student, teacher)


def made(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...] | None = None, **options: Any
) -> ReviewedFeatures:
    loss = maps.seeded(declared(model(*ours), model(*(theirs or ours)), **options).loss)
    assert isinstance(loss, ReviewedFeatures)
    return loss


def value(loss: nn.Module, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    result: Tensor = loss(student, teacher, labels(len(student[0])))[0]
    return result


def as_maps(stages: list[np.ndarray]) -> list[np.ndarray]:
    return [at_reference.grid(x) if x.ndim == 3 else x for x in stages]


def test_the_pyramid_gives_the_golden_value() -> None:
    found = pyramid(F.mse_loss, maps.STUDENT, maps.TEACHER, LEVELS)
    assert_close(found.item(), maps.GOLDEN_HCL, rtol=0, atol=6e-9)
    by_loop = reference.hcl(maps.STUDENT.numpy(), maps.TEACHER.numpy())
    assert_close(by_loop, maps.GOLDEN_HCL, rtol=0, atol=6e-9)


@pytest.mark.parametrize(
    ("height", "width"), [(7, 7), (5, 5), (4, 4), (4, 9), (3, 6), (2, 2), (1, 5), (1, 1)]
)
def test_levels_that_are_not_smaller_than_the_map_are_left_out(height: int, width: int) -> None:
    ours, theirs = normal(1, 2, 3, height, width), normal(2, 2, 3, height, width)
    found = pyramid(F.mse_loss, ours, theirs, LEVELS)
    assert_close(found.item(), reference.hcl(ours.numpy(), theirs.numpy()))


@pytest.mark.parametrize("mid", [None, 1, 3])
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_agrees_with_the_equation(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], mid: int | None
) -> None:
    loss = made(ours, theirs, mid=mid)
    student, teacher = features(1, 3, *ours), features(9, 3, *theirs)

    def terms(x: list[np.ndarray], weights: dict[str, np.ndarray]) -> list[float]:
        return reference.review_kd(as_maps(x), as_maps([y.numpy() for y in teacher]), weights)

    expected = terms([x.numpy() for x in student], maps.weights(loss))
    found, notes = loss(student, teacher, labels(3))
    assert_close(found.item(), sum(expected))
    assert_close([notes[f"stage{k}"].item() for k in range(1, len(ours) + 1)], expected)
    maps.check_gradients(loss, student, teacher, lambda x, w: sum(terms(x, w)))


def test_weights_are_those_of_the_authors_blocks() -> None:
    """Convolutions are bias-free and uniform within sqrt(3 / fan in) (Kaiming, a = 1), except the
    gates, which have a bias and torch's default initialisation.
    """
    loss = declared(model((6, 8, 8), (9, 4, 4)), model((5, 8, 8), (7, 4, 4))).loss
    parameters = dict(loss.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items() if p.ndim == 4} == {
        "path.inputs.0.0.weight": (9, 6, 1, 1),
        "path.inputs.1.0.weight": (9, 9, 1, 1),
        "path.gates.0.weight": (2, 18, 1, 1),
        "outputs.0.0.weight": (5, 9, 3, 3),
        "outputs.1.0.weight": (7, 9, 3, 3),
    }
    assert {name for name, p in parameters.items() if name.endswith("0.bias")} == {
        "path.gates.0.bias"
    }
    for name, parameter in parameters.items():
        if name.endswith(".0.weight") and "gates" not in name:
            bound = math.sqrt(3 / parameter[0].numel())
            assert 0.8 * bound < parameter.abs().max() <= bound, name


@pytest.mark.parametrize(("deepest", "expected"), [(4, 4), (512, 512), (513, 512), (1024, 512)])
def test_mid_is_the_deepest_width_up_to_512(deepest: int, expected: int) -> None:
    stages = model((1, 2, 2), (deepest, 1, 1))
    loss = declared(stages, model((1, 2, 2), (1, 1, 1))).loss
    assert isinstance(loss, ReviewedFeatures)
    assert loss.get_parameter("path.inputs.0.1.weight").shape == (expected,)


def test_a_shallow_term_reaches_the_deepest_stage_of_the_student() -> None:
    network = TinyFaceNet().train()
    images, _ = tiny_batch()
    shapes: list[Shape] = [(4, 16, 16), (8, 8, 8), (12, 4, 4), (16, 2, 2)]
    loss = declared(model(*shapes), model(*shapes)).loss
    assert isinstance(loss, ReviewedFeatures)
    x, stages = images, []
    for k in range(1, 5):
        x = network.get_submodule(f"layer{k}")(x)
        stages.append(x)
    loss.path(stages)[0].square().sum().backward()
    gradient = network.get_parameter("layer4.0.weight").grad
    assert gradient is not None
    assert gradient.any()


# --- properties ------------------------------------------------------------------------------


@drawn
@given(sizes)
def test_ignores_the_order_of_batch_and_labels(size: tuple[int, int, int, int]) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, 2 * side, 2 * side), (k + 1, side, side))
    loss = made(shapes)
    student, teacher = features(seed, b, *shapes), features(seed + 5, b, *shapes)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    expected = value(loss, student, teacher)
    found, _ = loss([x[order] for x in student], [y[order] for y in teacher], labels(b) - 1)
    assert_close(found, expected)


@drawn
@given(sizes)
def test_the_pyramid_is_never_negative_and_zero_at_equality(
    size: tuple[int, int, int, int],
) -> None:
    b, k, side, seed = size
    ours, theirs = normal(seed, b, k, side, side), normal(seed + 1, b, k, side, side)
    assert pyramid(F.mse_loss, ours, theirs, LEVELS) > 0
    assert pyramid(F.mse_loss, ours, ours, LEVELS) == 0
    scaled = pyramid(F.mse_loss, 3 * ours, 3 * theirs, LEVELS)
    assert_close(scaled, 9 * pyramid(F.mse_loss, ours, theirs, LEVELS))


@drawn
@given(sizes)
def test_precisions_agree(size: tuple[int, int, int, int]) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, 2 * side, 2 * side), (k + 1, side, side))
    loss = made(shapes)
    student, teacher = features(seed, b, *shapes), features(seed + 5, b, *shapes)
    exact = value(loss, student, teacher)
    rounded = [x.bfloat16() for x in student], [y.bfloat16() for y in teacher]
    of_rounded = value(loss, *([x.double() for x in side] for side in rounded))
    loss.float()
    single = value(loss, [x.float() for x in student], [y.float() for y in teacher])
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)
    half = value(loss, *([x.float() for x in side] for side in rounded))
    assert_close(half.double(), of_rounded, rtol=1e-4, atol=1e-5)


# --- gradients, warm-up, state ---------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_only_student_and_own_weights_receive_gradients(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...]
) -> None:
    loss = made(ours, theirs)
    student = [x.requires_grad_() for x in features(1, 3, *ours)]
    teacher = [y.requires_grad_() for y in features(9, 3, *theirs)]
    value(loss, student, teacher).backward()
    assert all(x.grad is not None and x.grad.any() for x in student)
    assert all(y.grad is None for y in teacher)
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_reads_no_value_in_forward(ours: tuple[Shape, ...], theirs: tuple[Shape, ...]) -> None:
    maps.check_reads_no_value(made(ours, theirs), ours, theirs)


def test_resumes_bit_by_bit_from_its_state_dict() -> None:
    shapes = SHAPES[0][0]
    student, teacher = features(1, 3, *shapes), features(9, 3, *shapes)
    straight, resumed = made(shapes), made(shapes)
    for _ in range(3):
        value(straight, student, teacher)
    state = straight.state_dict()
    assert {"path.inputs.0.1.running_mean", "outputs.1.1.running_var"} <= set(state)
    assert not torch.equal(
        state["outputs.1.1.running_var"], resumed.state_dict()["outputs.1.1.running_var"]
    )
    resumed.load_state_dict(state)
    assert torch.equal(value(resumed, student, teacher), value(straight, student, teacher))


@pytest.mark.parametrize("options", [{"mid": 3}, {"weight": 8.0}])
def test_conforms_with_every_option(options: dict[str, Any]) -> None:
    check_method(ReviewKD, **options)


@pytest.mark.parametrize("stages", [["layer2", "layer4"], ["layer1", "layer2", "layer3"]])
def test_conforms_with_other_stages(stages: list[str]) -> None:
    check_method(
        ReviewKD,
        teacher=lambda: tiny_teacher(dim=8),
        student_stages=stages,
        teacher_stages=stages,
    )


def test_the_weight_is_the_taps() -> None:
    sides = model(*SHAPES[0][0]), model(*SHAPES[0][1])
    assert declared(*sides).weight == 1
    assert declared(*sides, weight=8).weight == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mid": 0}, "reviewkd: mid must be at least 1; found 0"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        ReviewKD(**options)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            model((3, 4, 4)),
            model((3, 4, 4)),
            "reviewkd needs at least 2 of the student's stages; found 1; .*taps.student.stages",
        ),
        (
            model((3, 4, 4), (3, 2, 2)),
            model((3, 4, 4), (3, 2, 2), (3, 2, 2)),
            "both sides must have the same number; found 2 of the student and 3 of the teacher",
        ),
        (
            model((129, 8), (129, 8)),
            model((3, 4, 4), (3, 2, 2)),
            "reviewkd: student stage 's0': tokens must fill a square grid; found 129",
        ),
        (
            model((3, 2, 2), (3, 4, 4)),
            model((3, 4, 4), (3, 2, 2)),
            "reviewkd: stages must be named from shallow to deep",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(student: Model, teacher: Model, message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        declared(student, teacher)
