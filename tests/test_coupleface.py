"""CoupleFace on one process: mining, hinge, bank and warm-up; test_shards.py has two ranks."""

import itertools
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError, Model, Schedule, Scheduled
from kdhooks.classes.rows import Rows
from kdhooks_plugins.coupleface import CoupleFace, MutualRelations
from kdhooks_plugins.neighbours import mine_into
from tests import golden
from tests.maps import gradient, normal
from tests.references import coupleface as reference
from tests.references.differences import central_differences
from tests.references.fcd import embedding_distance, linear, unit

drawn = settings(deadline=None, max_examples=40)
sizes = st.tuples(
    st.integers(1, 6), st.integers(2, 7), st.integers(2, 8), st.integers(0, 2**16)
)  # b, c, d, seed
RELATIONS = ["static", "bank"]


def declared(rows: Tensor, d: int | None = None, **options: Any) -> MutualRelations:
    method = CoupleFace(**{"k": 2, **options})
    teacher = Model(None, rows.shape[1], classifier=Rows.open(rows))
    student = Model(None, d if d is not None else rows.shape[1])
    loss = method.embedding_tap(student, teacher).loss
    assert isinstance(loss, MutualRelations)
    return loss


def made(prototypes: Tensor, d: int | None = None, **options: Any) -> MutualRelations:
    """Return the loss in float64, with the exact rows in place of those read as float32."""
    loss = declared(prototypes, d, **options).double()
    if loss.bank_momentum is None:
        loss.prototypes.copy_(nn.functional.normalize(prototypes))
    return loss


def expected_of(loss: MutualRelations, prototypes: Tensor) -> reference.CoupleFace:
    return reference.CoupleFace(
        prototypes.numpy(),
        loss.neighbours.tolist(),
        loss.alpha.now,
        loss.q.now,
        loss.two_sided,
        loss.bank_momentum,
    )


def labels_of(seed: int, b: int, c: int, lowest: int = 0) -> Tensor:
    return torch.randint(lowest, c, (b,), generator=torch.Generator().manual_seed(seed))


# --- golden values ---------------------------------------------------------------------------


def test_mines_the_golden_neighbours() -> None:
    assert reference.neighbours(golden.W.numpy(), 2) == golden.COUPLEFACE_NEIGHBOURS
    assert declared(golden.W).neighbours.tolist() == golden.COUPLEFACE_NEIGHBOURS


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(
    ("options", "rad"),
    [
        ({"q": 0.0}, golden.COUPLEFACE_RAD[0.0]),
        ({"q": 0.03}, golden.COUPLEFACE_RAD[0.03]),
        ({}, golden.COUPLEFACE_RAD[0.03]),
        ({"two_sided": True}, golden.COUPLEFACE_TWO_SIDED),
    ],
)
def test_gives_the_golden_value(options: dict[str, Any], rad: float, alpha: float) -> None:
    value, notes = made(golden.W, alpha=alpha, **options)(golden.S, golden.T, golden.Y)
    fcd = golden.EMBEDDING_DISTANCE["l2"]
    assert_close(notes["rad"].item(), rad, rtol=0, atol=6e-9)
    assert_close(notes["fcd"].item(), fcd, rtol=0, atol=6e-9)
    assert_close(value.item(), fcd + alpha * rad, rtol=0, atol=2e-8)


# --- mining ----------------------------------------------------------------------------------


def test_k_is_cut_to_the_other_classes_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kdhooks"):
        loss = declared(golden.W, k=100)
    assert loss.neighbours.shape == (5, 4)
    assert "k = 100, but there are only 4 other classes" in caplog.text


def test_logs_how_many_classes_have_skipped_neighbours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "kdhooks"):
        loss = declared(golden.W, max_neighbour_sim=0.5)
    assert loss.neighbours.tolist() == reference.neighbours(golden.W.numpy(), 2, 0.5)
    unit = torch.nn.functional.normalize(golden.W)
    close = int(((unit @ unit.T).fill_diagonal_(-1) > 0.5).any(dim=1).sum())
    assert 0 < close < len(unit)
    assert f"{close} classes have others above max_neighbour_sim" in caplog.text


