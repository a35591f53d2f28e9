"""ACSR: maps, fusion and pyramid against their equations, with the module's own weights."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, FeatureTap, KDHooksError, Model, Teacher
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins._attention import Energy
from kdhooks_plugins._maps import Grid
from kdhooks_plugins.acsr import ACSR, ReviewedAttention, context_distance
from tests import maps
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
    loss = made(ours, theirs, direction=direction, warmup_steps=2)
    maps.check_reads_no_value(loss, ours[-len(loss.ours) :], theirs)


@pytest.mark.parametrize("warmup", [1, 3])
def test_the_loss_grows_over_the_warm_up_and_goes_on_from_the_state_dict(warmup: int) -> None:
    shapes = SHAPES[0][0]
    student, teacher = features(1, 3, *shapes), features(9, 3, *shapes)
    loss, resumed = made(shapes, warmup_steps=warmup), made(shapes, warmup_steps=warmup)
    full = value(made(shapes), student, teacher)
    for step in range(5):
        resumed.load_state_dict(loss.state_dict())
        expected = min(1.0, step / warmup) * full
        assert_close(value(loss, student, teacher), expected)
        assert_close(value(resumed, student, teacher), expected)
    assert loss.state_dict()["warmup.steps"] == 5
    loss.eval()
    value(loss, student, teacher)
    assert loss.warmup.steps == 5  # an evaluation pass is no step


# --- CBAM ------------------------------------------------------------------------------------


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


def gates(name: str) -> dict[str, Any]:
    paths = [f"layer{k}.3.{name}" for k in (1, 2)]
    return {"student_attention": paths, "teacher_attention": paths}


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
def test_a_tapped_sigmoid_is_undone(source: str, logits: str, sigmoid: str) -> None:
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


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "teacher_fused"},
        {"center": False},
        {"p": 1.0},
        {"mid": 3},
        {"levels": []},
        {"warmup_steps": 5},
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
        ({"source": "cbam"}, r"acsr: source must be one of \('activation'.*; found 'cbam'"),
        ({"direction": "up"}, "acsr: direction must be one of .*; found 'up'"),
        ({"p": 0.5}, "acsr: p must be at least 1; found 0.5"),
        ({"mid": 0}, "acsr: mid must be at least 1; found 0"),
        ({"warmup_steps": -2}, "acsr: warmup_steps must be at least 0; found -2"),
        ({"levels": (4, 2, 1)}, r"acsr: levels must be at least 2, since .*; found \[4, 2, 1\]"),
        (
            {"source": "cbam_spatial", "p": 1.0, **gates("conv")},
            "acsr: p belongs to source 'activation'; found 'cbam_spatial'",
        ),
        (
            {"source": "cbam_channel", "direction": "teacher_fused", **gates("mlp")},
            "acsr: cbam_channel can't be averaged over stages, whose channels differ; use",
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
