"""Attention, fusion and pyramid of ACSR agree with their equations for the module's own weights;
no weight of the fusion moves the student's own attention away from the teacher's."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Model
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins._attention import Energy
from kdhooks_plugins._attention_fusion import SpatialFusion
from kdhooks_plugins._maps import Grid
from kdhooks_plugins.acsr import ACSR, AttentionReview, ReviewedAttention, context_distance
from tests import maps
from tests.acsr_losses import Arrays, Expected, declared, gates, made, value
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
ONE = SHAPES[0][0]
KINDS = ("channel", "spatial")
LEVELS: list[tuple[int, ...]] = [(4, 2), (), (3,)]
STAGES = ["layer1", "layer2", "layer3", "layer4"]
drawn = settings(deadline=None, max_examples=25)
sizes = st.tuples(st.integers(2, 4), st.integers(2, 4), st.integers(2, 6), st.integers(0, 2**16))
seeds = st.integers(0, 2**16)


def attention(stages: list[np.ndarray], p: float, kinds: tuple[str, ...]) -> dict[str, Arrays]:
    as_maps = [at_reference.grid(x) if x.ndim == 3 else x for x in stages]
    both = {
        "channel": reference.channel_means(as_maps),
        "spatial": reference.energies(as_maps, p),
    }
    return {kind: both[kind] for kind in kinds}


# --- golden values and the equations ---------------------------------------------------------


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
    found = context_distance(energy(maps.STUDENT), energy(maps.TEACHER), levels)
    assert_close(found.item(), expected, rtol=0, atol=6e-9)
    x, y = reference.energies([maps.STUDENT.numpy(), maps.TEACHER.numpy()], 2.0)
    assert_close(reference.hccsl(x, y, levels), expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize("levels", [*LEVELS, (5, 4, 3, 2)])
@pytest.mark.parametrize("shape", [(1, 7, 7), (1, 9, 4), (1, 4, 4), (1, 3, 2), (5, 1, 1)])
def test_the_pyramid_agrees_with_the_equation(shape: Shape, levels: tuple[int, ...]) -> None:
    x, y = normal(1, 3, *shape), normal(2, 3, *shape)
    assert_close(
        context_distance(x, y, levels).item(), reference.hccsl(x.numpy(), y.numpy(), levels)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center": False},
        {"attention": "channel"},
        {"attention": "spatial", "p": 3.0},
        {"p": 1.0, "center": False},
        {"momentum": 0.0},
        {"momentum": 0.7, "levels": ()},
        {"levels": [3]},
    ],
)
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_the_loss_agrees_with_the_equations(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], options: dict[str, Any]
) -> None:
    loss = made(ours, theirs, **options)
    chosen = {"p": 2.0, "attention": "both", **options}
    p, kind = chosen.pop("p"), chosen.pop("attention")
    kinds = KINDS if kind == "both" else (kind,)
    students = [features(1 + 5 * n, 3, *ours) for n in range(3)]
    teachers = [features(40 + 5 * n, 3, *theirs) for n in range(3)]

    def by_kind(steps: list[Arrays]) -> dict[str, list[Arrays]]:
        read = [attention(step, p, kinds) for step in steps]
        return {kind: [step[kind] for step in read] for kind in kinds}

    past = [[x.numpy() for x in student] for student in students[:-1]]
    equations = Expected(by_kind([[y.numpy() for y in step] for step in teachers]), **chosen)
    for student, teacher in zip(students[:-1], teachers[:-1], strict=True):
        loss(student, teacher, labels(3))
    before = copy.deepcopy(loss.state_dict())
    found, notes = loss(students[-1], teachers[-1], labels(3))
    now = [x.numpy() for x in students[-1]]
    terms = equations(by_kind([*past, now]), maps.weights(loss))
    assert_close(found.item(), sum(terms.values()) / len(terms))
    deepest = [f"{kind}{len(ours)}_fused" for kind in kinds]
    assert set(notes) == set(terms) - set(deepest)
    for name, note in notes.items():
        assert_close(note.item(), terms[name])
        assert not note.requires_grad
    for name in deepest:
        assert terms[name] == terms[name.removesuffix("_fused")]
    loss.load_state_dict(before)
    maps.check_gradients(
        loss, students[-1], teachers[-1], lambda x, w: equations.mean(by_kind([*past, x]), w)
    )


# --- the fusion moves no attention away from the teacher's -----------------------------------


class _Signed(SpatialFusion):
    """A fusion with a negative weight on the own map, which the real one excludes."""

    def forward(self, attention: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        own, fused = super().forward(attention)
        return own, [*((f - 3 * a) for f, a in zip(fused[:-1], own[:-1], strict=True)), fused[-1]]


def towards_the_teacher(review: AttentionReview, seed: int, wild: float) -> Tensor:
    """Return the smallest inner product over stages and samples: of the negative gradient of a
    stage's fused distance by the student's own attention, and of the teacher's attention less
    its mean."""
    with torch.no_grad():
        for place, parameter in enumerate(review.parameters()):
            parameter.copy_(wild * normal(seed + place, *parameter.shape))
    shapes = [(8, 6, 6), (12, 4, 4), (16, 2, 2)]
    student = [x.requires_grad_() for x in features(seed, 3, *shapes)]
    taught = review.read(review.theirs, features(seed + 7, 3, *shapes))
    targets = review.less_mean("teacher", taught)
    own, fused = review.fusion(review.read(review.ours, student))
    distances = review.distances(review.less_mean("fused", fused), targets)
    found = []
    for a, distance, target in zip(own, distances, targets, strict=True):
        (gradient,) = torch.autograd.grad(distance, a, retain_graph=True)
        found.append((-gradient * target).flatten(1).sum(dim=1))
    return torch.cat(found).amin()


def reviews(**options: Any) -> nn.ModuleDict:
    return made(((8, 6, 6), (12, 4, 4), (16, 2, 2)), **options).kinds


@drawn
@given(seeds, st.sampled_from([0.1, 1.0, 10.0]), st.sampled_from(KINDS))
def test_no_weight_of_the_fusion_moves_the_own_attention_away(
    seed: int, wild: float, kind: str
) -> None:
    review = reviews()[kind]
    assert isinstance(review, AttentionReview)
    assert towards_the_teacher(review, seed, wild) > -1e-9


def test_a_fusion_with_weights_of_any_sign_is_noticed() -> None:
    review = reviews()["spatial"]
    assert isinstance(review, AttentionReview)
    review.fusion = _Signed(3).double()
    assert min(towards_the_teacher(review, seed, 1.0) for seed in range(5)) < -1e-3


def test_the_own_attention_of_each_stage_and_kind_comes_closer_in_a_training() -> None:
    torch.manual_seed(3)
    network, (images, targets) = TinyFaceNet().train(), tiny_batch(copies=4)
    kd = Distiller(
        network,
        tiny_teacher(),
        [ACSR()],
        student_stages=STAGES,
        teacher_stages=STAGES,
        input_shape=(3, 32, 32),
    )
    optimizer = torch.optim.SGD([*network.parameters(), *kd.parameters()], 0.02, momentum=0.9)
    found = []
    for _ in range(60):
        network(images)
        optimizer.zero_grad()
        kd(images, targets)["acsr"].backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        found.append({name: float(note) for name, note in kd.metrics.items()})
    kd.remove()
    own = [f"acsr/{kind}{k}" for kind in KINDS for k in (1, 2, 3, 4)]
    assert all(found[-1][name] < found[0][name] - 0.1 for name in own), (found[0], found[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_the_shallowest_term_alone_reaches_the_deepest_stage_through_the_review(
    kind: str, fused: bool
) -> None:
    network = TinyFaceNet().train()
    shapes: list[Shape] = [(4, 16, 16), (8, 8, 8), (12, 4, 4), (16, 2, 2)]
    loss = declared(model(*shapes), model(*shapes)).loss
    assert isinstance(loss, ReviewedAttention)
    review = loss.kinds[kind]
    assert isinstance(review, AttentionReview)
    x, stages = tiny_batch()[0], []
    for stage in STAGES:
        x = network.get_submodule(stage)(x)
        stages.append(x)
    first = review.fusion(review.read(review.ours, stages))[1 if fused else 0][0]
    context_distance(first, torch.rand_like(first), (4, 2)).backward()
    gradient = network.get_parameter("layer4.0.weight").grad
    assert (gradient is not None and bool(gradient.any())) == fused


# --- centring --------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
def test_centring_removes_what_all_faces_share(
    center: bool,
) -> None:
    """Without centring, the part that all aligned faces share dominates the cosine."""
    loss = made(ONE, center=center, attention="spatial")
    shared = [2 + normal(90 + k, 1, *shape).abs() for k, shape in enumerate(ONE)]
    notes: dict[str, Tensor] = {}
    for step in range(40):
        teacher = [x + 0.2 * y for x, y in zip(shared, features(3 * step, 8, *ONE), strict=True)]
        student = [
            x + 0.2 * y for x, y in zip(shared, features(3 * step + 1, 8, *ONE), strict=True)
        ]
        _, notes = loss(student, teacher, labels(8))
    found = torch.stack([notes["spatial1"], notes["spatial2"]])
    if center:
        assert (found - 1).abs().max() < 0.4
    else:
        assert found.max() < 0.05


def test_without_centring_no_mean_is_kept() -> None:
    assert not list(made(ONE, center=False).buffers())
    assert {name.split(".")[-1] for name, _ in made(ONE).named_buffers()} == {"average", "weight"}


# --- invariances and gradients ---------------------------------------------------------------


@drawn
@given(sizes, st.booleans())
def test_teacher_attention_in_place_of_the_students_has_no_loss(
    size: tuple[int, int, int, int], center: bool
) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, side + 3, side + 3), (k + 1, side, side))
    for review in made(shapes, center=center).kinds.values():
        assert isinstance(review, AttentionReview)
        targets = review.read(review.theirs, features(seed, b, *shapes))
        same = review.less_mean("own", targets), review.less_mean("teacher", targets)
        for distance in review.distances(*same):
            assert_close(distance, torch.zeros_like(distance))


@drawn
@given(sizes, st.booleans())
def test_ignores_the_scale_of_each_stage(size: tuple[int, int, int, int], center: bool) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, side + 3, side + 3), (k + 1, side, side))
    loss = made(shapes, center=center)
    teacher, student = features(seed, b, *shapes), features(seed + 5, b, *shapes)
    expected = value(loss, student, teacher)
    assert_close(value(loss, student, [3 * teacher[0], teacher[1]]), expected)
    assert_close(value(loss, student, [teacher[0], teacher[1] / 3]), expected)
    assert_close(value(loss, [3 * x for x in student], teacher), expected)


@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_gradient_reaches_only_student_and_own_weights(
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
@given(sizes, st.booleans())
def test_ignores_the_order_of_the_batch_and_of_the_teachers_channels_in_a_map(
    size: tuple[int, int, int, int], center: bool
) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, side + 3, side + 3), (k + 1, side, side))
    teacher, student = features(seed, b, *shapes), features(seed + 5, b, *shapes)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    loss = made(shapes, center=center)
    expected = value(loss, student, teacher)
    assert_close(value(loss, [x[order] for x in student], [y[order] for y in teacher]), expected)
    assert 0 < expected < 2
    spatial = made(shapes, center=center, attention="spatial")
    expected = value(spatial, student, teacher)
    assert_close(value(spatial, student, [y.flip(1) for y in teacher]), expected)


@drawn
@given(sizes, st.booleans())
def test_precisions_agree(size: tuple[int, int, int, int], center: bool) -> None:
    b, k, side, seed = size
    shapes: tuple[Shape, ...] = ((k, side + 3, side + 3), (k + 1, side, side))
    loss = made(shapes, center=center)
    teacher, student = features(seed, b, *shapes), features(seed + 5, b, *shapes)
    exact = value(loss, student, teacher)
    single = value(loss.float(), [x.float() for x in student], [y.float() for y in teacher])
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("center", [False, True])
def test_a_dead_stage_has_a_finite_gradient(center: bool) -> None:
    loss = made(ONE, center=center)
    teacher = features(1, 2, *ONE)
    student = [torch.zeros(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ONE]
    found = value(loss, student, [torch.zeros_like(teacher[0]), teacher[1]])
    found.backward()
    assert torch.isfinite(found)
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in student)


@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_reads_no_value_in_forward(ours: tuple[Shape, ...], theirs: tuple[Shape, ...]) -> None:
    maps.check_reads_no_value(made(ours, theirs), ours, theirs)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "channel"},
        {"attention": "spatial"},
        {"center": False},
        {"momentum": 0.0},
        {"p": 1.0},
        {"levels": []},
    ],
)
def test_conforms_with_every_option(options: dict[str, Any]) -> None:
    check_method(ACSR, **options)


def test_taps_each_stage_once() -> None:
    sides = model((2, 4, 4), (3, 2, 2)), model((2, 4, 4), (3, 2, 2))
    for attention in ("both", "channel", "spatial"):
        tap = declared(*sides, attention=attention)
        assert (tap.student, tap.teacher) == (("s0", "s1"), ("s0", "s1"))


def test_channels_alone_need_no_pixels() -> None:
    sides = model((2, 4, 4), (3, 1, 1)), model((2, 4, 4), (3, 2, 2))
    assert len(list(declared(*sides, attention="channel").loss.parameters())) == 4


def test_the_tap_has_the_weight() -> None:
    sides = model((2, 4, 4), (3, 2, 2)), model((2, 4, 4), (3, 2, 2))
    assert declared(*sides).weight == 30
    assert declared(*sides, weight=1).weight == 1


@pytest.mark.parametrize("copies", [1, 3])
def test_a_first_batch_of_one_face_has_almost_no_gradient(copies: int) -> None:
    """Less its mean, its attention is a rounding error, which must not be scaled to length 1."""
    shapes: tuple[Shape, ...] = ((6, 28, 28), (9, 14, 14), (12, 7, 7))

    def gradient(x: list[Tensor], y: list[Tensor]) -> float:
        ours = [part.float().relu().requires_grad_() for part in x]
        value(made(shapes).float(), ours, [part.float().relu() for part in y]).backward()
        return sum(float(part.grad.norm()) for part in ours if part.grad is not None)

    ours, theirs = features(1, 3, *shapes), features(9, 3, *shapes)
    one, other = ([x[:1].repeat(copies, 1, 1, 1) for x in side] for side in (ours, theirs))
    assert gradient(one, other) < 0.05 * gradient(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "cbam"}, "acsr: attention must be one of 'both', .*; found 'cbam'"),
        ({"p": 0.5}, "acsr: p must be at least 1; found 0.5"),
        ({"momentum": 1.0}, "acsr: momentum must be at least 0 and below 1; found 1.0"),
        ({"levels": (4, 2, 1)}, r"acsr: levels\[2\] must be at least 2; found 1"),
        (
            {"attention": "channel", "p": 1.0},
            "acsr: p belongs to the pixels' energy, which is not compared here; leave it out",
        ),
        ({"p": 1.0, **gates(spatial="conv")}, "acsr: p belongs to the pixels' energy"),
        (
            {"momentum": 0.5, "center": False},
            "acsr: momentum belongs to center = true; found center = false",
        ),
        (
            {"attention": "spatial", **gates(channel="mlp")},
            "acsr: attention 'spatial' uses no channel gates; found 2 of the student and 2 of the "
            "teacher; leave them out, or set attention = 'both'",
        ),
        (
            {"student_spatial_gates": ["a"], "teacher_spatial_gates": ["a", "b"]},
            "acsr: student_spatial_gates and teacher_spatial_gates must name equally many, .*; "
            "found 1 and 2; unless both sides have CBAM, name none",
        ),
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


def test_gates_are_named_for_every_stage() -> None:
    sides = model((2, 4, 4), (3, 2, 2), (3, 2, 2)), model((2, 4, 4), (3, 2, 2), (3, 2, 2))
    message = (
        "acsr: student_channel_gates must name one gate per stage; found 2 gates and 3 stages; "
        "name as many as taps.student.stages, or student_stages="
    )
    with pytest.raises(KDHooksError, match=message):
        declared(*sides, **gates(channel="mlp"))