def test_neighbours_mined_ahead_are_those_mined_at_the_start(tmp_path: Path) -> None:
    rows = Rows.open(golden.W)
    mine_into(tmp_path, rows, 3, 0.5)
    ahead = declared(golden.W, k=2, max_neighbour_sim=0.5, neighbours=tmp_path)
    assert (
        ahead.neighbours.tolist() == declared(golden.W, max_neighbour_sim=0.5).neighbours.tolist()
    )


def test_neighbours_of_other_prototypes_are_refused(tmp_path: Path) -> None:
    mine_into(tmp_path, Rows.open(golden.W.flip(0)), 2)
    with pytest.raises(
        KDHooksError, match="was created from other rows than these; name another folder"
    ):
        declared(golden.W, neighbours=tmp_path)


# --- the equation ----------------------------------------------------------------------------


@pytest.mark.parametrize("max_sim", [None, 0.2])
@pytest.mark.parametrize("lowest", [0, -1])
@pytest.mark.parametrize(
    ("two_sided", "q"), [(False, 0.03), (False, -0.2), (False, 0.0), (True, 0)]
)
@pytest.mark.parametrize(("b", "c", "d", "k"), [(1, 3, 2, 1), (5, 6, 4, 3), (8, 4, 5, 3)])
def test_static_relations_agree_with_the_equation(
    b: int,
    c: int,
    d: int,
    k: int,
    two_sided: bool,
    q: float,
    lowest: int,
    max_sim: float | None,
) -> None:
    prototypes, teacher, labels = normal(4, c, d), normal(2, b, d), labels_of(b, b, c, lowest)
    student = normal(1, b, d).requires_grad_()
    loss = made(prototypes, k=k, q=q, two_sided=two_sided, alpha=0.7, max_neighbour_sim=max_sim)
    value, notes = loss(student, teacher, labels)
    value.backward()
    expected = expected_of(loss, prototypes)
    theirs, at = (teacher.numpy(), labels.numpy()), student.detach().numpy()
    rad, active = expected.rad(at, *theirs)
    assert_close(value.item(), expected.loss(at, *theirs))
    assert_close(notes["rad"].item(), rad)
    assert_close(notes["active"].item(), active, rtol=1e-6, atol=0)  # a float32 share
    by_difference = central_differences(lambda x: expected.loss(x, *theirs), at)
    assert_close(gradient(student).numpy(), by_difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.7, Schedule(value=1.0, warmup=3)])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_bank_relations_agree_with_the_equation_step_by_step(
    momentum: float, two_sided: bool, alpha: Scheduled
) -> None:
    """Some classes appear late or twice in a batch, and some samples have no label."""
    c, d = 6, 4
    prototypes = normal(9, c, d)
    loss = made(
        prototypes,
        k=3,
        relations="bank",
        bank_momentum=momentum,
        two_sided=two_sided,
        alpha=alpha,
    )
    expected = expected_of(loss, prototypes)
    batches = [[0, 0, 1], [2, -1, 2], [0, 3, 0], [5, 5, 5], [-1, -1, -1], [1, 4, 2], [0, 1, 5]]
    for step, drawn_labels in enumerate(batches):
        labels = torch.tensor(drawn_labels)
        loss.alpha.move(step, None)
        expected.alpha = min(1.0, step / 3) if isinstance(alpha, Schedule) else 0.7
        student, teacher = normal(step, 3, d).requires_grad_(), normal(50 + step, 3, d)
        value, notes = loss(student, teacher, labels)
        value.backward()
        at, sides = student.detach().numpy(), {"teacher": teacher.numpy(), "labels": labels.numpy()}
        assert_close(value.item(), expected.loss(at, **sides))
        assert_close(notes["rad"].item(), expected.rad(at, **sides)[0])
        by_difference = central_differences(partial(expected.loss, **sides), at)
        assert_close(gradient(student).numpy(), by_difference, rtol=1e-6, atol=1e-8)
        expected.advance(at, **sides)
        for bank, rows in (
            (loss.student_bank, expected.student_bank),
            (loss.teacher_bank, expected.teacher_bank),
        ):
            by_loop = np.array([rows.get(k, [0.0] * d) for k in range(c)])
            assert_close(bank.numpy(), by_loop)


