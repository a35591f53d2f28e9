"""FitNet's distances and connectors agree with their equations, on maps, tokens and vectors."""

import re
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Model, Stage, Teacher, build
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins._hints import Connector, Distance
from kdhooks_plugins.fitnet import FitNet
from tests import maps
from tests.maps import Shape, features, labels, model, normal, seeded, weights
from tests.references import fitnet as reference
from tests.small_distiller import teacher_network

DISTANCES, CONNECTORS = get_args(Distance), get_args(Connector)
STAGES = ("layer1", "layer2", "layer3", "layer4")
# Outputs of student and teacher: maps of one size and of two, tokens, vectors, and one of each.
SHAPES: list[tuple[Shape, Shape]] = [
    ((3, 4, 4), (3, 4, 4)),
    ((3, 5, 5), (3, 2, 3)),
    ((4, 3), (3, 4, 4)),
    ((9, 3), (4, 3)),
    ((3,), (3,)),
    ((3,), (3, 2, 2)),
]


def declared(ours: Shape, theirs: Shape, **options: Any) -> nn.Module:
    """Return the loss between outputs of these shapes, in float64."""
    return seeded(FitNet(**options).feature_tap(model(ours), model(theirs)).loss)


def value(loss: nn.Module, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    result: Tensor = loss(student, teacher, labels(len(student[0])))[0]
    return result


def expected(
    student: Tensor | np.ndarray,
    teacher: Tensor,
    own: dict[str, np.ndarray],
    distance: str,
    connector: str,
    place: int = 0,
    **options: Any,
) -> float:
    start = f"pairs.{place}.connector."
    ours = {name.removeprefix(start): w for name, w in own.items() if name.startswith(start)}
    return reference.hint(
        reference.as_map(np.asarray(student)),
        reference.as_map(teacher.numpy()),
        distance,
        connector,
        ours,
        **options,
    )


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_agrees_with_the_equation(
    ours: Shape, theirs: Shape, distance: str, connector: str
) -> None:
    options: dict[str, Any] = {"temperature": 2.5} if distance == "kl" else {}
    more = {"hidden": 5} if connector == "mlp" else {}
    loss = declared(ours, theirs, distance=distance, connector=connector, **options, **more)
    [student], [teacher] = features(1, 3, ours), features(9, 3, theirs)

    def by_loop(x: Tensor | np.ndarray, own: dict[str, np.ndarray]) -> float:
        return expected(x, teacher, own, distance, connector, **options)

    found, notes = loss([student], [teacher], labels(3))
    assert_close(found.item(), by_loop(student, weights(loss)))
    assert_close(notes["pair1"], found.detach())
    maps.check_gradients(loss, [student], [teacher], lambda x, own: by_loop(x[0], own))


@pytest.mark.parametrize("connector", ["linear", "1x1", "mlp"])
def test_a_connector_joins_unequal_widths(connector: str) -> None:
    loss = declared((2, 4, 4), (5, 4, 4), connector=connector)
    [student], [teacher] = features(1, 3, (2, 4, 4)), features(9, 3, (5, 4, 4))
    found = value(loss, [student], [teacher])
    assert_close(found.item(), expected(student, teacher, weights(loss), "l2", connector))


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_normalised_features_have_a_root_mean_square_of_one(distance: str) -> None:
    loss = declared((3, 4, 4), (3, 4, 4), distance=distance, connector="none", normalise=True)
    [student], [teacher] = features(1, 3, (3, 4, 4)), features(9, 3, (3, 4, 4))
    found = value(loss, [student], [teacher])
    assert_close(found.item(), expected(student, teacher, {}, distance, "none", normalise=True))
    assert_close(value(loss, [7 * student], [0.1 * teacher]), found)
    if distance == "l2":
        cosine = declared((3, 4, 4), (3, 4, 4), distance="cosine", connector="none")
        assert_close(found, 2 * value(cosine, [student], [teacher]))


@pytest.mark.parametrize("distance", DISTANCES)
def test_center_subtracts_the_mean_over_all_images(distance: str) -> None:
    """The mean is over two different batches with weights 0.99 and 1, at the smaller size."""
    loss = declared((3, 2, 2), (3, 4, 4), distance=distance, connector="none", center=True)
    batches = [(normal(k, 3, 3, 2, 2), 5 + normal(9 + k, 3, 3, 4, 4)) for k in range(2)]
    first, second = (value(loss, [s], [t]) for s, t in batches)
    means = [reference.resized(t.numpy(), 2, 2).mean(axis=0) for _, t in batches]
    for found, (s, t), mean in zip(
        (first, second),
        batches,
        (means[0], (0.99 * means[0] + means[1]) / 1.99),
        strict=True,
    ):
        assert_close(found.item(), expected(s, t, {}, distance, "none", mean=mean))


def test_pairs_are_added() -> None:
    sides = model((3, 4, 4), (2, 2, 2)), model((4, 4, 4), (2, 2, 2))
    paths: dict[str, Any] = {"student": ["s0", "s1", "s1"], "teacher": ["s1", "s1", "s0"]}
    tap = FitNet(connector="linear", **paths).feature_tap(*sides)
    assert (tap.student, tap.teacher) == (("s0", "s1", "s1"), ("s1", "s1", "s0"))
    loss = seeded(tap.loss)
    x, y = features(1, 3, (3, 4, 4), (2, 2, 2)), features(9, 3, (4, 4, 4), (2, 2, 2))
    student, teacher = [x[0], x[1], x[1]], [y[1], y[1], y[0]]
    total, notes = loss(student, teacher, labels(3))
    terms = [
        expected(s, t, weights(loss), "l2", "linear", place)
        for place, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]
    assert_close([notes[f"pair{k}"].item() for k in (1, 2, 3)], terms)
    assert_close(total.item(), sum(terms))


def test_gives_the_golden_values() -> None:
    """The reference computed these values once, for maps of sines and cosines."""
    pair = [maps.STUDENT], [maps.TEACHER]
    golden = {"l2": 0.9161769334, "l1": 0.7719855400, "cosine": 0.9068651734, "kl": 0.0632097664}
    for distance, number in golden.items():
        loss = declared((3, 7, 7), (3, 7, 7), distance=distance, connector="none")
        assert_close(value(loss, *pair).item(), number, rtol=0, atol=6e-11)


@pytest.mark.parametrize("distance", DISTANCES)
def test_is_zero_at_equality(distance: str) -> None:
    loss = declared((3, 4, 4), (3, 4, 4), distance=distance, connector="none")
    x = normal(1, 2, 3, 4, 4)
    assert_close(value(loss, [x], [x]), torch.zeros((), dtype=torch.float64))
    assert value(loss, [x], [-x]) > 0.1


def test_the_softmax_of_kl_is_over_channels() -> None:
    """A number that is added to all channels of a pixel changes nothing."""
    loss = declared((3, 4, 4), (3, 4, 4), distance="kl", connector="none")
    x, y = normal(1, 2, 3, 4, 4), normal(2, 2, 3, 4, 4)
    assert_close(value(loss, [x + normal(3, 2, 1, 4, 4)], [y]), value(loss, [x], [y]))
    assert (value(loss, [x + normal(3, 1, 3, 1, 1)], [y]) - value(loss, [x], [y])).abs() > 0.01


def test_the_class_token_is_left_out() -> None:
    student = Model(None, 4, (Stage("s0", (5, 3), prefix=1),))
    loss = FitNet(connector="none").feature_tap(student, model((3, 2, 2))).loss.double()
    tokens, target = normal(1, 2, 5, 3), normal(2, 2, 3, 2, 2)
    other = tokens.clone()
    other[:, 0] += 1
    assert_close(value(loss, [tokens], [target]), value(loss, [other], [target]))
    as_map = tokens[:, 1:].transpose(1, 2).reshape(2, 3, 2, 2)
    assert_close(value(loss, [tokens], [target]), (as_map - target).square().mean())


@pytest.mark.parametrize(
    "options",
    [*({"distance": name} for name in DISTANCES), {"normalise": True}],
)
def test_dead_features_have_a_finite_gradient(options: dict[str, Any]) -> None:
    loss = declared((3, 4, 4), (3, 4, 4), connector="none", **options).float()
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value(loss, [student], [torch.rand(2, 3, 4, 4)]).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("connector", CONNECTORS)
def test_reads_no_value_in_forward(distance: str, connector: str) -> None:
    shapes: tuple[Shape, ...] = ((3, 4, 4),)
    loss = declared(*shapes, *shapes, distance=distance, connector=connector, center=True)
    maps.check_reads_no_value(loss, shapes, shapes)


@pytest.mark.parametrize(
    "options",
    [
        {"distance": "l1", "connector": "linear", "normalise": True},
        {"distance": "cosine", "center": True},
        {"distance": "kl", "connector": "mlp", "temperature": 4.0, "hidden": 3},
        {"student": ["layer2", "layer3.2", ""], "teacher": ["layer3", "layer3.0", ""]},
        {"student": "", "teacher": "layer4"},
    ],
)
def test_conforms_with_every_option(options: dict[str, Any]) -> None:
    check_method(partial(FitNet, **options))


@pytest.mark.parametrize("distance", DISTANCES)
def test_conforms_without_a_connector(distance: str) -> None:
    teacher = partial(tiny_teacher, width=4)
    check_method(FitNet, teacher=teacher, distance=distance, connector="none")


# --- tapped submodules -----------------------------------------------------------------------


def distil(frozen: Teacher | None = None, **more: Any) -> tuple[TinyFaceNet, Distiller]:
    student = TinyFaceNet().train()
    stages = {"student_stages": STAGES, "teacher_stages": STAGES} | more.pop("stages", {})
    methods = more.pop("methods", None) or [FitNet(**more)]
    kd = Distiller(student, frozen or tiny_teacher(), methods, input_shape=(3, 32, 32), **stages)
    return student, kd


def test_the_default_is_the_last_stage_of_both_sides() -> None:
    _, kd = distil()
    with kd:
        assert kd.taps[0].described() == "fitnet on layer4 <- layer4"


def test_any_submodule_is_tapped_without_stages() -> None:
    """The shapes of a convolution inside a stage and of a linear layer are probed."""
    paths: dict[str, Any] = {"student": ["layer2.0", "fc"], "teacher": ["layer3.0", "fc"]}
    student, kd = distil(**paths, stages={"student_stages": None, "teacher_stages": None})
    images, targets = tiny_batch()
    with kd:
        shapes = [tuple(p.shape[:2]) for p in kd.losses["fitnet"].parameters() if p.ndim == 4]
        assert shapes == [(18, 8), (12, 12)]
        student(images)
        kd(images, targets)["fitnet"].backward()
    assert student.fc.weight.grad is not None
    assert student.layer3[0].weight.grad is not None  # before fc
    assert kd.metrics.keys() == {"fitnet", "fitnet/pair1", "fitnet/pair2"}


def test_probing_leaves_no_trace_in_the_models() -> None:
    teacher = tiny_teacher()
    assert teacher.module is not None
    before = {name: x.clone() for name, x in teacher.module.state_dict().items()}
    student, kd = distil(teacher, student="layer2.0", teacher="layer3.0")
    kd.remove()
    assert_close(dict(teacher.module.state_dict()), before, rtol=0, atol=0)
    assert student.layer2[1].num_batches_tracked == 0
    assert not any(m._forward_hooks for net in (student, teacher.module) for m in net.modules())


def test_the_embedding_is_the_output() -> None:
    """As in TFace, this is the mean squared difference of the embeddings."""
    student, kd = distil(student="", teacher="", connector="none")
    images, targets = tiny_batch()
    with kd:
        assert kd.taps[0].described() == "fitnet on output <- output"
        embedding = student(images)
        found = kd(images, targets)["fitnet"]
        theirs = tiny_teacher().module(images)  # type: ignore[misc]
    assert_close(found, (embedding - theirs).square().mean())


@pytest.mark.parametrize("name", ["", "embedding"])
def test_a_teacher_that_is_a_function_teaches_by_its_embedding(name: str) -> None:
    network = teacher_network()
    student, kd = distil(
        Teacher(lambda images: network(images)),
        student=["", "layer4"],
        teacher=["", name],
        connector="linear",
        stages={"teacher_stages": None},
    )
    images, targets = tiny_batch()
    with kd:
        embedding = student(images)
        kd(images, targets)
        connector = kd.losses["fitnet"].get_submodule("pairs.0.connector")
        first = connector(embedding[:, :, None, None])[:, :, 0, 0]
        assert_close(kd.metrics["fitnet/pair1"], (first - network(images)).square().mean().detach())


def test_the_running_mean_is_in_the_state_dict() -> None:
    student, kd = distil(center=True)
    images, targets = tiny_batch()
    with kd:
        student(images)
        kd(images, targets)
        state = kd.state_dict()
    assert state["losses.fitnet.pairs.0.mean.average"].abs().sum() > 0


def test_two_entries_with_terms_of_their_own() -> None:
    student = TinyFaceNet().train()
    recipe = {
        "teacher": tiny_teacher().module,
        "input_shape": (3, 32, 32),
        "methods": [
            {"name": "fitnet", "student": "layer3", "teacher": "layer3", "weight": 2.0},
            {
                "name": "fitnet",
                "term": "embeddings",
                "student": "",
                "teacher": "",
                "distance": "cosine",
                "connector": "none",
            },
        ],
    }
    images, targets = tiny_batch()
    with build(recipe, student) as kd:
        student(images)
        assert list(kd(images, targets)) == ["fitnet", "embeddings"]


def test_two_entries_under_one_term_are_refused() -> None:
    with pytest.raises(
        KDHooksError, match="two terms are named 'fitnet'; give each of them a `term` of its own"
    ):
        distil(methods=[FitNet(), FitNet(distance="l1")])


def test_images_of_another_size_than_probed_are_refused_in_the_first_step() -> None:
    student, kd = distil(student="layer2.0", teacher="layer2.0")
    images, targets = tiny_batch()
    wide = torch.cat([images, images[..., :3]], dim=3)
    with kd:
        student.fc = nn.Linear(16 * 6, 12)  # so that the student runs
        student(wide)
        with pytest.raises(KDHooksError, match=r"'layer2\.0' returned \(8, 8, 9\) in training"):
            kd(wide, targets)


def test_a_batch_norm_of_one_number_is_refused_with_the_way_out() -> None:
    one, [vector] = declared((3,), (3,)), features(1, 1, (3,))
    with pytest.raises(KDHooksError, match=r"student output 's0': .* one pixel; set connector = '"):
        value(one, [vector], [vector])
    value(one.eval(), [vector], [vector])
    value(declared((3,), (3,), connector="linear"), [vector], [vector])
    wide = features(1, 1, (3, 2, 2))
    value(declared((3, 2, 2), (3, 2, 2)), wide, wide)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l3"}, "distance must be one of 'l2', 'l1', 'cosine', 'kl'; found 'l3'"),
        ({"connector": "3x3"}, "connector must be one of 'none', 'linear', '1x1', 'mlp'; found"),
        ({"temperature": 2.0}, "fitnet: temperature belongs to distance 'kl'; found 'l2'"),
        ({"temperature": 0.0, "distance": "kl"}, "temperature must be above 0; found 0.0"),
        (
            {"normalise": True, "distance": "kl"},
            "normalise belongs to the distances 'l2' and 'l1'; found 'kl'",
        ),
        ({"hidden": 3}, "fitnet: hidden belongs to connector 'mlp'; found '1x1'"),
        ({"student": 3}, "student must be a string or a list of strings; found 3"),
        ({"student": ["a", 3]}, r"fitnet: student\[1\] must be a string; found 3"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        FitNet(**options)


MAP: Shape = (3, 4, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (
            model(),
            model(MAP),
            {},
            "fitnet compares the last stage of both sides by default, and the student's stages "
            "are not known; name a submodule as student = \"…\", with '' for the output",
        ),
        (model(MAP), model(), {}, "the teacher's stages are not known; name .* as teacher = "),
        (
            model(MAP),
            model(MAP),
            {"student": ["s0", "s0"]},
            "student and teacher must name equally many submodules, which are compared pair by "
            "pair; found 2 and 1",
        ),
        (model(MAP), model(MAP), {"teacher": []}, "teacher must name at least one submodule"),
        (
            model(MAP),
            model((5, 4, 4)),
            {"connector": "none"},
            "fitnet: without a connector both sides must have equally many channels; found 3 in "
            "fitnet: student stage 's0' and 5 in fitnet: teacher stage 's0'; set connector = '1x1'",
        ),
        (
            model((12,)),
            model((5,)),
            {"connector": "none", "term": "mine"},
            "mine: without .* found 12 in mine: student output 's0' and 5 in",
        ),
        (
            model(MAP),
            model((1, 4, 4)),
            {"distance": "kl"},
            "fitnet: a softmax over one channel is 1 whatever the features are; found one channel "
            "in fitnet: teacher stage 's0'; set distance = 'l2'",
        ),
        (
            model((145, 8)),
            model(MAP),
            {},
            "fitnet: student stage 's0': tokens must fill a square grid; found 145 of them",
        ),
        (
            model((3, 4, 4, 4)),
            model(MAP),
            {},
            r"fitnet: student stage 's0' must return a map \(k h w\) or tokens \(n k\); found",
        ),
        (
            model(MAP),
            model(MAP),
            {"teacher": "layer3"},
            "fitnet: teacher has no submodule 'layer3': it is no torch module, and only its "
            "embedding is known; kdhooks.onnx.to_torch turns an ONNX file into one",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused(
    student: Model, teacher: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(KDHooksError, match=message):
        FitNet(**options).feature_tap(student, teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"student": "layr3"},
            "fitnet: student has no submodule 'layr3'; did you mean 'layer3'.*its children are: "
            "layer1, layer2, layer3, layer4, fc, features",
        ),
        ({"teacher": "layer9"}, "fitnet: teacher has no submodule 'layer9'; did you mean"),
        (
            {"student": "layer3[0]"},
            r"student tap 'layer3\[0\]' must name one of several outputs; found Tensor",
        ),
        ({"student": "layer3@0"}, "student tap 'layer3@0' must name a call by its number"),
        (
            {"term": "My Term"},
            "fitnet: term: a name must consist of lower case letters, .*; found 'My Term'",
        ),
        ({"term": "float"}, "fitnet: term: a name must not be that of an attribute .*'float_term'"),
    ],
)
def test_a_path_that_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=re.compile(message, re.DOTALL)):
        distil(**options)
