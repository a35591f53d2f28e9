"""CAKD has its invariances, detects constant features, and refuses contradictory options."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Model
from kdhooks.testing import TinyFaceNet, check_method, tiny_teacher
from kdhooks_plugins._cakd_options import PromptTokens
from kdhooks_plugins._local_features import LocalFeatures
from kdhooks_plugins._urfm import standardised
from kdhooks_plugins.cakd import CAKD
from kdhooks_plugins.saliency import saliency_map
from tests.cakd_losses import OPTIONS, SHAPES, SMALL, inputs, made, value
from tests.maps import Shape, features, labels, model, normal
from tests.references.fcd import embedding_distance
from tests.transformers import TinyViT

drawn = settings(deadline=None, max_examples=25)


# --- invariances and gradients ---------------------------------------------------------------


@pytest.mark.parametrize("attention", ["mse", "kl"])
@pytest.mark.parametrize("standardise", [True, False])
def test_equal_features_with_tied_projections_have_no_loss(
    attention: str, standardise: bool
) -> None:
    shape = (3, 4, 4)
    loss = made(shape, shape, matching={"attention": attention, "standardise": standardise})
    x = features(1, 3, shape)
    assert value(loss, x, x) > 0.01
    loss.theirs.load_state_dict(loss.ours.state_dict())
    _, notes = loss(x, x, labels(3))
    assert_close(notes["attention"].item(), 0.0)
    assert_close(notes["feature"].item(), 0.0)


def routes(loss: LocalFeatures) -> dict[str, bool]:
    """Return which inputs and parameters get a gradient."""
    ours, theirs = SHAPES[1]
    student, teacher = inputs(ours, theirs)
    x, y = student[0].requires_grad_(), teacher[0].requires_grad_()
    value(loss, [x], [y]).backward()
    groups: dict[str, list[Tensor]] = {
        "student": [x],
        "teacher": [y],
        "student's projection": list(loss.ours.parameters()),
        "teacher's projection": list(loss.theirs.parameters()),
        "urfm": list(loss.urfm.parameters()),
        "msa": list(loss.msa.parameters()),
    }
    return {
        name: bool(tensors) and all(p.grad is not None and bool(p.grad.any()) for p in tensors)
        for name, tensors in groups.items()
    }


@pytest.mark.parametrize(
    ("prompted", "teacher_side", "without"),
    [
        (True, "shared", set()),
        (False, "shared", {"teacher"}),
        (True, "fixed", {"teacher's projection"}),
        (False, "fixed", {"teacher", "teacher's projection"}),
    ],
)
def test_who_gets_a_gradient(prompted: bool, teacher_side: str, without: set[str]) -> None:
    loss = made(*SHAPES[1], matching={"teacher_side": teacher_side})
    loss.prompted = prompted
    found = routes(loss)
    assert {name for name, reached in found.items() if not reached} == without


@pytest.mark.parametrize("standardise", [False, True])
def test_scaling_a_projection_does_not_lower_the_loss(standardise: bool) -> None:
    """Otherwise both projections could shrink until all faces look alike."""
    student, teacher = inputs(*SHAPES[1])
    loss = made(*SHAPES[1], matching={"standardise": standardise})
    before = loss(student, teacher, labels(3))[1]["feature"]
    for factor in (0.05, 400.0):
        with torch.no_grad():
            loss.ours.project.weight.mul_(factor)
            loss.theirs.project.weight.mul_(factor)
        after = loss(student, teacher, labels(3))[1]["feature"]
        assert_close(after, before, rtol=0.1, atol=0)


def test_features_that_all_faces_share_change_nothing() -> None:
    student, teacher = inputs(*SHAPES[1])
    loss = made(*SHAPES[1])
    moved = [[x + 5 * torch.rand_like(x[:1]) for x in side] for side in (student, teacher)]
    found, _ = loss([moved[0][0]], [moved[1][0], *teacher[1:]], labels(3))
    assert_close(found, loss(student, teacher, labels(3))[0], rtol=1e-6, atol=1e-9)


@drawn
@given(st.integers(2, 5), st.floats(0.5, 20), st.floats(-3, 3), st.integers(0, 2**16))
def test_standardised_features_ignore_scale_and_shift(
    b: int, scale: float, shift: float, seed: int
) -> None:
    y = normal(seed, b, 2, 3) + 9 * torch.arange(b)[:, None, None]
    assert_close(standardised(scale * y + shift), standardised(y), rtol=1e-3, atol=1e-4)


@drawn
@given(st.integers(2, 4), st.sampled_from(range(len(SHAPES))), st.integers(0, 2**16))
def test_ignores_the_order_of_the_batch_and_the_labels(b: int, which: int, seed: int) -> None:
    loss = made(*SHAPES[which])
    student, teacher = inputs(*SHAPES[which], b=b)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    found = loss([student[0][order]], [teacher[0][order]], labels(b) - 1)[0]
    assert_close(found, value(loss, student, teacher))


def test_a_map_and_its_tokens_are_the_same() -> None:
    as_map, as_tokens = made((3, 3, 3), (3, 3, 3)), made((9, 3), (3, 3, 3))
    student, teacher = inputs((3, 3, 3), (3, 3, 3))
    flat = [student[0].flatten(2).mT]
    assert_close(value(as_tokens, flat, teacher), value(as_map, student, teacher))
    last = made((3, 3, 3), (3, 3, 9)), made((3, 3, 3), (9, 3, 3))
    wide = features(4, 3, (9, 3, 3))
    moved = [wide[0].permute(0, 2, 3, 1)]
    assert_close(value(last[0], student, moved), value(last[1], student, wide))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_students_gradient_keeps_its_memory_format(layout: torch.memory_format) -> None:
    """Otherwise the whole network's backward pass would continue in the other format."""
    student, teacher = inputs(*SHAPES[1])
    loss = made(*SHAPES[1])
    x = (student[0].to(memory_format=layout).requires_grad_() * 1).requires_grad_()
    strides: list[tuple[int, ...]] = []
    x.register_hook(lambda gradient: strides.append(gradient.stride()))
    value(loss, [x], teacher).backward()
    assert strides == [x.stride()]


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2)])
def test_dead_features_and_a_batch_of_one_have_finite_gradients(shape: Shape) -> None:
    loss = made(shape, shape)
    for b in (1, 2):
        x = torch.zeros(b, *shape, dtype=torch.float64, requires_grad=True)
        found = value(loss, [x], [torch.zeros(b, *shape, dtype=torch.float64)])
        found.backward()
        assert torch.isfinite(found)
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


