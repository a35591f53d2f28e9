"""ICD-Face's distributions and banks agree with the equations, and two ranks with one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError, Model
from kdhooks.classes.per_class import whole_tables
from kdhooks.classes.rows import Rows
from kdhooks.testing import check_method
from kdhooks_plugins.icdface import ICDFace, SimilarityDistributions, log_histogram, places
from tests import golden
from tests.maps import gradient, normal
from tests.ranks import Results, mean_gradients, mine, on_two_ranks
from tests.references import icdface as reference
from tests.references.differences import central_differences
from tests.references.fcd import embedding_distance, linear, unit

drawn = settings(deadline=None, max_examples=30)
BATCHES = [[0, 0, 1], [2, -1, 2], [0, 3, 0], [0, 0, 0], [-1, -1, -1], [1, 3, 2], [0, 1, 2]]


def made(classes: int = 4, d: int = 4, e: int = 4, **options: Any) -> SimilarityDistributions:
    teacher = Model(None, e, classifier=Rows.open(torch.ones(classes, e)))
    loss = ICDFace(**options).embedding_tap(Model(None, d), teacher).loss
    assert isinstance(loss, SimilarityDistributions)
    return loss.double()


def expected_of(loss: SimilarityDistributions) -> reference.ICDFace:
    return reference.ICDFace(
        loss.alpha.now, loss.slots, loss.valid_steps, loss.gamma, len(loss.nodes)
    )


def labels_of(seed: int, b: int, c: int, lowest: int = -1) -> Tensor:
    return torch.randint(lowest, c, (b,), generator=torch.Generator().manual_seed(seed))


# --- histograms ------------------------------------------------------------------------------


# Tencent/TFace, commit 171ec1434aca0972e111663ac646c9c1e3e44b5b, recognition/torchkit/loss/ddl.py,
# with torch 2.13.0 on the CPU, g = torch.Generator().manual_seed(0), dtype=torch.float64:
#   loss = DDL(); loss.t = torch.arange(0, 1.0, 0.001, dtype=torch.float64)[None]
#   p, q = torch.rand(20, generator=g), 0.8 * torch.rand(20, generator=g)
#   p, q = loss._histogram(p), loss._histogram(q)
#   print(p[0, [0, 250, 500, 999]], (p * (p / q).log()).sum())
DDL_SHARES = [0.000114640841, 0.001100534502, 0.001459271866, 0.000400183980]
DDL_DIVERGENCE = 0.228203437048


def test_a_histogram_is_that_of_distribution_distillation() -> None:
    """Its nodes differ from ours, which also cover negative cosines."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(20, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    nodes, counted = torch.arange(0, 1.0, 0.001, dtype=torch.float64), torch.ones(20, 1).bool()
    theirs = log_histogram(p, counted, nodes, 50.0)
    ours = log_histogram(0.8 * q, counted, nodes, 50.0)
    assert_close(theirs.exp()[[0, 250, 500, 999]].tolist(), DDL_SHARES, rtol=0, atol=1e-12)
    divergence = (theirs.exp() * (theirs - ours)).sum().item()
    assert_close(divergence, DDL_DIVERGENCE, rtol=0, atol=1e-11)


def test_nodes_closer_than_the_kernel_is_wide_change_nothing() -> None:
    """Nodes 0.02 and 0.001 apart agree; a distance of 0.5 is too large."""
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.rand(9, 1, generator=generator, dtype=torch.float64) for _ in range(2))

    def divergence(nodes: int) -> float:
        places, counted = torch.linspace(-1, 1, nodes).double(), torch.ones(9, 1).bool()
        theirs, ours = (log_histogram(x, counted, places, 50.0) for x in (p, 0.5 * q))
        return float((theirs.exp() * (theirs - ours)).sum())

    assert_close(divergence(101), divergence(2001), rtol=1e-3, atol=0)
    assert abs(divergence(5) / divergence(2001) - 1) > 0.02


