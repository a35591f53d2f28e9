"""A single shard of the classes agrees with plain torch, and two ranks agree with one process."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import ClassShard, ClassSplit, KDHooksError, Model, Wanted
from kdhooks.classes.per_class import share_digests, whole_tables
from kdhooks.classes.ranks import gather, gathering_once, world
from kdhooks.classes.relations import relations
from kdhooks.classes.rows import Rows
from kdhooks.declarations import Step
from kdhooks_plugins.coupleface import CoupleFace, MutualRelations
from kdhooks_plugins.proxylesskd import ProxylessKD
from tests.maps import normal
from tests.ranks import Results, group, here, mean_gradients, mine, on_two_ranks

# --- one shard -------------------------------------------------------------------------------


def test_a_lone_shard_is_plain_torch() -> None:
    shard = ClassShard(normal(1, 5, 3), 0, 5)
    values, labels, amount = normal(2, 4, 5), torch.tensor([0, 4, 2, 2]), normal(3, 4)
    embedding = normal(4, 4, 3)
    added = values.clone()
    added[torch.arange(4), labels] += amount
    cosines = F.cosine_similarity(embedding[:, None], shard.weight[None], dim=2)
    assert_close(shard.cosines(embedding), cosines)
    assert_close(shard.add(values, labels, amount), added)
    assert_close(shard.own(embedding, labels), cosines[torch.arange(4), labels])
    assert shard.gather(embedding) is embedding


def test_classes_of_other_ranks_and_missing_labels_are_ignored() -> None:
    shard = ClassShard(normal(1, 3, 2), 4, 7)  # classes 4, 5 and 6
    values, labels = normal(2, 5, 3), torch.tensor([4, 6, 3, -1, 7])
    embedding = normal(3, 5, 2)
    cosines = shard.cosines(embedding)
    nothing = torch.zeros((), dtype=torch.float64)
    own = torch.stack([cosines[0, 0], cosines[1, 2], nothing, nothing, nothing])
    assert_close(shard.own(embedding, labels), own)
    added = values.clone()
    added[0, 0] += 1
    added[1, 2] += 1
    assert_close(shard.add(values, labels, torch.ones(5, dtype=torch.float64)), added)


def test_gradients_of_a_lone_shard_are_those_of_plain_torch() -> None:
    labels = torch.tensor([0, 4, 2, 2])

    def by_shard(x: Tensor) -> Tensor:
        shard = ClassShard(normal(1, 5, 3), 0, 5)
        logits = 8 * shard.add(shard.cosines(x), labels, torch.full((4,), -0.3).double())
        return logits.logsumexp(dim=1) - 8 * shard.own(x, labels)

    assert torch.autograd.gradcheck(by_shard, normal(2, 4, 3).requires_grad_())


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_scaled_cosines_and_their_gradients_are_those_of_unit_vectors(
    measured: bool, trained: bool
) -> None:
    x, rows = normal(1, 4, 3).requires_grad_(), normal(2, 5, 3)
    rows[3] = 0  # a row of zeros has no direction, and F.normalize leaves it unchanged
    rows.requires_grad_(trained)
    shard = ClassShard(rows, 0, 5)
    found = (shard.measured() if measured else shard).cosines(x, 7.0)
    expected = 7 * F.normalize(x) @ F.normalize(rows).T
    assert_close(found, expected)
    inputs, weights = [x, rows][: 1 + trained], normal(3, 4, 5)
    weights[:, 3] = 0  # the gradient of the zero row is 1e12 times the others
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)]
    assert_close(*gradients)


def test_add_in_place_equals_add() -> None:
    shard, values = ClassShard(normal(1, 3, 2), 4, 7), normal(2, 5, 3)
    labels, amount = torch.tensor([4, 6, 3, -1, 7]), normal(3, 5)
    expected = shard.add(values, labels, amount)
    assert shard.add_(values, labels, amount) is values
    assert_close(values, expected)


def test_a_part_keeps_the_measured_lengths() -> None:
    shard = ClassShard(normal(1, 6, 3), 10, 20)
    chunk = ClassShard(normal(2, 2, 3), 13, 20)
    assert shard.part(chunk)._known_lengths() is None
    measured = shard.measured()
    assert measured.measured() is measured
    lengths = measured.part(chunk)._known_lengths()
    assert lengths is not None
    assert_close(lengths, shard.weight[3:5].norm(dim=1))


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_changed_rows_are_measured_again(change: str) -> None:
    rows, x = normal(1, 5, 3), normal(2, 4, 3)
    shard = ClassShard(rows, 0, 5).measured()
    expected = shard.cosines(x)
    if change == "in place":
        rows.mul_(10)
    else:
        shard = replace(shard, weight=10 * rows)
    assert_close(shard.cosines(x), expected)


def test_an_amount_in_place_leaves_the_gradient_of_trained_rows_right() -> None:
    rows, x = normal(1, 5, 3).requires_grad_(), normal(2, 4, 3)
    labels, amount = torch.tensor([0, 4, 2, -1]), normal(3, 4)
    shard = ClassShard(rows, 0, 5)
    both = [
        shard.add_(shard.cosines(x), labels, amount),
        shard.add(shard.cosines(x), labels, amount),
    ]
    assert_close(*(torch.autograd.grad(z.square().sum(), rows) for z in both))


@pytest.mark.parametrize("way", ["cosines", "over_classes", "over trained rows", "relations"])
def test_a_gradient_of_the_gradient_is_refused(way: str) -> None:
    x, rows = normal(2, 4, 3).requires_grad_(), normal(1, 5, 3)
    if way == "cosines":
        found = ClassShard(rows, 0, 5).cosines(x)
    elif way == "relations":
        found = relations(x, rows, torch.tensor([[0], [2], [1], [4]]), ClassSplit.whole(5))
    else:
        shard = ClassShard(rows.requires_grad_(way == "over trained rows"), 0, 5)
        (found,), _ = shard.over_classes(lambda x, part: Wanted(logs=[x @ part.weight.T]), x)
    value = found.sum() + (x**3).sum()
    with pytest.raises(KDHooksError, match="are differentiable once; found create_graph = True"):
        torch.autograd.grad(value, x, create_graph=True)


def test_half_precision_does_not_overflow_for_long_rows() -> None:
    rows, x = 3e3 * normal(1, 100, 512), normal(2, 8, 512)
    found = ClassShard(rows, 0, 100).cosines(x.half(), 64.0)
    assert_close(found.double(), ClassShard(rows, 0, 100).cosines(x, 64.0), rtol=1e-2, atol=2e-1)


def test_one_process_has_no_group() -> None:
    assert world() is None
    x = normal(1, 3, 2)
    assert gather(x, None) is x


# --- two ranks against one process -----------------------------------------------------------

_CLASSES, _SPLIT, _B = 7, (4, 3), 8
_LABELS = torch.tensor([0, 6, 3, 4, 2, 2, 5, 3])
_MISSING = torch.tensor([0, -1, 3, 4, 2, -1, -1, 3])  # one without a label on rank 0, two on rank 1
_HEADS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "arcface": ({}, _LABELS),
    "straight_through": ({"straight_through_margin": True}, _LABELS),
    "cosface": ({"margin_type": "cosface", "scale": 16.0}, _LABELS),
    "without_labels": ({}, _MISSING),
    "extra_fcd": ({"extra_fcd_weight": 8.0}, _MISSING),
    "projector": ({"projector": True, "extra_fcd_weight": 8.0, "scale": 4.0}, _LABELS),
    "warm_up": ({"m": {"value": 0.5, "initial": 0.2, "warmup": 2}, "scale": 8.0}, _LABELS),
}
_BANKS: dict[str, dict[str, Any]] = {
    "latest": {},
    "averaged": {"bank_momentum": 0.7},
    "projected": {"bank_momentum": 0.3, "projector": True},
}


def _student(d: int) -> nn.Module:
    student = nn.Linear(5, d).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, d, 5))
        student.bias.copy_(normal(21, d))
    return student


def _shard() -> ClassShard:
    rank, size = here()
    split = _SPLIT if size == 2 else (_CLASSES,)
    weight = normal(22, _CLASSES, 6).split(split)[rank]
    return ClassShard(weight, sum(split[:rank]), _CLASSES, group())


def _seeded(module: nn.Module) -> nn.Module:
    """Set the same parameters in every process."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters(), start=40):
            parameter.copy_(normal(seed, *parameter.shape))
    return module


