"""Both distances of attention transfer agree with their equation, on maps and on tokens."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, FeatureTap, KDHooksError, Model, Stage, Teacher
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins.at import AT, Distance
from tests import maps
from tests.maps import Shape, features, labels, model, normal
from tests.references import at as reference

# Stage shapes of student and teacher: channels and sizes differ, tokens (n k) on either side.
SHAPES: list[tuple[tuple[Shape, ...], tuple[Shape, ...]]] = [
    (((3, 4, 4),), ((3, 4, 4),)),
    (((2, 7, 7), (5, 4, 4)), ((4, 7, 7), (3, 4, 4))),
    (((2, 7, 7), (3, 5, 5)), ((3, 5, 5), (2, 2, 2))),
    (((2, 3, 3), (1, 2, 2)), ((3, 8, 8), (2, 5, 5))),
    (((2, 6, 3),), ((3, 4, 5),)),
    (((9, 4), (9, 2)), ((9, 3), (4, 5))),
    (((16, 3), (16, 3)), ((2, 6, 6), (4, 3, 3))),
]
DISTANCES = get_args(Distance)
drawn = settings(deadline=None, max_examples=40)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**16))


def declared(student: Model, teacher: Model, **options: Any) -> FeatureTap:
    return AT(**options).feature_tap(student, teacher)


def made(*shapes: Shape, **options: Any) -> nn.Module:
    """Return the loss between two networks with the same stages."""
    return declared(model(*shapes), model(*shapes), **options).loss


def value(loss: nn.Module, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    result: Tensor = loss(student, teacher, labels(len(student[0])))[0]
    return result


@pytest.mark.parametrize(
    ("distance", "expected"), [("mse", maps.GOLDEN_AT), ("cosine", maps.GOLDEN_COSINE)]
)
def test_gives_the_golden_value(distance: str, expected: float) -> None:
    found = value(made((3, 7, 7), distance=distance), [maps.STUDENT], [maps.TEACHER])
    assert_close(found.item(), expected, rtol=0, atol=6e-9)
    [by_loop] = reference.attention_transfer(
        [maps.STUDENT.numpy()], [maps.TEACHER.numpy()], 2.0, distance
    )
    assert_close(by_loop, expected, rtol=0, atol=6e-9)


def test_maps_with_channels_last_are_read_as_such() -> None:
    """timm's Swin returns such maps (h w k)."""
    ours, theirs = features(1, 2, (5, 4, 4)), features(9, 2, (12, 4, 4))
    last = [x.permute(0, 2, 3, 1) for x in theirs]
    loss = declared(model((5, 4, 4)), model((4, 4, 12))).loss
    expected = declared(model((5, 4, 4)), model((12, 4, 4))).loss
    assert_close(value(loss, ours, last), value(expected, ours, theirs))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 4.0])
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_agrees_with_the_equation(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], p: float, distance: str
) -> None:
    loss = declared(model(*ours), model(*theirs), p=p, distance=distance).loss
    student, teacher = features(1, 3, *ours), features(9, 3, *theirs)

    def terms(x: list[np.ndarray]) -> list[float]:
        return reference.attention_transfer(
            as_maps(x), as_maps([y.numpy() for y in teacher]), p, distance
        )

    expected = terms([x.numpy() for x in student])
    found, notes = loss(student, teacher, labels(3))
    assert_close(found.item(), sum(expected))
    assert_close([notes[f"stage{k}"].item() for k in range(1, len(ours) + 1)], expected)
    maps.check_gradients(loss, student, teacher, lambda x, _: sum(terms(x)))


def as_maps(stages: list[np.ndarray]) -> list[np.ndarray]:
    return [reference.grid(x) if x.ndim == 3 else x for x in stages]