def test_similarities_far_apart_stay_finite_in_float32() -> None:
    """The kernel underflows to 0 at this distance."""
    loss, labels = made(gamma=200.0).float(), torch.tensor([0])
    loss(torch.eye(4)[:1], torch.eye(4)[:1], labels)
    student = (-torch.eye(4)[:1] + 1e-3).requires_grad_()
    value, notes = loss(student, torch.eye(4)[:1], labels)
    value.backward()
    assert notes["sdc"] > 100
    assert gradient(student).isfinite().all()


# --- the equation ----------------------------------------------------------------------------


@pytest.mark.parametrize("valid_steps", [1, 2, 200])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_agrees_with_the_equation_step_by_step(slots: int, valid_steps: int) -> None:
    """Some classes appear late, or more often in a batch than there are slots, and some samples
    have no label.
    """
    loss = made(slots=slots, valid_steps=valid_steps, alpha=0.7, gamma=8.0, nodes=21)
    expected = expected_of(loss)
    for step, drawn_labels in enumerate(BATCHES):
        student, teacher = normal(step, 3, 4).requires_grad_(), normal(50 + step, 3, 4)
        value, notes = loss(student, teacher, torch.tensor(drawn_labels))
        value.backward()
        at = student.detach().numpy()
        sides: dict[str, Any] = {"teacher": teacher.numpy(), "labels": drawn_labels}
        assert_close(value.item(), expected.loss(at, **sides))
        assert_close(notes["sdc"].item(), expected.sdc(at, **sides))
        assert_close(notes["fcd"].item(), embedding_distance(at, teacher.numpy(), "l2"))
        assert notes["pairs"] == len(expected.pairs(at, **sides))
        by_difference = central_differences(partial(expected.loss, **sides), at)
        assert_close(gradient(student).numpy(), by_difference, rtol=1e-6, atol=1e-8)
        expected.advance(at, **sides)
        for label in range(4):
            entries = expected.banks.get(label, [])
            for number, bank in enumerate((loss.student_bank, loss.teacher_bank), start=1):
                filled = bank[label][loss.written_at[label] > 0]
                assert_close(_sorted(filled.tolist()), _sorted(e[number] for e in entries))


def _sorted(vectors: Any) -> list[list[float]]:
    return sorted(list(vector) for vector in vectors)


def test_the_first_batch_has_only_feature_consistency() -> None:
    student = golden.S.clone().requires_grad_()
    value, notes = made(3, 6, 6)(student, golden.T, golden.Y)
    value.backward()
    assert notes["sdc"] == notes["pairs"] == 0
    assert_close(value.item(), golden.EMBEDDING_DISTANCE["l2"] / 2, rtol=0, atol=6e-9)
    assert gradient(student).any()


def test_an_entry_is_compared_until_it_is_too_old() -> None:
    loss, other = made(valid_steps=3), torch.tensor([1])
    loss(normal(1, 1, 4), normal(2, 1, 4), torch.tensor([0]))
    for _ in range(2):
        loss(normal(3, 1, 4), normal(4, 1, 4), other)
    batch = normal(5, 1, 4), normal(6, 1, 4), torch.tensor([0])
    assert loss.eval()(*batch)[1]["pairs"] == 1
    loss.train()(normal(3, 1, 4), normal(4, 1, 4), other)
    assert loss.eval()(*batch)[1]["pairs"] == 0


