"""EKD agrees with its equations and the authors' code, and two ranks agree with one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Schedule
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch, tiny_teacher
from kdhooks_plugins.ekd import EKD, SimilarityRanks
from tests.maps import gradient, normal
from tests.ranks import Results, mean_gradients, mine, on_two_ranks
from tests.references import ekd as reference
from tests.references.differences import central_differences

drawn = settings(deadline=None, max_examples=40)
SHORT = {"thresholds": (2, 5, 10_000), "temperature": 0.2, "hard_negatives": 4}


def made(**options: Any) -> SimilarityRanks:
    loss = EKD(**options).embedding_tap().loss
    assert isinstance(loss, SimilarityRanks)
    return loss.double()


def expected_of(loss: SimilarityRanks) -> reference.EKD:
    return reference.EKD(
        tuple(loss.one_in.tolist()),
        loss.temperature.now,
        loss.momentum,
        loss.bias_correction,
        loss.hard_negatives,
        loss.positive_weight.now,
        loss.negative_weight.now,
    )


def labels_of(seed: int, b: int, c: int, lowest: int = -1) -> Tensor:
    return torch.randint(lowest, c, (b,), generator=torch.Generator().manual_seed(seed))


# Tencent/TFace, commit 171ec1434aca0972e111663ac646c9c1e3e44b5b, in recognition/tasks/ekd, with
# torch 2.13.0 on the CPU, g = torch.Generator().manual_seed(0), and
# normal = partial(torch.randn, generator=g, dtype=torch.float64):
#   loss = distillation.ekd.EKD().double()
#   ours, theirs, labels = normal(5, 8), normal(5, 6), torch.arange(5).repeat(5)[:24]
#   for _ in range(3):
#       s = (ours[labels] + normal(24, 8)).requires_grad_()
#       value = loss(s, theirs[labels] + 0.7 * normal(24, 6), labels); value.backward()
#       print(value.item(), s.grad.abs().sum().item())
#   print(loss.s_anchor[:2], loss.t_anchor[:2])
GOLDEN = [
    (0.286721876627, 1.805013249198),
    (0.307552504807, 0.229440513441),
    (0.294552632703, 1.021843751224),
]
GOLDEN_THRESHOLDS = [
    [0.015378240901206531, 0.022267477730437094],
    [0.01254896203733161, 0.020964686336945624],
]


def test_agrees_with_the_authors_code() -> None:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = made(bias_correction=False)
    ours, theirs, labels = normal(5, 8), normal(5, 6), torch.arange(5).repeat(5)[:24]
    for value, total in GOLDEN:
        student = (ours[labels] + normal(24, 8)).requires_grad_()
        found, _ = loss(student, theirs[labels] + 0.7 * normal(24, 6), labels)
        found.backward()
        assert_close(found.item(), value, rtol=0, atol=1e-11)
        assert_close(gradient(student).abs().sum().item(), total, rtol=0, atol=1e-11)
    for found, thresholds in zip(
        (loss.student_thresholds, loss.teacher_thresholds), GOLDEN_THRESHOLDS, strict=True
    ):
        assert_close(found[:2].tolist(), thresholds, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("b", "c", "d", "e"), [(1, 2, 3, 3), (6, 2, 4, 3), (9, 4, 3, 5)])
def test_agrees_with_the_equations_step_by_step(
    b: int, c: int, d: int, e: int, momentum: float, bias_correction: bool
) -> None:
    """Some batches have no positive or no negative pair, and some samples have no label."""
    weights = {"positive_weight": 0.7, "negative_weight": 0.4}
    loss = made(momentum=momentum, bias_correction=bias_correction, **SHORT, **weights)
    expected = expected_of(loss)
    batches = [torch.arange(b), torch.zeros(b).long(), torch.full((b,), -1)]
    batches = [batches[2], batches[1], *(labels_of(seed, b, c) for seed in range(4)), *batches]
    for step, labels in enumerate(batches):
        student, teacher = normal(step, b, d).requires_grad_(), normal(50 + step, b, e)
        value, notes = loss(student, teacher, labels)
        value.backward()
        at, theirs, people = student.detach().numpy(), teacher.numpy(), labels.tolist()
        expected.step(at, theirs, people)
        positives, negatives = expected.terms(at, theirs, people)
        assert_close(notes["positives"].item(), positives)
        assert_close(notes["negatives"].item(), negatives)
        assert notes["positive_pairs"] == len(reference.pairs_of(at, theirs, people, same=True))
        assert_close(value.item(), 0.7 * positives + 0.4 * negatives)
        loss_at = partial(expected.loss, teacher=theirs, labels=people)
        by_difference = central_differences(loss_at, at)
        assert_close(gradient(student).numpy(), by_difference, rtol=1e-5, atol=1e-8)


# --- thresholds ------------------------------------------------------------------------------


def test_a_corrected_threshold_has_no_memory_of_its_start() -> None:
    """The same batch has the same loss again; without the correction, the start at 0 fades."""
    batch = normal(1, 8, 4), normal(2, 8, 4), torch.arange(8) // 2
    corrected, plain = made(**SHORT), made(bias_correction=False, **SHORT)
    first = corrected(*batch)[0]
    assert first > 0
    for _ in range(3):
        assert_close(corrected(*batch)[0], first)
    assert not torch.isclose(plain(*batch)[0], first, rtol=1e-3, atol=0)
    for _ in range(2000):
        plain(*batch)
    assert_close(plain(*batch)[0], first)


def test_more_thresholds_than_negative_pairs_repeat_the_hardest() -> None:
    loss = made(thresholds=(2, 10, 1_000_000), momentum=0.0)
    loss(normal(1, 4, 5), normal(2, 4, 5), torch.tensor([0, 0, 1, 1]))  # 4 negative pairs
    assert loss.student_thresholds[0] < loss.student_thresholds[1]
    assert loss.student_thresholds[1] == loss.student_thresholds[2]


@pytest.mark.parametrize("person", [0, -1])
def test_without_negative_pairs_the_loss_is_0_and_thresholds_stay(person: int) -> None:
    loss, student = made(), normal(1, 5, 4).requires_grad_()
    value, notes = loss(student, normal(2, 5, 4), torch.full((5,), person))
    value.backward()
    assert value == 0
    assert notes["positive_pairs"] == (10 if person == 0 else 0)
    assert not gradient(student).any()
    assert not any(buffer.any() for buffer in loss.state_dict().values())


def test_without_positive_pairs_the_negative_ones_are_compared() -> None:
    value, notes = made(**SHORT)(normal(1, 6, 4), normal(2, 6, 4), torch.arange(6))
    assert notes["positives"] == 0
    assert_close(value, 0.01 * notes["negatives"])
    assert value > 0


def test_evaluation_is_no_step_and_leaves_the_thresholds() -> None:
    loss, labels = made(), torch.arange(6) // 2
    loss(normal(1, 6, 4), normal(2, 6, 4), labels)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss.eval()(normal(3, 6, 4), normal(4, 6, 4), labels)
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key])


def test_resumes_bit_by_bit_from_its_state_dict(tmp_path: Path) -> None:
    def step(loss: SimilarityRanks, seed: int) -> Tensor:
        value: Tensor = loss(normal(seed, 6, 4), normal(seed + 9, 6, 4), labels_of(seed, 6, 3))[0]
        return value

    straight, resumed = made(**SHORT), made(**SHORT)
    for seed in range(3):
        step(straight, seed)
    torch.save(straight.state_dict(), tmp_path / "loss.pt")
    assert not torch.equal(step(resumed, 3), step(straight, 3))  # the past matters
    resumed.load_state_dict(torch.load(tmp_path / "loss.pt"))
    straight.load_state_dict(torch.load(tmp_path / "loss.pt"))
    for seed in range(3, 6):
        assert torch.equal(step(resumed, seed), step(straight, seed))


# --- properties ------------------------------------------------------------------------------


@drawn
@given(st.integers(0, 2**16), st.floats(0.01, 100), st.floats(0.01, 100))
def test_ignores_lengths_and_batch_order(seed: int, ours: float, theirs: float) -> None:
    student, teacher, labels = normal(seed, 7, 4), normal(seed + 1, 7, 5), labels_of(seed, 7, 3)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    plain, changed = made(**SHORT), made(**SHORT)
    for _ in range(2):
        expected = plain(student, teacher, labels)
        found = changed(ours * student[order], theirs * teacher[order], labels[order])
        assert_close(found, expected, rtol=1e-6, atol=1e-10)


@drawn
@given(st.integers(0, 2**16))
def test_zero_at_equality(seed: int) -> None:
    student, labels = normal(seed, 7, 4).requires_grad_(), labels_of(seed, 7, 3)
    value, _ = made(**SHORT)(student, student.detach(), labels)
    value.backward()
    assert value == 0
    assert not gradient(student).any()


def test_a_positive_pair_below_the_teachers_rank_is_pulled_together() -> None:
    student = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, -0.6]]).double().requires_grad_()
    teacher = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]).double()
    loss = made(thresholds=(2,), temperature=0.5, negative_weight=0.0)
    loss(student, teacher, torch.tensor([0, 0, 1]))[0].backward()
    assert gradient(student)[1, 1] > 0  # away from the first
    assert gradient(student)[2].abs().max() < 1e-12


@drawn
@given(st.integers(0, 2**16))
def test_precisions_agree(seed: int) -> None:
    student, teacher, labels = normal(seed, 7, 4), normal(seed + 1, 7, 5), labels_of(seed, 7, 3)
    exact, single = made(**SHORT), made(**SHORT).float()
    for _ in range(2):
        expected, _ = exact(student, teacher, labels)
        found, _ = single(student.float(), teacher.float(), labels)
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_gradient_reaches_only_the_student() -> None:
    student, teacher = normal(1, 6, 4).requires_grad_(), normal(2, 6, 4).requires_grad_()
    loss = made(**SHORT)
    loss(student, teacher, torch.arange(6) // 2)[0].backward()
    assert gradient(student).any()
    assert teacher.grad is None
    assert not list(loss.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"global_batch": False},
        {"bias_correction": False, "momentum": 0.5},
        {"temperature": Schedule(value=0.05, initial=0.5, warmup=3)},
        {"thresholds": [4], "temperature": 0.5, "hard_negatives": 3, "positive_weight": 0.0},
    ],
)
def test_conforms_with_other_options(options: dict[str, object]) -> None:
    check_method(lambda weight=1.0: EKD(weight=weight, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": []}, "ekd: thresholds must name at least one threshold; found none"),
        ({"thresholds": [10, 1]}, r"ekd: thresholds\[1\] must be at least 2; found 1"),
        ({"temperature": 0}, "ekd: temperature must be above 0; found 0"),
        ({"momentum": 1}, "ekd: momentum must be at least 0 and below 1; found 1"),
        ({"hard_negatives": 0}, "ekd: hard_negatives must be at least 1; found 0"),
        ({"negative_weight": -1}, "ekd: negative_weight must be at least 0; found -1"),
        (
            {"positive_weight": 0, "negative_weight": 0},
            "ekd: positive_weight or negative_weight must be above 0; found 0 twice",
        ),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDHooksError, match=message):
        EKD(**options)


# --- two ranks against one process -----------------------------------------------------------


def _scenario(global_batch: bool) -> Results:
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    loss, values = made(global_batch=global_batch, **SHORT), []
    for step in range(3):  # some positive pairs are on two ranks
        embedding, labels = student(mine(normal(23 + step, 8, 5))), mine(torch.arange(8) % 5)
        values.append(loss(embedding, mine(normal(33 + step, 8, 7)), labels)[0])
    torch.stack(values).sum().backward()
    loss_of_steps = torch.stack(values).detach()
    return {"loss": loss_of_steps, "gradients": mean_gradients(student), "state": loss.state_dict()}


def _in_a_distiller() -> Results:
    """Each rank has its own images and only their pairs, so its thresholds differ."""
    student, (images, labels) = TinyFaceNet().train(), tiny_batch()
    method = EKD(global_batch=False)
    kd = Distiller(student, tiny_teacher(), [method], input_shape=(3, 32, 32))
    for _ in range(2):
        student(mine(images))
        kd(mine(images), mine(labels))
    kd.remove()
    return dict(kd.state_dict())


def _scenarios() -> dict[str, Results]:
    return {
        "global": _scenario(global_batch=True),
        "local": _scenario(global_batch=False),
        "distiller": _in_a_distiller(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("ranks"))


def test_a_global_batch_is_that_of_one_process(ranks: list[dict[str, Results]]) -> None:
    alone = _scenario(global_batch=True)
    for found in ranks:
        assert_close(found["global"], alone, rtol=1e-9, atol=1e-12)
    assert any(gradient.abs().max() > 1e-3 for gradient in alone["gradients"].values())


def test_a_local_batch_is_each_ranks_own(ranks: list[dict[str, Results]]) -> None:
    first, second = (found["local"]["loss"] for found in ranks)
    assert not torch.isclose(first, second).any()


def test_thresholds_of_local_batches_are_averaged(ranks: list[dict[str, Results]]) -> None:
    first, second = (found["distiller"] for found in ranks)
    assert_close(first, second, rtol=0, atol=0)
    assert any("thresholds" in name and value.any() for name, value in first.items())
    own, other = (found["local"]["state"]["student_thresholds"] for found in ranks)
    assert not torch.equal(own, other)  # without a Distiller they differ
