"""Both terms of EC-KD agree with their equations; the right filters are chosen, once per optimiser
step.
"""

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Model, ParameterTap
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins.eckd import ECKD, Hardness, convolutions, exclusivity
from tests import golden
from tests.maps import gradient, normal
from tests.maps import labels as any_labels
from tests.references import eckd as reference
from tests.references.differences import central_differences
from tests.references.fcd import linear

HARDNESS = get_args(Hardness)
drawn = settings(deadline=None, max_examples=40)
sizes = st.tuples(st.integers(2, 7), st.integers(1, 8), st.integers(0, 2**16))  # rows, d, seed

_i, _k = np.meshgrid(np.arange(4.0), np.arange(6.0), indexing="ij")
FILTERS = torch.from_numpy(np.sin(0.4 * _i + 0.9 * _k + 0.2))


class Student(nn.Module):
    """Has a layer of each kind that the choice of filters must distinguish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=True)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.block = nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3))
        self.single = nn.Conv2d(3, 1, 1)
        self.frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.fc = nn.Linear(4, 6)


def consistency(d: int = 6, e: int = 6, **options: object) -> nn.Module:
    """Return the loss, by default with a factor of 1 and without a regressor."""
    given_ = {"regressor": False, "consistency_weight": 1.0, **options}
    tap = ECKD(**given_).embedding_tap(Model(None, d), Model(None, e))  # type: ignore[arg-type]
    assert tap is not None
    return tap.loss.double()


def parameters(student: nn.Module, **options: object) -> ParameterTap:
    tap = ECKD(**options).parameter_tap(Model(student, 6))  # type: ignore[arg-type]  # as above
    assert tap is not None
    return tap


def overlap(**options: object) -> nn.Module:
    """Return the loss of one layer, with a factor of 1."""
    layer = nn.Sequential(nn.Conv2d(1, 2, 1))
    return parameters(layer, exclusivity_weight=1.0, **options).loss


# --- exclusivity -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mean_overlap": False}, 34.08160433),
        ({}, 11.36053478),
        ({"mean_overlap": False, "normalize_rows": True}, 10.27707652),
    ],
)
def test_exclusivity_has_the_golden_value(options: dict[str, bool], expected: float) -> None:
    value, notes = overlap(**options)([FILTERS])
    assert_close(value.item(), expected, rtol=0, atol=6e-9)
    assert_close(notes["0.weight"].item(), expected, rtol=0, atol=6e-9)
    by_loop = reference.exclusivity(FILTERS.numpy(), **options)
    assert_close(by_loop, expected, rtol=0, atol=6e-9)


def test_exclusivity_has_the_golden_gradient() -> None:
    filters = FILTERS.clone().requires_grad_()
    exclusivity(filters).backward()
    expected = [4.783126, 5.379001, 2.137651, 3.011718, -5.648382, -4.010463]
    assert_close(gradient(filters)[0].tolist(), expected, rtol=0, atol=6e-7)


@drawn
@given(sizes)
def test_the_fast_form_is_the_loop_over_pairs(size: tuple[int, int, int]) -> None:
    n, d, seed = size
    filters = normal(seed, n, d).requires_grad_()
    value = exclusivity(filters)
    value.backward()
    at = filters.detach().numpy()
    assert_close(value.item(), reference.exclusivity(at, mean_overlap=False))
    assert_close(gradient(filters).numpy(), reference.exclusivity_gradient(at))


@pytest.mark.parametrize("mean_overlap", [False, True])
@pytest.mark.parametrize("normalize_rows", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (4, 3, 1, 1), (3, 2, 3, 3), (5, 4, 1, 2)])
def test_all_options_agree_with_the_equation(
    shape: tuple[int, ...], normalize_rows: bool, mean_overlap: bool
) -> None:
    options = {"normalize_rows": normalize_rows, "mean_overlap": mean_overlap}
    weight = normal(sum(shape), *shape).requires_grad_()
    value, _ = overlap(**options)([weight])
    value.backward()

    def loss(x: np.ndarray) -> float:
        return reference.exclusivity(x.reshape(shape[0], -1), **options)

    at = weight.detach().numpy()
    assert_close(value.item(), loss(at))
    assert_close(gradient(weight).numpy(), central_differences(loss, at), rtol=1e-6, atol=1e-7)


def test_filters_that_share_no_position_have_no_loss() -> None:
    filters = torch.tensor([[0.3, -2.0, 0, 0], [0, 0, 0.7, 0], [0, 0, 0, 11.1]])
    assert exclusivity(filters) == 0
    assert exclusivity(torch.ones(3, 4)) > 0


def test_a_zero_weight_gets_no_gradient() -> None:
    filters = torch.tensor([[0.0, 1.0], [2.0, 3.0]], requires_grad=True)
    exclusivity(filters).backward()
    assert_close(gradient(filters), torch.tensor([[0.0, 6.0], [0.0, 2.0]]))


@drawn
@given(sizes, st.floats(0.1, 10))
def test_shrinking_the_weights_lowers_it_unless_rows_are_normalised(
    size: tuple[int, int, int], length: float
) -> None:
    n, d, seed = size
    filters = normal(seed, n, d)
    before, _ = overlap()([filters])
    assert_close(overlap()([length * filters])[0], length**2 * before)
    before, _ = overlap(normalize_rows=True)([filters])
    assert_close(overlap(normalize_rows=True)([length * filters])[0], before)


@drawn
@given(sizes)
def test_ignores_the_order_of_filters_and_positions_and_all_signs(
    size: tuple[int, int, int],
) -> None:
    n, d, seed = size
    filters, signs = normal(seed, n, d), normal(seed + 1, n, d).sign()
    mixed = signs * filters.flip(0, 1)
    assert_close(exclusivity(mixed), exclusivity(filters))
    assert exclusivity(filters) >= 0


def test_layers_add_up_and_are_logged_by_name() -> None:
    student = Student()
    tap = parameters(student, exclusivity_weight=0.1)
    weights = [dict(student.named_parameters())[name] for name in tap.parameters]
    value, notes = tap.loss(weights)
    assert tuple(notes) == tap.parameters
    assert not any(note.requires_grad for note in notes.values())
    expected = [reference.exclusivity(w.detach().double().flatten(1).numpy()) for w in weights]
    assert_close([note.item() for note in notes.values()], expected, rtol=1e-5, atol=1e-6)
    assert_close(value.item(), 0.1 * sum(expected), rtol=1e-5, atol=1e-6)


def test_half_precision_weights_are_summed_in_float32() -> None:
    weight = normal(1, 64, 512).half()
    value, _ = overlap(mean_overlap=False)([weight])
    assert value.dtype == torch.float32
    assert_close(value.double(), exclusivity(weight.double()), rtol=1e-5, atol=0)
    assert value > 65504  # beyond the range of float16


# --- which filters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["stem", "block.0", "block.2"]),
        ({"include_depthwise": True}, ["stem", "depthwise", "grouped", "block.0", "block.2"]),
        ({"include": ["block.*"]}, ["block.0", "block.2"]),
        ({"include": ["stem", "*.2"]}, ["stem", "block.2"]),
        ({"exclude": ["st?m"]}, ["block.0", "block.2"]),
        ({"include": ["block.*"], "exclude": ["*.0"]}, ["block.2"]),
    ],
)
def test_trained_convolutions_are_chosen(options: dict[str, object], expected: list[str]) -> None:
    assert parameters(Student(), **options).parameters == tuple(f"{x}.weight" for x in expected)


def test_a_weight_that_two_layers_share_counts_once() -> None:
    student = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    student[1].weight = student[0].weight
    assert convolutions(student) == ["0.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["layer9.*", "depthwise", "frozen", "fc"])
def test_a_pattern_that_matches_nothing_is_refused(option: str, pattern: str) -> None:
    match = rf"'{pattern.replace('*', '.*')}' matches none of the student's 3 .*stem, block\.0"
    with pytest.raises(KDHooksError, match=match):
        parameters(Student(), **{option: [pattern]})


def test_a_lone_pattern_must_be_in_a_list() -> None:
    with pytest.raises(KDHooksError, match=r"include must be a list.*write \['block\.\*'\]"):
        ECKD(include="block.*")


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(KDHooksError, match=r"leaves no convolution.*exclusivity_weight = 0"):
        parameters(Student(), exclude=["*"])


def test_a_student_without_convolutions_is_refused() -> None:
    with pytest.raises(KDHooksError, match=r"has no trained convolution.*exclusivity_weight = 0"):
        parameters(nn.Linear(3, 6))


# --- consistency -----------------------------------------------------------------------------


@pytest.mark.parametrize(("mean_one", "expected"), [(False, 7.43272531), (True, 2.22115308)])
def test_consistency_has_the_golden_value(mean_one: bool, expected: float) -> None:
    value, notes = consistency(mean_one=mean_one)(golden.S, golden.T, golden.Y)
    assert_close(value.item(), expected, rtol=0, atol=6e-9)
    assert_close(notes["squared_distance"].item(), golden.EMBEDDING_DISTANCE["l2"])


GRID = [*itertools.product(HARDNESS, [0.4, 2.0], [False, True], [False, True])]


@pytest.mark.parametrize(("hardness", "gamma", "mean_one", "unit_length"), GRID)
@pytest.mark.parametrize(("b", "d", "e"), [(1, 3, 3), (5, 4, 4), (4, 3, 5)])
def test_consistency_agrees_with_the_equation(
    b: int, d: int, e: int, hardness: str, gamma: float, mean_one: bool, unit_length: bool
) -> None:
    """The regressor is used if widths differ. The hardness is fixed, since it has no gradient."""
    student, teacher = normal(1, b, d).requires_grad_(), normal(2, b, e)
    module = consistency(
        d,
        e,
        hardness=hardness,
        gamma=gamma,
        mean_one=mean_one,
        unit_length=unit_length,
        regressor=d != e,
    )
    value, notes = module(student, teacher, any_labels(b))
    value.backward()
    at, there = student.detach().numpy(), teacher.numpy()
    matrix = next(module.parameters()).detach().numpy() if d != e else np.eye(d)
    distances = reference.gaps(linear(at, matrix), there, unit_length)
    omega = reference.weights(distances, hardness, gamma, mean_one)

    def loss(x: np.ndarray, w: np.ndarray) -> float:
        return reference.consistency(linear(x, w), there, omega, unit_length)

    assert_close(value.item(), loss(at, matrix))
    assert_close(notes["hardest"].item(), max(omega))
    by_student = central_differences(lambda x: loss(x, matrix), at)
    assert_close(gradient(student).numpy(), by_student, rtol=1e-6, atol=1e-7)
    for parameter in module.parameters():
        by_weight = central_differences(lambda w: loss(at, w), matrix)
        assert_close(gradient(parameter).numpy(), by_weight, rtol=1e-6, atol=1e-7)


@drawn
@given(sizes, st.sampled_from(HARDNESS), st.floats(0, 5))
def test_the_mean_of_hardness_is_one(
    size: tuple[int, int, int], hardness: str, gamma: float
) -> None:
    b, _, seed = size
    module = consistency(hardness=hardness, gamma=gamma)
    omega = module._omega(normal(seed, b).abs())  # type: ignore[operator]  # a method
    assert_close(omega.mean().item(), 1.0)


def test_hard_samples_weigh_more_and_by_the_same_factor_at_any_scale() -> None:
    module = consistency(mean_one=False)
    omega = module._omega(torch.tensor([0.0, 0.5, 1.5]))  # type: ignore[operator]  # a method
    assert_close(omega, torch.tensor([0.0, 0.5, 1.5]).exp())
    far, _ = consistency(unit_length=False)(1e3 * golden.S, golden.T, golden.Y)
    assert torch.isfinite(far)


@drawn
@given(sizes, st.sampled_from(HARDNESS), st.booleans())
def test_equal_embeddings_have_no_loss_and_no_gradient(
    size: tuple[int, int, int], hardness: str, mean_one: bool
) -> None:
    b, d, seed = size
    student = normal(seed, b, d).requires_grad_()
    module = consistency(d, d, hardness=hardness, mean_one=mean_one)
    value, _ = module(student, student.detach(), any_labels(b))
    value.backward()
    assert_close(value.item(), 0.0)
    assert_close(gradient(student), torch.zeros_like(student))


@drawn
@given(sizes, st.sampled_from(HARDNESS), st.floats(0.01, 100), st.floats(0.01, 100))
def test_ignores_batch_order_and_lengths(
    size: tuple[int, int, int], hardness: str, ours: float, theirs: float
) -> None:
    b, d, seed = size
    student, teacher = normal(seed, b, d), normal(seed + 1, b, d)
    module = consistency(d, d, hardness=hardness)
    expected, _ = module(student, teacher, any_labels(b))
    found, _ = module(ours * student.flip(0), theirs * teacher.flip(0), any_labels(b))
    assert_close(found, expected)


@drawn
@given(sizes, st.sampled_from(HARDNESS), st.booleans())
def test_precisions_agree(size: tuple[int, int, int], hardness: str, mean_one: bool) -> None:
    b, d, seed = size
    student, teacher = normal(seed, b, d), normal(seed + 1, b, d)
    module = consistency(d, d, hardness=hardness, mean_one=mean_one)
    exact, _ = module(student, teacher, any_labels(b))
    single, _ = module(student.float(), teacher.float(), any_labels(b))
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)
    ours, theirs = student.bfloat16(), teacher.bfloat16()
    rounded, _ = module(ours.double(), theirs.double(), any_labels(b))
    half, _ = module(ours.float(), theirs.float(), any_labels(b))
    assert_close(half.double(), rounded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regressor", [False, True])
def test_gradient_reaches_only_student_and_regressor(regressor: bool) -> None:
    module = consistency(regressor=regressor)
    student, teacher = golden.S.clone().requires_grad_(), golden.T.clone().requires_grad_()
    module(student, teacher, golden.Y)[0].backward()
    assert gradient(student).any()
    assert teacher.grad is None
    assert len(list(module.parameters())) == int(regressor)
    assert all(gradient(p).any() for p in module.parameters())


def test_only_the_regressor_has_state() -> None:
    first, second = consistency(4, 6, regressor=True), consistency(4, 6, regressor=True)
    assert list(first.state_dict()) == ["regressor.weight"]
    second.load_state_dict(first.state_dict())
    batch = (normal(1, 5, 4), normal(2, 5, 6), any_labels(5))
    assert torch.equal(first(*batch)[0], second(*batch)[0])


# --- the method ------------------------------------------------------------------------------


def distilled(**options: object) -> tuple[TinyFaceNet, Distiller]:
    torch.manual_seed(0)
    student = TinyFaceNet()
    made = Distiller(
        student, tiny_teacher(), [{"name": "eckd", **options}], input_shape=(3, 32, 32)
    )
    return student, made


@pytest.mark.parametrize(
    "options",
    [
        {"regressor": False},
        {"hardness": "linear", "gamma": 3.0, "mean_one": False, "unit_length": False},
        {"include": ["layer[34].*"], "normalize_rows": True, "mean_overlap": False},
        {"exclusivity_weight": 0.0},
        {"consistency_weight": 0.0},
    ],
)
def test_conforms_with_other_options(options: dict[str, object]) -> None:
    check_method(lambda weight=1.0: ECKD(weight=weight, **options))  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, ["eckd", "eckd_exclusivity"]),
        ({"exclusivity_weight": 0.0}, ["eckd"]),
        ({"consistency_weight": 0.0}, ["eckd_exclusivity"]),
    ],
)
def test_either_term_can_stand_alone(options: dict[str, object], terms: list[str]) -> None:
    student, made = distilled(**options)
    images, labels = tiny_batch()
    student(images)
    assert list(made(images, labels)) == terms


def test_the_weight_scales_both_terms_and_each_factor_scales_one() -> None:
    images, labels = tiny_batch()
    terms: list[dict[str, Tensor]] = []
    for options in (
        {},
        {"weight": 2.0},
        {"consistency_weight": 48.0},
        {"exclusivity_weight": 1e-3},
    ):
        student, made = distilled(**options)
        student(images)
        terms.append(made(images, labels))
    plain, doubled, consistent, exclusive = terms
    for name in ("eckd", "eckd_exclusivity"):
        assert_close(doubled[name], 2 * plain[name])
    assert_close(consistent["eckd"], 3 * plain["eckd"])
    assert_close(exclusive["eckd_exclusivity"], 4 * plain["eckd_exclusivity"])
    assert_close(consistent["eckd_exclusivity"], plain["eckd_exclusivity"])


@pytest.mark.parametrize("forwards", [1, 2, 5])
def test_exclusivity_counts_once_per_optimiser_step(forwards: int) -> None:
    """Some hosts accumulate the gradients of several forwards."""
    student, made = distilled(consistency_weight=0.0)
    made.accumulation = forwards
    images, labels = tiny_batch()
    for _ in range(forwards):
        student(images)
        made(images, labels)["eckd_exclusivity"].backward()
    weight = student.get_parameter("layer2.0.weight")
    expected = reference.exclusivity_gradient(weight.detach().double().flatten(1).numpy())
    found = gradient(weight).flatten(1).double().numpy()
    assert_close(found, 2.5e-4 / (len(weight) - 1) * expected, rtol=1e-4, atol=1e-8)


def test_the_default_pulls_about_as_much_as_weight_decay() -> None:
    weight = 0.1 * normal(5, 256, 256, 1, 1)
    weight.requires_grad_()
    tap = parameters(nn.Sequential(nn.Conv2d(1, 2, 1)))
    tap.loss([weight])[0].backward()
    ratio = gradient(weight).norm() / (5e-4 * weight.detach().norm())
    assert 0.6 < ratio < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardness": "cubic"}, "eckd: hardness must be one of 'none', .*; found 'cubic'"),
        ({"gamma": -1.0}, "eckd: gamma must be at least 0; found -1"),
        ({"consistency_weight": -1.0}, "eckd: consistency_weight must be at least 0; found -1"),
        ({"exclusivity_weight": -0.5}, "eckd: exclusivity_weight must be at least 0; found -0.5"),
        (
            {"consistency_weight": 0.0, "exclusivity_weight": 0.0},
            "consistency_weight or exclusivity_weight must be above 0; found 0 twice",
        ),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        ECKD(**options)  # type: ignore[arg-type]  # that is the point


def test_other_widths_need_the_regressor() -> None:
    with pytest.raises(KDHooksError, match="equally wide; found 4 and 6; set regressor = true"):
        consistency(4, 6)