def test_precisions_agree() -> None:
    student, teacher = inputs(*SHAPES[2])
    loss = made(*SHAPES[2])
    exact = value(loss, student, teacher)
    loss.float()
    single = value(loss, [student[0].float()], [teacher[0].float()])
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)


# --- the guard -------------------------------------------------------------------------------


def test_constant_features_are_refused_every_so_many_steps() -> None:
    loss = made(*SHAPES[1], collapse={"every": 3})
    student, teacher = inputs(*SHAPES[1])
    same = [teacher[0][:1].expand_as(teacher[0])]
    assert loss(student, same, labels(3))[1]["token_variance"] < 1e-10
    with torch.no_grad():
        loss.get_parameter("msa.0.out.weight").zero_()
    value(loss, student, same)
    with pytest.raises(KDHooksError, match=r"relative variance of \d\.\de.\d\d, below .* 1\.0e-05"):
        value(loss, student, same)
    value(loss, student, same)


def test_varied_features_single_images_and_evaluation_are_accepted() -> None:
    loss = made(*SHAPES[1], collapse={"every": 1})
    student, teacher = inputs(*SHAPES[1])
    value(loss, student, teacher)
    value(loss, [student[0][:1]], [teacher[0][:1]])
    same = [teacher[0][:1].expand_as(teacher[0])]
    loss.eval()
    value(loss, student, same)
    never = made(*SHAPES[1], collapse={"every": 0})
    value(never, student, same)


def test_the_threshold_is_an_option() -> None:
    student, teacher = inputs(*SHAPES[1])
    with pytest.raises(KDHooksError, match=r"below collapse.below = 1\.0e\+00"):
        value(made(*SHAPES[1], collapse={"every": 1, "below": 1.0}), student, teacher)


# --- the other terms -------------------------------------------------------------------------