@drawn
@given(sizes, st.sampled_from(DISTANCES), st.floats(0.03, 30), st.floats(0.03, 30))
def test_ignores_the_scale_of_features(
    size: tuple[int, int, int, int], distance: str, ours: float, theirs: float
) -> None:
    b, k, side, seed = size
    student, teacher = normal(seed, b, k, side, side), normal(seed + 1, b, k, side, side)
    loss = made((k, side, side), distance=distance)
    expected = value(loss, [student], [teacher])
    assert_close(value(loss, [ours * student], [theirs * teacher]), expected)


@drawn
@given(sizes, st.sampled_from(DISTANCES), st.sampled_from([1.0, 2.0, 3.0]))
def test_ignores_signs_and_the_order_of_channels_and_batch(
    size: tuple[int, int, int, int], distance: str, p: float
) -> None:
    b, k, side, seed = size
    student, teacher = normal(seed, b, k, side, side), normal(seed + 1, b, k, side, side)
    loss = made((k, side, side), distance=distance, p=p)
    generator = torch.Generator().manual_seed(seed)
    batch, channels = torch.randperm(b, generator=generator), torch.randperm(k, generator=generator)
    expected = value(loss, [student], [teacher])
    assert_close(value(loss, [-student[batch][:, channels]], [teacher[batch]]), expected)


@drawn
@given(sizes, st.sampled_from(DISTANCES))
def test_is_never_negative_and_zero_at_equality(
    size: tuple[int, int, int, int], distance: str
) -> None:
    b, k, side, seed = size
    student, teacher = normal(seed, b, k, side, side), normal(seed + 1, b, k, side, side)
    loss = made((k, side, side), distance=distance)
    assert value(loss, [student], [teacher]) > -1e-12
    assert_close(value(loss, [student], [student]), torch.zeros((), dtype=torch.float64))


@drawn
@given(sizes, st.sampled_from(DISTANCES))
def test_the_cosine_is_half_the_pixels_times_the_mean_square(
    size: tuple[int, int, int, int], distance: str
) -> None:
    b, k, side, seed = size
    pair = [normal(seed, b, k, side, side)], [normal(seed + 1, b, k, side, side)]
    shape = (k, side, side)
    mse, cosine = (value(made(shape, distance=name), *pair) for name in DISTANCES)
    assert_close(cosine, side * side / 2 * mse)


@drawn
@given(sizes, st.sampled_from(DISTANCES))
def test_precisions_agree(size: tuple[int, int, int, int], distance: str) -> None:
    b, k, side, seed = size
    student, teacher = normal(seed, b, k, side, side), normal(seed + 1, b, k, side, side)
    loss = made((k, side, side), distance=distance)
    single = value(loss, [student.float()], [teacher.float()])
    assert single.dtype == torch.float32
    assert_close(single.double(), value(loss, [student], [teacher]), rtol=1e-5, atol=1e-6)
    ours, theirs = student.bfloat16(), teacher.bfloat16()
    rounded = value(loss, [ours.float()], [theirs.float()])
    exact = value(loss, [ours.double()], [theirs.double()])
    assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_dead_stage_has_a_finite_gradient(distance: str, p: float) -> None:
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    found = value(made((3, 4, 4), distance=distance, p=p), [student], [torch.rand(2, 3, 4, 4)])
    found.backward()
    assert torch.isfinite(found)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_gradient_reaches_only_the_student() -> None:
    student, teacher = maps.STUDENT.clone().requires_grad_(), maps.TEACHER.clone().requires_grad_()
    loss = made((3, 7, 7))
    value(loss, [student], [teacher]).backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None
    assert not list(loss.parameters())
    assert not loss.state_dict()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_reads_no_value_in_forward(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], distance: str
) -> None:
    loss = declared(model(*ours), model(*theirs), distance=distance).loss
    maps.check_reads_no_value(loss, ours, theirs)


@pytest.mark.parametrize("options", [{"p": 1.0}, {"p": 4.0}, {"distance": "cosine"}])
def test_conforms_with_every_option(options: dict[str, Any]) -> None:
    check_method(AT, **options)


