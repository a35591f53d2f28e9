"""Maps, fusion and pyramid of ACSR agree with their equations, with the module's own weights."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from kdhooks import KDHooksError, Model
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch
from kdhooks_plugins._attention import Energy
from kdhooks_plugins._maps import Grid
from kdhooks_plugins.acsr import ACSR, ReviewedAttention, context_distance
from tests import maps
from tests.acsr_losses import declared, gates, made, value
from tests.maps import Shape, features, labels, model, normal
from tests.references import acsr as reference
from tests.references import at as at_reference

# Stage shapes of student and teacher: channels and sizes differ, tokens (n k) on either side.
SHAPES: list[tuple[tuple[Shape, ...], tuple[Shape, ...]]] = [
    (((2, 4, 4), (3, 2, 2)), ((2, 4, 4), (3, 2, 2))),
    (((2, 7, 7), (3, 5, 5), (4, 2, 2)), ((3, 7, 7), (2, 5, 5), (5, 3, 3))),
    (((2, 4, 4), (3, 3, 3)), ((3, 9, 9), (2, 3, 3))),
    (((2, 9, 9), (3, 4, 4)), ((3, 4, 4), (2, 2, 2))),
    (((2, 6, 3), (3, 3, 2)), ((2, 5, 4), (3, 2, 2))),
    (((25, 2), (25, 3)), ((2, 6, 6), (3, 3, 3))),
    (((2, 6, 6), (3, 3, 3)), ((16, 2), (4, 3))),
]
LEVELS: list[tuple[int, ...]] = [(4, 2), (), (3,)]
drawn = settings(deadline=None, max_examples=25)
sizes = st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**16))


def as_maps(stages: list[np.ndarray]) -> list[np.ndarray]:
    return [at_reference.grid(x) if x.ndim == 3 else x for x in stages]


# --- golden values and the equation ----------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((), maps.GOLDEN_COSINE),
        ((4, 2), maps.GOLDEN_HCCSL),
        ((4, 2, 1), maps.GOLDEN_HCCSL_EMPTY_LEVEL),
    ],
)
def test_the_pyramid_gives_the_golden_value(levels: tuple[int, ...], expected: float) -> None:
    energy = Energy(Grid("stage", 3, (7, 7)))
    ours, theirs = energy(maps.STUDENT), energy(maps.TEACHER)
    found = context_distance(ours, theirs, levels, center=False)
    assert_close(found.item(), expected, rtol=0, atol=6e-9)
    x, y = reference.energies([maps.STUDENT.numpy(), maps.TEACHER.numpy()], 2.0)
    assert_close(reference.hccsl(x, y, levels), expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("levels", [*LEVELS, (5, 4, 3, 2)])
@pytest.mark.parametrize(
    ("ours", "theirs"), [((7, 7), (7, 7)), ((9, 4), (5, 6)), ((4, 4), (4, 4)), ((3, 2), (8, 8))]
)
def test_the_pyramid_agrees_with_the_equation(
    ours: Shape, theirs: Shape, levels: tuple[int, ...], center: bool
) -> None:
    x, y = normal(1, 3, 1, *ours).abs(), normal(2, 3, 1, *theirs).abs()
    expected = reference.hccsl(x.numpy(), y.numpy(), levels, center)
    assert_close(context_distance(x, y, levels, center).item(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center": False},
        {"p": 1.0},
        {"p": 3.0, "center": False},
        {"mid": 1},
        {"mid": 5},
        {"levels": ()},
        {"levels": [3]},
        {"levels": (2,), "center": False},
    ],
)
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_the_student_review_agrees_with_the_equation(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], options: dict[str, Any]
) -> None:
    chosen = {"p": 2.0, "levels": (4, 2), "center": True, **options}
    loss = made(ours, theirs, **options)
    student, teacher = features(1, 3, *ours), features(9, 3, *theirs)
    targets = reference.energies(as_maps([y.numpy() for y in teacher]), chosen["p"])

    def terms(own: list[np.ndarray]) -> list[float]:
        pairs = zip(own, targets, strict=True)
        return [reference.hccsl(a, b, chosen["levels"], chosen["center"]) for a, b in pairs]

    def fused(x: list[np.ndarray], weights: dict[str, np.ndarray]) -> list[float]:
        own = reference.energies(as_maps(x), chosen["p"])
        return terms(reference.amfm(own, weights, positive=True))

    at = [x.numpy() for x in student]
    found, notes = loss(student, teacher, labels(3))
    assert_close(found.item(), sum(fused(at, maps.weights(loss))))
    plain = terms(reference.energies(as_maps(at), chosen["p"]))
    for k, (with_amfm, without) in enumerate(
        zip(fused(at, maps.weights(loss)), plain, strict=True), start=1
    ):
        assert_close(notes[f"stage{k}"].item(), with_amfm)
        assert_close(notes[f"stage{k}_unfused"].item(), without)
    assert not any(note.requires_grad for note in notes.values())
    maps.check_gradients(loss, student, teacher, lambda x, w: sum(fused(x, w)))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_the_fused_teacher_agrees_with_the_equation(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], levels: tuple[int, ...], center: bool
) -> None:
    options: dict[str, Any] = {"levels": levels, "center": center, "p": 1.5}
    loss = made(ours, theirs, direction="teacher_fused", **options)
    student, teacher = features(1, 3, ours[-1]), features(9, 3, *theirs)
    every = reference.energies(as_maps([y.numpy() for y in teacher]), 1.5)
    target = reference.fused(every, center)

    def expected(x: list[np.ndarray]) -> float:
        [own] = reference.energies(as_maps(x), 1.5)
        return reference.hccsl(own, target, levels, center)

    found, notes = loss(student, teacher, labels(3))
    assert_close(found.item(), expected([x.numpy() for x in student]))
    assert list(notes) == ["fused1"]
    assert_close(notes["fused1"], found.detach())
    assert not list(loss.parameters())
    maps.check_gradients(loss, student, teacher, lambda x, _: expected(x))


# --- what the method must keep ---------------------------------------------------------------


@drawn
@given(sizes, st.booleans())
def test_teacher_maps_in_place_of_the_students_cost_nothing(
    size: tuple[int, int, int, int], center: bool
) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, side + 3, side + 3), (k + 1, side, side))
    loss = made(shapes, center=center)
    teacher = features(seed, b, *shapes)
    same = [read(y) for read, y in zip(loss.theirs, teacher, strict=True)]
    for term in loss.terms(same, same):
        assert_close(term, torch.zeros_like(term))


@drawn
@given(sizes, st.booleans(), st.sampled_from(["student_review", "teacher_fused"]))
def test_ignores_the_scale_of_each_map(
    size: tuple[int, int, int, int], center: bool, direction: str
) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, side + 3, side + 3), (k + 1, side, side))
    loss = made(shapes, center=center, direction=direction)
    teacher = features(seed, b, *shapes)
    student = features(seed + 5, b, *shapes)[-len(loss.ours) :]
    expected = value(loss, student, teacher)
    assert_close(value(loss, student, [3 * teacher[0], teacher[1]]), expected)
    assert_close(value(loss, student, [teacher[0], teacher[1] / 3]), expected)
    for module in loss.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-15  # all that stands between
    expected = value(loss, student, teacher)
    assert_close(value(loss, [3 * x for x in student], teacher), expected)


def test_the_pyramid_ignores_the_scale_of_both_maps() -> None:
    ours, theirs = normal(1, 2, 1, 6, 6).abs(), normal(2, 2, 1, 6, 6).abs()
    for center in (False, True):
        expected = context_distance(ours, theirs, (4, 2), center)
        assert_close(context_distance(3 * ours, theirs, (4, 2), center), expected)
        assert_close(context_distance(ours, 3 * theirs, (4, 2), center), expected)


def test_pearson_ignores_what_all_pixels_share_and_the_cosine_does_not() -> None:
    ours, theirs = normal(1, 2, 1, 6, 6).abs(), normal(2, 2, 1, 6, 6).abs()
    centred, plain = (
        (
            context_distance(ours + 10, theirs, (4, 2), center),
            context_distance(ours, theirs, (4, 2), center),
        )
        for center in (True, False)
    )
    assert_close(*centred)
    assert abs(plain[0] - plain[1]) > 0.05


def test_the_plain_cosine_of_wide_stages_starts_near_one_and_pearson_does_not() -> None:
    """Independent noise of 64 channels: cosine C / (C + 2) = 0.97."""
    energy = Energy(Grid("stage", 64, (14, 14)))
    ours, theirs = energy(normal(1, 4, 64, 14, 14)), energy(normal(2, 4, 64, 14, 14))
    assert_close(context_distance(ours, theirs, (), center=False).item(), 2 / 66, rtol=0, atol=0.01)
    assert_close(context_distance(ours, theirs, (), center=True).item(), 1.0, rtol=0, atol=0.1)


@pytest.mark.parametrize("fused", [True, False])
def test_the_shallowest_term_alone_reaches_the_deepest_stage_through_the_review(
    fused: bool,
) -> None:
    network = TinyFaceNet().train()
    shapes: list[Shape] = [(4, 16, 16), (8, 8, 8), (12, 4, 4), (16, 2, 2)]
    loss = declared(model(*shapes), model(*shapes)).loss
    assert isinstance(loss, ReviewedAttention)
    assert loss.fusion is not None
    x, stages = tiny_batch()[0], []
    for k in range(1, 5):
        x = network.get_submodule(f"layer{k}")(x)
        stages.append(x)
    ours = [read(x) for read, x in zip(loss.ours, stages, strict=True)]
    theirs = [torch.rand_like(x) for x in ours]
    loss.terms(loss.fusion(ours) if fused else ours, theirs)[0].backward()
    gradient = network.get_parameter("layer4.0.weight").grad
    assert (gradient is not None and bool(gradient.any())) == fused


@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_gradient_reaches_student_and_own_weights_alone(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...]
) -> None:
    loss = made(ours, theirs)
    student = [x.requires_grad_() for x in features(1, 3, *ours)]
    teacher = [y.requires_grad_() for y in features(9, 3, *theirs)]
    value(loss, student, teacher).backward()
    assert all(x.grad is not None and x.grad.any() for x in student)
    assert all(y.grad is None for y in teacher)
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


@drawn
@given(sizes, st.booleans(), st.sampled_from(["student_review", "teacher_fused"]))
def test_ignores_the_order_of_batch_and_channels(
    size: tuple[int, int, int, int], center: bool, direction: str
) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, side + 3, side + 3), (k + 1, side, side))
    loss = made(shapes, center=center, direction=direction)
    teacher = features(seed, b, *shapes)
    student = features(seed + 5, b, *shapes)[-len(loss.ours) :]
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    expected = value(loss, student, teacher)
    found, _ = loss([x[order].flip(1) for x in student], [y[order] for y in teacher], labels(b) - 1)
    assert_close(found, expected)
    assert 0 < expected < 2 * len(loss.ours)


@drawn
@given(sizes, st.booleans(), st.sampled_from(["student_review", "teacher_fused"]))
def test_precisions_agree(size: tuple[int, int, int, int], center: bool, direction: str) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, side + 3, side + 3), (k + 1, side, side))
    loss = made(shapes, center=center, direction=direction)
    teacher = features(seed, b, *shapes)
    student = features(seed + 5, b, *shapes)[-len(loss.ours) :]
    exact = value(loss, student, teacher)
    rounded = [x.bfloat16() for x in student], [y.bfloat16() for y in teacher]
    of_rounded = value(loss, *([x.double() for x in side] for side in rounded))
    loss.float()
    single = value(loss, [x.float() for x in student], [y.float() for y in teacher])
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)
    half = value(loss, *([x.float() for x in side] for side in rounded))
    assert_close(half.double(), of_rounded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("direction", ["student_review", "teacher_fused"])
def test_a_dead_stage_has_a_finite_gradient(direction: str, center: bool) -> None:
    shapes: tuple[Shape, ...] = ((2, 4, 4), (3, 2, 2))
    loss = made(shapes, center=center, direction=direction)
    teacher = features(1, 2, *shapes)
    student = [torch.zeros(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found = value(loss, student[-len(loss.ours) :], [torch.zeros_like(teacher[0]), teacher[1]])
    found.backward()
    assert torch.isfinite(found)
    assert student[-1].grad is not None
    assert torch.isfinite(student[-1].grad).all()


@pytest.mark.parametrize("direction", ["student_review", "teacher_fused"])
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_reads_no_value_in_forward(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], direction: str
) -> None:
    loss = made(ours, theirs, direction=direction)
    maps.check_reads_no_value(loss, ours[-len(loss.ours) :], theirs)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "teacher_fused"},
        {"center": False},
        {"p": 1.0},
        {"mid": 3},
        {"levels": []},
    ],
)
def test_conforms_with_every_option(options: dict[str, Any]) -> None:
    check_method(ACSR, **options)


def test_the_fused_teacher_taps_the_students_last_stage_alone() -> None:
    sides = model((2, 4, 4), (3, 2, 2)), model((2, 4, 4), (3, 2, 2))
    review, fused = declared(*sides), declared(*sides, direction="teacher_fused")
    assert (review.student, review.teacher) == (("s0", "s1"), ("s0", "s1"))
    assert (fused.student, fused.teacher) == (("s1",), ("s0", "s1"))


def test_the_weight_is_the_taps() -> None:
    sides = model((2, 4, 4), (3, 2, 2)), model((2, 4, 4), (3, 2, 2))
    assert declared(*sides).weight == 5
    assert declared(*sides, weight=1).weight == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "cbam"}, "acsr: source must be one of 'activation', .*; found 'cbam'"),
        ({"direction": "up"}, "acsr: direction must be one of .*; found 'up'"),
        ({"p": 0.5}, "acsr: p must be at least 1; found 0.5"),
        ({"mid": 0}, "acsr: mid must be at least 1; found 0"),
        ({"levels": (4, 2, 1)}, r"acsr: levels\[2\] must be at least 2; found 1"),
        (
            {"source": "cbam_spatial", "p": 1.0, **gates("conv")},
            "acsr: p belongs to source 'activation'; found 'cbam_spatial'",
        ),
        (
            {"source": "cbam_channel", "direction": "teacher_fused", **gates("mlp")},
            "acsr: source 'cbam_channel' can't be averaged over stages, whose .*; use",
        ),
        ({"source": "cbam_spatial"}, "both networks must have .* found 0 and 0; without CBAM use"),
        (
            {"source": "cbam_spatial", "student_attention": ["a"], "teacher_attention": ["a"]},
            "name at least 2 of them, .*; found 1 and 1",
        ),
        (
            {"source": "cbam_channel", "student_attention": ["a"], "teacher_attention": ["a", "b"]},
            "name at least 1 of them, and as many of both, .*; found 1 and 2",
        ),
        (gates("conv"), "belong to the sources 'cbam_spatial' and 'cbam_channel'; found 'activ"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        ACSR(**options)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            model((3, 4, 4)),
            model((3, 4, 4)),
            "acsr needs at least 2 of the student's stages; found 1; .*taps.student.stages",
        ),
        (
            model((3, 4, 4), (3, 2, 2), (3, 2, 2)),
            model((3, 4, 4), (3, 2, 2)),
            "both sides must have the same number; found 3 of the student and 2 of the teacher",
        ),
        (
            model((129, 8), (129, 8)),
            model((3, 4, 4), (3, 2, 2)),
            "acsr: student stage 's0': tokens must fill a square grid; found 129",
        ),
        (
            model((3, 4, 4), (3, 1, 1)),
            model((3, 4, 4), (3, 2, 2)),
            "acsr: student stage 's1': an attention map needs more than one pixel",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(student: Model, teacher: Model, message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        declared(student, teacher)