def _run_head(options: dict[str, Any], labels: Tensor) -> Results:
    """Train a linear student for two steps; return the second one's loss, log and gradients."""
    d = 4 if options.get("projector") else 6
    student = _student(d)
    tap = ProxylessKD(**options).classifier_share(Model(None, d), Model(None, 6))
    loss = _seeded(tap.loss.double())
    trained = nn.ModuleDict({"student": student, "loss": loss})
    value, notes = torch.zeros(()), dict[str, Tensor]()
    for _ in range(2):
        trained.zero_grad()
        step = Step(
            student=student(mine(normal(23, _B, 5))),
            student_features={},
            teacher=mine(normal(24, _B, 6)),
            teacher_features={},
            labels=mine(labels),
            parameters={},
            classifier=_shard(),
            head=None,
        )
        value, notes = loss(*tap.arguments(step))
        value.backward()
    return {
        "loss": value.detach(),
        "notes": {key: note.detach() for key, note in notes.items()},
        "gradients": mean_gradients(trained),
        "state": loss.state_dict(),
    }


def _run_bank(options: dict[str, Any]) -> Results:
    d = 4 if options.get("projector") else 6
    teacher = Model(None, 6, classifier=Rows.open(normal(30, _CLASSES, 6)))
    method = CoupleFace(k=3, relations="bank", **options)
    loss = method.embedding_tap(Model(None, d), teacher).loss.double()
    assert isinstance(loss, MutualRelations)
    _seeded(loss)
    share_digests(loss)  # as a Distiller does
    for step, labels in enumerate((_LABELS, _MISSING, _LABELS.flip(0))):
        student, theirs = normal(31 + step, _B, d), normal(35 + step, _B, 6)
        loss(mine(student), mine(theirs), mine(labels))
    return {"state": {**loss.state_dict(), **whole_tables(loss)}}