def test_the_default_weight_goes_with_the_distance() -> None:
    sides = model((3, 4, 4)), model((3, 4, 4))
    assert declared(*sides).weight == 1000
    assert declared(*sides, distance="cosine").weight == 5
    assert declared(*sides, weight=2).weight == 2
    assert declared(*sides, weight=0, distance="cosine").weight == 0


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l1"}, "at: distance must be one of 'mse', 'cosine'; found 'l1'"),
        ({"p": 0.5}, "at: p must be at least 1; found 0.5"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        AT(**options)


MAP: Shape = (3, 4, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            model(),
            model(MAP),
            "at needs at least 1 of the student's stages; found 0; name them, shallow to deep, as "
            "taps.student.stages in the recipe, or student_stages=",
        ),
        (
            model(MAP),
            Model(nn.Identity(), 4),
            "of the teacher's stages; found 0; .* taps.teacher.stages in the recipe",
        ),
        (model(MAP), model(), "teacher's stages; found 0; it is no torch module; .*onnx.to_torch"),
        (
            model(MAP, MAP),
            model(MAP),
            "at compares stage by stage: .*found 2 of the student and 1 of the teacher; name as",
        ),
        (
            model((12,)),
            model(MAP),
            r"at: student stage 's0' must return a map \(k h w\) or tokens \(n k\); found \(12,\)",
        ),
        (
            model((145, 8)),
            model(MAP),
            "student stage 's0': tokens must fill a square grid; found 145 of them; .*class token",
        ),
        (
            model((3, 4, 4), (3, 5, 5)),
            model(MAP, MAP),
            r"from shallow to deep.*found \(5, 5\) of at: student stage 's1' after \(4, 4\)",
        ),
        (model(MAP), model((3, 1, 1)), "teacher stage 's0': an attention map needs more than one"),
        (model((1, 8)), model(MAP), "student stage 's0': an attention map needs more than one"),
    ],
)
def test_stages_that_do_not_fit_are_refused(student: Model, teacher: Model, message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        declared(student, teacher)


def test_wide_maps_may_follow_as_long_as_they_do_not_grow() -> None:
    declared(model((3, 4, 4), (3, 2, 8)), model((3, 4, 4), (3, 4, 4)))


def test_a_teacher_that_is_a_function_has_no_stages() -> None:
    with pytest.raises(KDHooksError, match=r"teacher has no submodules to tap \(layer1\)"):
        Distiller(
            TinyFaceNet(),
            Teacher(lambda images: images.flatten(1)),
            ["at"],
            student_stages=["layer1"],
            teacher_stages=["layer1"],
            input_shape=(3, 32, 32),
        )


class MaskedNet(nn.Module):
    """Returns tokens of 8 x 8 patches; drops a quarter in training, as arcface_torch's ViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 8, stride=8)
        self.block = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        if self.training:
            tokens = tokens[:, :12]
        embedding: Tensor = self.block(tokens).mean(dim=1)
        return embedding


def test_tokens_that_training_drops_are_refused_in_the_first_step() -> None:
    student = MaskedNet()
    images, targets = tiny_batch()
    with Distiller(
        student,
        tiny_teacher(),
        ["at"],
        student_stages=["block"],
        teacher_stages=["layer2"],
        input_shape=(3, 32, 32),
    ) as kd:
        student(images)
        message = r"'block' returned \(12, 6\) in training, but \(16, 6\) when .*mask_ratio = 0"
        with pytest.raises(KDHooksError, match=message):
            kd(images, targets)


def test_paths_are_those_of_the_stages() -> None:
    student = Model(None, 4, (Stage("a", MAP), Stage("b", MAP)))
    tap = declared(student, model(MAP, MAP))
    assert (tap.name, tap.student, tap.teacher) == ("at", ("a", "b"), ("s0", "s1"))