def test_the_newest_entries_of_a_class_stay() -> None:
    loss, teacher = made(slots=2), normal(2, 5, 4)
    loss(normal(1, 5, 4), teacher, torch.tensor([1, 1, 0, 1, 1]))
    assert_close(_sorted(loss.teacher_bank[1].tolist()), _sorted(map(unit, teacher[3:].numpy())))
    loss(normal(3, 1, 4), teacher[:1], torch.tensor([1]))
    newest = [unit(teacher.numpy()[4]), unit(teacher.numpy()[0])]
    assert_close(_sorted(loss.teacher_bank[1].tolist()), _sorted(newest))
    assert loss.written.tolist() == [1, 5, 0, 0]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_place_that_is_written_twice_gets_the_same_sample(slots: int) -> None:
    """Otherwise a GPU would choose one of the samples at random."""
    labels, written = torch.tensor([-1, 1, 1, 0, 1, -1, 1, 1]), torch.tensor([3, 7, 0])
    found = dict[tuple[int, int], set[int]]()
    for row, slot, sample in zip(*map(Tensor.tolist, places(labels, written, slots)), strict=True):
        found.setdefault((row, slot), set()).add(sample)
    ones, zeros = [1, 2, 4, 6, 7], [3]
    for row, samples in ((1, ones), (0, zeros)):
        for turn, sample in list(enumerate(samples))[-slots:]:
            assert found.pop((row, (int(written[row]) + turn) % slots)) == {sample}
    assert not found


def test_evaluation_is_no_step_and_leaves_the_banks() -> None:
    loss = made(3, 6, 6)
    loss(golden.S, golden.T, golden.Y)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss.eval()(golden.T, golden.S, golden.Y)
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(("d", "e"), [(3, 6), (6, 6), (8, 6)])
def test_the_projector_is_linear_and_trained(d: int, e: int) -> None:
    loss, student = made(3, d, e, projector=True), normal(1, 4, d)
    loss(student, golden.T, golden.Y)
    student.requires_grad_()
    value, _ = loss(student, golden.T, golden.Y)
    value.backward()
    [projector] = loss.parameters()
    matrix, at = projector.detach().numpy(), student.detach().numpy()
    expected, theirs = expected_of(loss), (golden.T.numpy(), golden.Y.tolist())
    expected.advance(linear(at, matrix), *theirs)
    assert_close(value.item(), expected.loss(linear(at, matrix), *theirs))
    by_weight = central_differences(lambda x: expected.loss(linear(at, x), *theirs), matrix)
    assert_close(gradient(projector).numpy(), by_weight, rtol=1e-6, atol=1e-8)


# --- properties ------------------------------------------------------------------------------


@drawn
@given(st.integers(0, 2**16))
def test_zero_at_equality(seed: int) -> None:
    loss, labels = made(), labels_of(seed, 6, 4)
    for step in range(3):
        student = normal(seed + step, 6, 4).requires_grad_()
        value, _ = loss(student, student.detach(), labels)
        value.backward()
        assert_close(value.item(), 0.0)
        assert_close(gradient(student), torch.zeros_like(student))