def test_a_bank_without_momentum_holds_the_latest_embedding() -> None:
    loss = made(golden.W, relations="bank")
    loss(golden.S, golden.T, golden.Y)
    loss(golden.S2[:1], golden.T[1:2], torch.tensor([1]))
    assert_close(loss.student_bank[1].tolist(), unit(golden.S2.numpy()[0]))
    assert_close(loss.teacher_bank[1].tolist(), unit(golden.T.numpy()[1]))
    assert_close(loss.student_bank[2].tolist(), unit(golden.S.numpy()[3]))
    assert not loss.student_bank[3:].any()


def test_an_empty_bank_leaves_only_feature_consistency() -> None:
    student = golden.S.clone().requires_grad_()
    value, notes = made(golden.W, relations="bank")(student, golden.T, golden.Y)
    value.backward()
    assert notes["rad"] == 0
    assert notes["active"] == 0
    assert_close(value.item(), embedding_distance(golden.S.numpy(), golden.T.numpy(), "l2"))


def test_a_warm_up_scales_alpha_but_not_the_logged_term() -> None:
    loss = made(golden.W, alpha=Schedule(value=2.0, warmup=4))
    for step in range(6):
        loss.alpha.move(step, None)
        value, notes = loss(golden.S, golden.T, golden.Y)
        assert_close(notes["rad"].item(), golden.COUPLEFACE_RAD[0.03], rtol=0, atol=6e-9)
        ramped = 2.0 * min(1.0, step / 4) * notes["rad"]
        assert_close(value, notes["fcd"] + ramped)


def test_evaluation_is_no_step_and_leaves_the_bank() -> None:
    loss = made(golden.W, relations="bank", bank_momentum=0.5)
    loss(golden.S, golden.T, golden.Y)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss.eval()(golden.T, golden.S, golden.Y)
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("relations", RELATIONS)
@pytest.mark.parametrize(("d", "e"), [(3, 6), (6, 6), (8, 6)])
def test_the_projector_is_linear_and_trained(d: int, e: int, relations: str) -> None:
    loss = made(golden.W, d, projector=True, relations=relations)
    student = normal(1, 4, d)
    loss(student, golden.T, golden.Y)  # so that a bank has rows
    [projector] = loss.parameters()
    assert projector.shape == (e, d)
    student.requires_grad_()
    matrix, at = projector.detach().numpy(), student.detach().numpy()
    expected = expected_of(loss, golden.W)
    theirs = golden.T.numpy(), golden.Y.numpy()
    expected.advance(linear(at, matrix), *theirs)
    value, _ = loss(student, golden.T, golden.Y)
    value.backward()
    assert_close(value.item(), expected.loss(linear(at, matrix), *theirs))
    by_student = central_differences(lambda x: expected.loss(linear(x, matrix), *theirs), at)
    by_weight = central_differences(lambda x: expected.loss(linear(at, x), *theirs), matrix)
    assert_close(gradient(student).numpy(), by_student, rtol=1e-6, atol=1e-8)
    assert_close(gradient(projector).numpy(), by_weight, rtol=1e-6, atol=1e-8)


# --- special cases ---------------------------------------------------------------------------


@pytest.mark.parametrize("two_sided", [False, True])
def test_equal_embeddings_without_slack_have_no_loss(two_sided: bool) -> None:
    student = golden.T.clone().requires_grad_()
    loss = made(golden.W, q=0.0, two_sided=two_sided)
    value, notes = loss(student, golden.T, golden.Y)
    value.backward()
    assert notes["rad"] == 0
    assert value == 0
    assert_close(gradient(student), torch.zeros_like(student))


def test_equal_embeddings_in_a_bank_have_no_loss() -> None:
    loss = made(golden.W, q=0.0, relations="bank")
    for _ in range(3):
        student = golden.T.clone().requires_grad_()
        value, _ = loss(student, golden.T, golden.Y)
        value.backward()
        assert value == 0
        assert_close(gradient(student), torch.zeros_like(student))


