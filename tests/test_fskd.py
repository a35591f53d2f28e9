"""F-SKD agrees with the authors' code and the equation, and centring has the intended effect."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Model
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins.fskd import FSKD
from tests import maps
from tests.maps import Shape, features, labels, model, normal, seeded, weights
from tests.references import fskd as reference
from tests.references.fitnet import as_map, resized

# Stage shapes of student and teacher: channels and sizes differ, tokens (n k) on either side.
SHAPES: list[tuple[tuple[Shape, ...], tuple[Shape, ...]]] = [
    (((3, 4, 4),), ((3, 4, 4),)),
    (((2, 5, 5), (4, 4, 4)), ((3, 5, 5), (4, 2, 3))),
    (((9, 3), (4, 2)), ((4, 3), (2, 2, 2))),
]


def declared(student: Model, teacher: Model, **options: Any) -> nn.Module:
    return seeded(FSKD(**options).feature_tap(student, teacher).loss)


def value(loss: nn.Module, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    result: Tensor = loss(student, teacher, labels(len(student[0])))[0]
    return result


def terms(
    student: list[Any],
    teacher: list[Tensor],
    own: dict[str, np.ndarray],
    means: list[np.ndarray | None] | None = None,
) -> list[float]:
    ours, theirs = ([as_map(np.asarray(x)) for x in side] for side in (student, teacher))
    connectors = [own.get(f"connectors.{k}.weight") for k in range(len(ours))]
    return reference.feature_similarity(ours, theirs, connectors, means or [None] * len(ours))


def test_agrees_with_the_authors_code() -> None:
    """The number is 20 times the mean over four stages of equal widths."""
    # github.com/kangkzeng/feature-similarity-KD, commit 5a0b9bdc8aa64648a45eba2e722b8c7c17142bdb.
    # `python golden.py` executed the function cosine_loss of train_student.py, taken out of the
    # file by ast, on these features, added cosine_loss(student, teacher) / 4 over the stages as
    # the script's loop does, and multiplied by the 20 of run_student.sh (--distill_param). It
    # printed 2.1664711946.
    student = [normal(k, 3, 2**k, 2 ** (5 - k), 2 ** (5 - k)) for k in (1, 2, 3, 4)]
    noise = [normal(10 + k, 3, 2**k, 2 ** (5 - k), 2 ** (5 - k)) for k in (1, 2, 3, 4)]
    teacher = [s + 0.5 * n for s, n in zip(student, noise, strict=True)]
    sides = model(*(tuple(x.shape[1:]) for x in student))
    tap = FSKD(center=False).feature_tap(sides, sides)
    assert not list(tap.loss.parameters())
    assert tap.weight == 20
    assert_close(20 * value(tap.loss, student, teacher).item(), 2.1664711946, rtol=0, atol=1e-10)
    assert_close(20 * np.mean(terms(student, teacher, {})), 2.1664711946, rtol=0, atol=1e-10)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_agrees_with_the_equation(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], center: bool
) -> None:
    """Compare the second step, in which the mean is over two batches."""
    loss = declared(model(*ours), model(*theirs), center=center)
    before, teacher = features(5, 4, *theirs), features(9, 3, *theirs)
    student = features(1, 3, *ours)
    sizes = [x.shape[2:] for x in map(as_map, (s.numpy() for s in student))]
    others = [x.shape[2:] for x in map(as_map, (t.numpy() for t in teacher))]
    smaller = [(min(a[0], b[0]), min(a[1], b[1])) for a, b in zip(sizes, others, strict=True)]
    means: list[np.ndarray | None] = [None] * len(ours)
    if center:
        value(loss, features(3, 4, *ours), before)
        both = [[as_map(x.numpy()) for x in pair] for pair in zip(before, teacher, strict=True)]
        means = [
            reference.mean_of([resized(x, *size) for x in pair], 0.99)
            for pair, size in zip(both, smaller, strict=True)
        ]
    found, notes = loss(student, teacher, labels(3))
    expected = terms(student, teacher, weights(loss), means)
    assert_close(found.item(), float(np.mean(expected)))
    assert_close([notes[f"stage{k}"].item() for k in range(1, len(ours) + 1)], expected)
    loss.eval()  # keeps the mean constant
    maps.check_gradients(
        loss, student, teacher, lambda x, own: float(np.mean(terms(x, teacher, own, means)))
    )


@pytest.mark.parametrize(
    ("center", "channels", "learned"),
    [(False, 3, 0), (False, 5, 1), (True, 3, 1), (True, 5, 1)],
)
def test_different_widths_or_centring_need_a_connector(
    center: bool, channels: int, learned: int
) -> None:
    loss = declared(model((3, 4, 4)), model((channels, 4, 4)), center=center)
    assert [tuple(p.shape) for p in loss.parameters()] == [(channels, 3, 1, 1)] * learned


@pytest.mark.parametrize("center", [False, True])
def test_ignores_the_scale_of_both_sides(center: bool) -> None:
    shapes: tuple[Shape, ...] = ((3, 4, 4), (2, 2, 2))
    student, teacher = features(1, 3, *shapes), features(9, 3, *shapes)
    found, scaled = (
        value(
            declared(model(*shapes), model(*shapes), center=center),
            [ours * x for x in student],
            [theirs * x for x in teacher],
        )
        for ours, theirs in ((1.0, 1.0), (0.2, 30.0))
    )
    assert_close(scaled, found)


def test_the_same_map_on_all_faces_changes_nothing_if_centred() -> None:
    """Without centring, a student is rewarded for returning only that map."""
    common, teacher = 10 * normal(1, 1, 3, 4, 4), normal(2, 4, 3, 4, 4)
    blind = normal(3, 4, 3, 4, 4)
    sides = model((3, 4, 4)), model((3, 4, 4))
    centred, with_map = (
        value(declared(*sides), [blind], [teacher + extra]) for extra in (0 * common, common)
    )
    assert_close(with_map, centred)
    plain = declared(*sides, center=False)
    assert value(plain, [blind + common], [teacher + common]) < 0.1
    assert value(plain, [blind], [teacher]) > 0.8


def test_is_zero_at_equality_in_the_authors_form() -> None:
    shapes: tuple[Shape, ...] = ((3, 4, 4), (2, 2, 2))
    x = features(1, 3, *shapes)
    loss = declared(model(*shapes), model(*shapes), center=False)
    assert_close(value(loss, x, x), torch.zeros((), dtype=torch.float64))
    assert_close(value(loss, x, [-y for y in x]).item(), 2.0)


@pytest.mark.parametrize("center", [False, True])
def test_a_dead_stage_has_a_finite_gradient(center: bool) -> None:
    loss = declared(model((3, 4, 4)), model((3, 4, 4)), center=center).float()
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    found = value(loss, [student], [torch.rand(2, 3, 4, 4)])
    found.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_reads_no_value_in_forward(
    ours: tuple[Shape, ...], theirs: tuple[Shape, ...], center: bool
) -> None:
    maps.check_reads_no_value(declared(model(*ours), model(*theirs), center=center), ours, theirs)


def test_the_authors_form_conforms() -> None:
    check_method(FSKD, center=False)
    check_method(FSKD, center=False, teacher=partial(tiny_teacher, width=4))


def test_the_running_mean_is_in_the_state_dict() -> None:
    student, (images, targets) = TinyFaceNet().train(), tiny_batch()
    stages = ["layer3", "layer4"]
    with Distiller(
        student,
        tiny_teacher(),
        ["fskd"],
        student_stages=stages,
        teacher_stages=stages,
        input_shape=(3, 32, 32),
    ) as kd:
        student(images)
        kd(images, targets)
        state = kd.state_dict()
        assert kd.taps[0].described() == "fskd on layer3, layer4 <- layer3, layer4"
        assert kd.metrics.keys() == {"fskd", "fskd/stage1", "fskd/stage2"}
    for place in (0, 1):
        assert state[f"losses.fskd.means.{place}.average"].abs().sum() > 0


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (model(), model((3, 4, 4)), "fskd needs at least 1 of the student's stages; found 0"),
        (model((3, 4, 4)), model(), "fskd needs at least 1 of the teacher's stages; found 0"),
        (
            model((3, 4, 4), (3, 4, 4)),
            model((3, 4, 4)),
            "fskd compares stage by stage: .*found 2 of the student and 1 of the teacher",
        ),
        (model((12,)), model((3, 4, 4)), r"fskd: student stage 's0' must return a map"),
    ],
)
def test_stages_that_do_not_fit_are_refused(student: Model, teacher: Model, message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        FSKD().feature_tap(student, teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"center": 1}, "fskd: center must be true or false; found 1"),
        ({"weight": -1}, "fskd: weight must be at least 0; found -1"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        FSKD(**options)