def test_a_student_less_compact_than_the_teacher_is_pulled_together() -> None:
    """Only the gradient of the distribution term is checked."""
    loss, labels = made(1, 2, 2, alpha=1.0, slots=1), torch.tensor([0])
    loss(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, 0.0]]).double(), labels)
    student = torch.tensor([[0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    _, notes = loss(student, torch.tensor([[0.9, 0.1]]).double(), labels)
    notes["sdc"].backward()
    assert notes["sdc"] > 0
    assert gradient(student)[0, 0] < 0  # towards its class in the bank


@drawn
@given(st.integers(0, 2**16), st.floats(0.01, 100), st.floats(0.01, 100))
@example(359, 1.0, 1.0)  # a class with more than six images
def test_ignores_lengths_and_batch_order(seed: int, ours: float, theirs: float) -> None:
    """There are slots for all images of 3 steps: with fewer, the order would decide which stay."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain, changed = made(slots=18), made(slots=18)
    for step in range(3):
        student, teacher = normal(seed + step, 6, 4), normal(seed + 9 + step, 6, 4)
        labels = labels_of(seed + step, 6, 4)
        expected = plain(student, teacher, labels)
        found = changed(ours * student[order], theirs * teacher[order], labels[order])
        assert_close(found, expected, rtol=1e-6, atol=1e-10)


@drawn
@given(st.integers(0, 2**16))
def test_precisions_agree(seed: int) -> None:
    exact, single = made(), made().float()
    for step in range(2):
        batch = normal(seed + step, 6, 4), normal(seed + 9 + step, 6, 4)
        labels = labels_of(seed, 6, 4)
        expected, _ = exact(*batch, labels)
        found, _ = single(*(x.float() for x in batch), labels)
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_only_the_student() -> None:
    loss = made(3, 6, 6)
    for _ in range(2):
        student, teacher = golden.S.clone().requires_grad_(), golden.T.clone().requires_grad_()
        loss(student, teacher, golden.Y)[0].backward()
        assert gradient(student).any()
        assert teacher.grad is None
    assert not list(loss.parameters())
    assert not any(buffer.requires_grad for buffer in loss.buffers())


def test_resumes_bit_by_bit_from_its_state_dict(tmp_path: Path) -> None:
    def step(loss: SimilarityDistributions, seed: int) -> Tensor:
        batch = normal(seed, 6, 4), normal(seed + 9, 6, 4)
        value: Tensor = loss(*batch, labels_of(seed, 6, 4))[0]
        return value

    straight, resumed = made(valid_steps=2), made(valid_steps=2)
    for seed in range(3):
        step(straight, seed)
    torch.save(straight.state_dict(), tmp_path / "loss.pt")
    fresh = step(made(valid_steps=2), 3)
    resumed.load_state_dict(torch.load(tmp_path / "loss.pt"))
    for seed in range(3, 6):
        value = step(straight, seed)
        assert torch.equal(step(resumed, seed), value)
        assert seed > 3 or not torch.equal(fresh, value)  # the past matters
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


@pytest.mark.parametrize(
    "options",
    [{"projector": True}, {"slots": 1, "valid_steps": 2}, {"alpha": 0.0}, {"gamma": 2000.0}],
)
def test_conforms_with_other_options(options: dict[str, object]) -> None:
    check_method(lambda weight=1.0: ICDFace(weight=weight, **options))  # type: ignore[arg-type]


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "icdface: alpha must be at least 0; found -1"),
        ({"slots": 0}, "icdface: slots must be at least 1; found 0"),
        ({"valid_steps": 0}, "icdface: valid_steps must be at least 1; found 0"),
        ({"gamma": 0}, "icdface: gamma must be above 0 .*; found 0"),
        ({"gamma": 1e40}, "icdface: gamma must be above 0 and at most 1e.06; found 1e.40"),
        ({"nodes": 1}, "icdface: nodes must be at least 2; found 1"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        ICDFace(**options)


def test_other_widths_are_refused() -> None:
    message = "icdface: student and teacher embeddings must be equally wide; found 3 and 4; set"
    with pytest.raises(KDHooksError, match=message):
        made(4, 3, 4)


def test_an_unknown_number_of_classes_is_refused() -> None:
    message = "icdface needs the number of classes; found no teacher.classifier; set it to the"
    with pytest.raises(KDHooksError, match=message):
        ICDFace().embedding_tap(Model(None, 4), Model(None, 4))


# --- two ranks against one process -----------------------------------------------------------


def _scenario() -> Results:
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    loss, values = made(slots=2), []
    for step in range(4):
        embedding, labels = student(mine(normal(23 + step, 8, 5))), mine(labels_of(step, 8, 4))
        values.append(loss(embedding, mine(normal(33 + step, 8, 4)), labels)[0])
    torch.stack(values).sum().backward()
    of_steps = torch.stack(values).detach()
    state = {**loss.state_dict(), **whole_tables(loss)}
    return {"loss": of_steps, "gradients": mean_gradients(student), "state": state}


def _scenarios() -> dict[str, Results]:
    return {"icdface": _scenario()}


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    first, second = (found["icdface"] for found in on_two_ranks(_scenarios, tmp_path))
    assert_close(first["state"], second["state"], rtol=0, atol=0)
    alone = _scenario()
    assert_close(first, alone, rtol=1e-9, atol=1e-12)
    assert alone["state"]["written"].sum() > 16
    assert any(gradient.abs().max() > 1e-3 for gradient in alone["gradients"].values())