def test_the_embedding_term_is_that_of_fcd() -> None:
    tap = CAKD(embedding_weight=2.0, weight=3.0).embedding_tap(model((2, 2, 2)), model((2, 2, 2)))
    assert tap is not None
    assert tap.weight == 3.0
    student, teacher = normal(1, 3, 4), normal(2, 3, 4)
    expected = 2.0 * embedding_distance(student.numpy(), teacher.numpy(), "l2")
    assert_close(tap.loss(student, teacher, labels(3)).item(), expected)
    assert CAKD().embedding_tap(model(), model()) is None


def test_a_schedule_of_the_weight_holds_for_every_term() -> None:
    method = CAKD(weight=lambda step: 0.5 * step, embedding_weight=4.0, **SMALL)
    distiller = Distiller(
        TinyFaceNet(),
        tiny_teacher(),
        [method],
        student_stages=["layer4"],
        teacher_stages=["layer4"],
        input_shape=(3, 32, 32),
    )
    distiller.set_extra_state(torch.tensor(3))
    weights = {tap.name: distiller.weight(tap) for tap in distiller.taps}
    assert weights == {"cakd": 1.5, "cakd_embedding": 1.5}


def salient(map_: Tensor | str) -> dict[str, Any]:
    return {"positions": {"distance": "saliency", "saliency": map_}}


# --- the whole method, and refusals ----------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        *OPTIONS[1:3],
        {"matching": {"teacher_side": "fixed"}},
        {"matching": {"teacher_side": "shared"}},
        {"matching": {"teacher_side": "shared", "share_msa": False}},
        {"embedding_weight": 1.0},
        {"prompts": {"number": 0}},
        {"collapse": {"every": 1}},
    ],
)
def test_conforms_between_networks_of_one_kind(options: dict[str, Any]) -> None:
    check_method(CAKD, **{**SMALL, **options})


def test_a_student_may_be_a_transformer() -> None:
    check_method(
        CAKD, student=TinyViT, student_stages=["blocks.2"], teacher_stages=["layer4"], **SMALL
    )