def _gathered_once(x: Tensor) -> Results:
    """Gather tensors that must not share one gathering, although their losses are in one step."""
    with gathering_once():
        several = [gather(mine(x) + number, group()) for number in range(3)]  # with one id in turn
        part = mine(x).requires_grad_()
        with torch.no_grad():
            constant = gather(part, group()).clone()
        trained = gather(part, group())
        if trained is not part:
            trained.detach().zero_()
        again = gather(part, group())
    found = {"several": several, "constant": constant, "again": again.detach()}
    return {**found, "trained": trained.requires_grad}


def _run_primitives() -> Results:
    shard = _shard()
    rank, size = here()
    values = normal(25, _B, _CLASSES).split(_SPLIT if size == 2 else (_CLASSES,), dim=1)[rank]
    amount = normal(26, _B)
    transposed = normal(29, _B, 3).T / size  # in memory, ranks may have other strides
    return {
        "gathered": shard.gather(mine(amount)),
        "gathered_once": _gathered_once(amount),
        "gathered_labels": shard.gather(mine(_LABELS)),
        "gathered_transposed": shard.gather(mine(normal(28, _B, 3)).T.contiguous().T),
        "sum": shard.sum(values.sum(dim=1)),
        "sum_transposed": shard.sum(transposed if rank else transposed.contiguous()),
        "logsumexp": shard.logsumexp((1e4 * values).logsumexp(dim=1)),
        "own": shard.own(normal(27, _B, 6), _MISSING),
        "part": {
            "add": shard.add(values, _MISSING, amount),
            "cosines": shard.cosines(normal(27, _B, 6)),
        },
        "world": world() is not None,
        "frozen": shard.trained() is shard,
    }


def _all_scenarios() -> dict[str, Results]:
    results = {f"head {name}": _run_head(*case) for name, case in _HEADS.items()}
    results |= {f"bank {name}": _run_bank(options) for name, options in _BANKS.items()}
    return results | {"primitives": _run_primitives()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    """Return the results of each of two gloo processes."""
    return on_two_ranks(_all_scenarios, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Results]:
    return _all_scenarios()


_PAIRS = list(itertools.product(_HEADS, [0, 1]))


@pytest.mark.parametrize(("name", "rank"), _PAIRS)
def test_each_rank_has_the_loss_of_the_global_batch(
    name: str, rank: int, ranks: list[dict[str, Results]], alone: dict[str, Results]
) -> None:
    found, expected = ranks[rank][f"head {name}"], alone[f"head {name}"]
    assert_close(found["loss"], expected["loss"])
    assert_close(found["notes"], expected["notes"])
    assert_close(found["state"], expected["state"])


@pytest.mark.parametrize(("name", "rank"), _PAIRS)
def test_the_mean_gradient_over_ranks_is_that_of_one_process(
    name: str, rank: int, ranks: list[dict[str, Results]], alone: dict[str, Results]
) -> None:
    found, expected = ranks[rank][f"head {name}"], alone[f"head {name}"]
    assert_close(found["gradients"], expected["gradients"], rtol=1e-9, atol=1e-12)
    assert any(gradient.abs().max() > 1e-3 for gradient in found["gradients"].values())


@pytest.mark.parametrize("name", _BANKS)
def test_both_ranks_keep_the_bank_of_one_process(
    name: str, ranks: list[dict[str, Results]], alone: dict[str, Results]
) -> None:
    first, second = (results[f"bank {name}"]["state"] for results in ranks)
    for key, value in alone[f"bank {name}"]["state"].items():
        assert torch.equal(first[key], second[key])
        assert_close(first[key], value)
    assert first["student_bank"].any(dim=1).tolist() == [True, False, *[True] * 5]


@pytest.mark.parametrize(
    "key",
    [
        "gathered",
        "gathered_labels",
        "gathered_once",
        "gathered_transposed",
        "sum",
        "sum_transposed",
        "logsumexp",
        "own",
    ],
)
def test_reduced_results_are_the_same_on_all_ranks(
    key: str, ranks: list[dict[str, Results]], alone: dict[str, Results]
) -> None:
    for results in ranks:
        assert_close(results["primitives"][key], alone["primitives"][key])


@pytest.mark.parametrize("key", ["add", "cosines"])
def test_results_by_class_can_be_concatenated(
    key: str, ranks: list[dict[str, Results]], alone: dict[str, Results]
) -> None:
    parts = [results["primitives"]["part"][key] for results in ranks]
    assert_close(torch.cat(parts, dim=1), alone["primitives"]["part"][key])


def test_two_ranks_are_a_world(ranks: list[dict[str, Results]], alone: dict[str, Results]) -> None:
    assert [results["primitives"]["world"] for results in ranks] == [True, True]
    assert not alone["primitives"]["world"]


def test_a_head_that_another_method_froze_is_no_error(ranks: list[dict[str, Results]]) -> None:
    """proxylesskd freezes a trainer's head, while another method compares with it."""
    assert all(found["primitives"]["frozen"] for found in ranks)