@pytest.mark.parametrize("q", [-0.1, 0.0, 0.03])
def test_a_relation_below_the_teachers_gets_no_gradient(q: float) -> None:
    """The student points away from every neighbour, so R_s is below R_t - q and rad is 0."""
    prototypes = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]], dtype=torch.float64)
    student = torch.tensor([[-0.7, -0.7]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    value, notes = made(prototypes, q=q, alpha=1e6)(student, teacher, torch.tensor([0]))
    value.backward()
    assert notes["rad"] == 0
    assert notes["active"] == 0
    alone = student.detach().requires_grad_()
    (nn.functional.normalize(alone) - nn.functional.normalize(teacher)).square().sum().backward()
    assert_close(gradient(student), gradient(alone))


def test_a_relation_above_the_teachers_is_pushed_down() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    student = torch.tensor([[0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    _, notes = made(prototypes, k=1)(student, teacher, torch.tensor([0]))
    notes["rad"].backward()
    assert_close(notes["rad"].item(), 0.8 + 0.03)
    assert gradient(student)[0, 1] > 0


# --- properties ------------------------------------------------------------------------------


@drawn
@given(sizes, st.sampled_from(RELATIONS), st.floats(0.01, 100), st.floats(0.01, 100))
def test_ignores_the_lengths_of_embeddings(
    size: tuple[int, int, int, int], relations: str, ours: float, theirs: float
) -> None:
    b, c, d, seed = size
    student, teacher, rows = normal(seed, b, d), normal(seed + 1, b, d), normal(seed + 2, c, d)
    labels = labels_of(seed, b, c, -1)
    plain, scaled = made(rows, k=1, relations=relations), made(rows, k=1, relations=relations)
    for _ in range(2):
        expected, _ = plain(student, teacher, labels)
        found, _ = scaled(ours * student, theirs * teacher, labels)
        assert_close(found, expected)
    for key, value in plain.state_dict().items():
        assert_close(scaled.state_dict()[key], value)


@drawn
@given(sizes, st.sampled_from(RELATIONS))
def test_ignores_batch_order(size: tuple[int, int, int, int], relations: str) -> None:
    b, c, d, seed = size
    student, teacher, rows = normal(seed, b, d), normal(seed + 1, b, d), normal(seed + 2, c, d)
    labels = labels_of(seed, b, c, -1)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    plain, mixed = made(rows, k=1, relations=relations), made(rows, k=1, relations=relations)
    for _ in range(2):
        expected, _ = plain(student, teacher, labels)
        found, _ = mixed(student[order], teacher[order], labels[order])
        assert_close(found, expected)
    for key, value in plain.state_dict().items():
        assert_close(mixed.state_dict()[key], value)


@drawn
@given(sizes, st.floats(-0.5, 0.5), st.floats(0, 0.5))
def test_rad_grows_with_q_but_no_faster(
    size: tuple[int, int, int, int], q: float, more: float
) -> None:
    b, c, d, seed = size
    student, teacher, rows = normal(seed, b, d), normal(seed + 1, b, d), normal(seed + 2, c, d)
    labels = labels_of(seed, b, c)
    low, high = (
        made(rows, k=1, q=slack)(student, teacher, labels)[1]["rad"].item()
        for slack in (q, q + more)
    )
    assert -1e-12 <= high - low <= more + 1e-12


@drawn
@given(sizes, st.sampled_from(RELATIONS), st.booleans())
def test_precisions_agree(size: tuple[int, int, int, int], relations: str, two_sided: bool) -> None:
    b, c, d, seed = size
    student, teacher, rows = normal(seed, b, d), normal(seed + 1, b, d), normal(seed + 2, c, d)
    labels = labels_of(seed, b, c, -1)
    options: dict[str, Any] = {"k": c - 1, "relations": relations, "two_sided": two_sided}

    def second_step(dtype: torch.dtype, x: Tensor, y: Tensor) -> Tensor:
        loss = made(rows, **options).to(dtype)
        loss(x.to(dtype), y.to(dtype), labels)
        value: Tensor = loss(x.to(dtype), y.to(dtype), labels)[0]
        assert value.dtype == dtype
        return value.double()

    for x, y in ((student, teacher), (student.bfloat16(), teacher.bfloat16())):
        exact, single = second_step(torch.float64, x, y), second_step(torch.float32, x, y)
        assert_close(single, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("relations", "projector"), list(itertools.product(RELATIONS, [False, True]))
)
def test_gradient_reaches_only_student_and_projector(relations: str, projector: bool) -> None:
    loss = made(golden.W, relations=relations, projector=projector)
    for _ in range(2):
        student, teacher = golden.S.clone().requires_grad_(), golden.T.clone().requires_grad_()
        loss.zero_grad()
        value, _ = loss(student, teacher, golden.Y)
        value.backward()
        assert gradient(student).any()
        assert teacher.grad is None
        assert all(gradient(p).any() for p in loss.parameters())
    assert len(list(loss.parameters())) == int(projector)
    for buffer in loss.buffers():
        assert not buffer.requires_grad
        assert buffer.grad is None


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_resumes_bit_by_bit_from_its_state_dict(momentum: float, tmp_path: Path) -> None:
    def fresh() -> MutualRelations:
        return declared(golden.W, relations="bank", bank_momentum=momentum, projector=True)

    def step(loss: MutualRelations, seed: int) -> Tensor:
        batch = normal(seed, 4, 6).float(), normal(seed + 9, 4, 6).float()
        value: Tensor = loss(*batch, labels_of(seed, 4, 5, -1))[0]
        return value

    straight, resumed = fresh(), fresh()
    for seed in range(3):
        step(straight, seed)
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert {"met", "student_bank", "teacher_bank"} < set(straight.state_dict())
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
    for seed in range(3, 8):
        assert torch.equal(step(straight, seed), step(resumed, seed))
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


def test_prototypes_may_come_from_a_file(tmp_path: Path) -> None:
    torch.save(3 * golden.W, tmp_path / "means.pt")
    method = CoupleFace(k=2, prototypes=tmp_path / "means.pt")
    loss = method.embedding_tap(Model(None, 6), Model(None, 6)).loss
    assert isinstance(loss, MutualRelations)
    assert_close(loss.prototypes, declared(golden.W).prototypes)
    assert_close(loss.prototypes.norm(dim=1), torch.ones(5))


def test_given_prototypes_override_the_teachers_classifier() -> None:
    loss = declared(golden.W, prototypes=golden.W2)
    assert_close(loss.prototypes, nn.functional.normalize(golden.W2).float())


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relations": "queue"}, "relations must be one of 'static', 'bank'; found 'queue'"),
        ({"k": 0}, "k must be at least 1; found 0"),
        ({"bank_momentum": 1.0}, r"bank_momentum must be at least 0 and below 1; found 1\.0"),
        ({"bank_momentum": -0.1}, r"bank_momentum must be at least 0 and below 1; found -0\.1"),
        ({"bank_momentum": 0.9}, "bank_momentum belongs to relations 'bank'; found 'static'"),
        ({"alpha": -1.0}, r"alpha must be at least 0; found -1\.0"),
        (
            {"max_neighbour_sim": -1.0},
            r"max_neighbour_sim must be above -1 and at most 1; found -1",
        ),
        ({"max_neighbour_sim": -0.99}, r"no class has a neighbour below .* = -0\.99"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=f"coupleface: {message}"):
        declared(golden.W, **options)


def test_other_widths_need_a_projector() -> None:
    with pytest.raises(KDHooksError, match="equally wide; found 4 and 6; set projector = true"):
        declared(golden.W, 4)


def test_prototypes_must_come_from_somewhere() -> None:
    with pytest.raises(
        KDHooksError, match=r"coupleface needs a prototype per class; .*class_means"
    ):
        CoupleFace().embedding_tap(Model(None, 6), Model(None, 6))


def test_prototypes_must_be_as_wide_as_the_teachers_embedding() -> None:
    with pytest.raises(KDHooksError, match="as wide as the teacher's embedding; found 3 and 6"):
        declared(golden.W, prototypes=torch.ones(5, 3))


def test_one_class_has_no_relations() -> None:
    with pytest.raises(KDHooksError, match="at least two classes; found 1"):
        declared(golden.W[:1])