def test_a_convolutional_teacher_gets_no_prompts_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "kdhooks")
    teacher = tiny_teacher()
    distiller = Distiller(
        TinyFaceNet(),
        teacher,
        [CAKD()],
        student_stages=["layer4"],
        teacher_stages=["layer4"],
        input_shape=(3, 32, 32),
    )
    assert distiller.adapter is None
    assert (
        "cakd: the teacher gets no prompts, since it has no transformer blocks of a supported kind"
    ) in caplog.messages
    caplog.clear()
    assert CAKD(prompts=PromptTokens(number=0)).adapt_teacher(Model(teacher.module, 12)) is None
    assert not caplog.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"positions": {"distance": "nose"}},
            "cakd: positions.distance must be one of 'relative', 'saliency'; found 'nose'",
        ),
        (
            {"matching": {"attention": "l1"}},
            "cakd: matching.attention must be one of 'mse', 'kl'; found 'l1'",
        ),
        ({"urfm": {"centres": 1}}, r"cakd: urfm\.centres must be at least 2; found 1"),
        ({"urfm": {"heads": 0}}, r"cakd: urfm\.heads must be at least 1; found 0"),
        (
            {"urfm": {"width": 12}},
            r"cakd: urfm\.width must be a multiple of heads; found 12 and 8",
        ),
        ({"urfm": {"width": 0}}, r"cakd: urfm\.width must be at least 1; found 0"),
        ({"urfm": 16}, "cakd: urfm must be a table; found 16"),
        ({"urfm": {"depth": 2}}, "cakd: urfm has no option 'depth'; .* centres, width, heads"),
        ({"positions": {"gamma": -1.0}}, r"cakd: positions\.gamma must be at least 0; found -1\.0"),
        (
            {"matching": {"attention_weight": -1.0}},
            r"cakd: matching\.attention_weight must be at least 0",
        ),
        (
            {"matching": {"feature_weight": -1.0}},
            r"cakd: matching\.feature_weight must be at least 0",
        ),
        (
            {"matching": {"teacher_side": "own"}},
            r"cakd: matching\.teacher_side must be one of 'anchored', 'fixed', 'detached', "
            "'shared'; found 'own'",
        ),
        (
            {"matching": {"share_msa": False}},
            r"cakd: matching\.share_msa belongs to teacher_side 'shared'; found teacher_side 'anch",
        ),
        ({"embedding_weight": -1.0}, "cakd: embedding_weight must be at least 0"),
        ({"teacher_cls_weight": -1.0}, "cakd: teacher_cls_weight must be at least 0"),
        ({"prompts": {"number": -1}}, r"cakd: prompts\.number must be at least 0; found -1"),
        ({"collapse": {"every": -1}}, r"cakd: collapse\.every must be at least 0 steps; found -1"),
        ({"collapse": {"below": 1.1}}, r"cakd: collapse\.below must be .*at most 1; found 1\.1"),
        (
            {"positions": {"distance": "saliency"}},
            r"cakd: positions\.saliency must be set with .* 'saliency' and no map",
        ),
        (
            {"positions": {"saliency": torch.rand(2, 2)}},
            "only with it; found distance 'relative' and a map",
        ),
        (
            salient(torch.rand(2, 2, 2)),
            r"cakd: saliency must be a map \(h w\); found \(2, 2, 2\)",
        ),
        (
            salient(torch.ones(2, 2)),
            "cakd: saliency must be finite and differ between pixels; found 1.0 to 1.0",
        ),
        (salient(torch.tensor([[0.0, torch.nan]])), "cakd: saliency must be finite"),
        (salient("/nowhere.pt"), "there is no file '/nowhere.pt'"),
        (
            {"positions": {"pieces": (0.0, 1.0, 2.0)}},
            r"cakd: positions\.pieces\[0\] must be above 0; found 0\.0",
        ),
        (
            {"positions": {"pieces": (4.0, 3.0, 24.0)}},
            r"cakd: positions\.pieces must be .* alpha <= beta .*; found \(4\.0, 3\.0, 24\.0\)",
        ),
        ({"positions": {"pieces": (4.0, 12.0, 4.0)}}, "alpha < reach"),
        (
            {"positions": {"anchor": (56.0, 112.0)}},
            r"cakd: positions\.anchor\[1\] must be at least 0 and below 112 pixels; found 112\.0",
        ),
        (
            {"prompts": {"number": 2}, "matching": {"teacher_side": "detached"}},
            r"cakd: prompts would never be trained, .*; set teacher_cls_weight, or prompts = \{",
        ),
        (
            {"matching": {"teacher_side": "fixed", "anchor_weight": 0.5}},
            r"cakd: matching\.anchor_weight belongs to teacher_side 'anchored'; found .* 'fixed'",
        ),
        (
            {"matching": {"anchor_weight": 0}},
            r"cakd: matching\.anchor_weight must be above 0, .*; teacher_side = 'fixed'",
        ),
        (
            {"matching": {"attention_weight": 0, "feature_weight": 0}},
            "cakd: matching would not train the student: .* are all 0; set one of them",
        ),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        CAKD(**options)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (model(), model((2, 2, 2)), "the student's last stage; found no stages; name it as taps"),
        (model((2, 2, 2)), model(), "the teacher's last stage; .* it is no torch module"),
        (model((2, 2, 2)), Model(nn.Identity(), 4), "the teacher's last stage; .* name it as"),
        (model((8, 3)), model((2, 2, 2)), "student stage 's0': tokens must fill a square grid"),
        (model((2, 2, 2)), model((7,)), r"teacher stage 's0' must return a map \(k h w\)"),
    ],
)
def test_models_without_a_usable_stage_are_refused(
    student: Model, teacher: Model, message: str
) -> None:
    with pytest.raises(KDHooksError, match=message):
        CAKD(prompts=PromptTokens(number=0)).feature_tap(student, teacher)


def test_embeddings_of_different_widths_are_refused() -> None:
    with pytest.raises(KDHooksError, match=r"equally wide; found 4 and 6; .* add the method fcd"):
        CAKD(embedding_weight=1.0).embedding_tap(model(), Model(None, 6))


def test_a_saliency_map_needs_images() -> None:
    with pytest.raises(KDHooksError, match="needs at least one batch"):
        saliency_map(TinyFaceNet(), "layer4", [])
