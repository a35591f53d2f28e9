"""Rows from files; one shard against plain torch; two ranks against one process."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import ClassShard, KDHooksError, Model
from kdhooks.classes.rows import Rows
from kdhooks.classes.shards import gather, world
from kdhooks.declarations import Step
from kdhooks_plugins.coupleface import CoupleFace, MutualRelations
from kdhooks_plugins.proxylesskd import ProxylessKD
from tests.ranks import Results, group, here, mean_gradients, mine, on_two_ranks


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- rows ------------------------------------------------------------------------------------


def saved(folder: Path, *sizes: int, name: str = "checkpoint_gpu_{}.pt", dim: int = 3) -> Tensor:
    """Shards of these sizes as arcface_torch writes them, in order; what they hold together."""
    rows = normal(sum(sizes), sum(sizes), dim).float()
    for rank, part in enumerate(rows.split(sizes)):
        content = {"epoch": 1, "state_dict_softmax_fc": {"weight": part.clone()}}
        torch.save(content, folder / name.format(rank))
    return rows


def everything(rows: Rows) -> Tensor:
    return rows.slice(0, rows.total)


def test_rows_come_from_a_tensor() -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(3, 2))
    rows = Rows.open(weight)
    assert (rows.total, rows.dim) == (3, 2)
    assert torch.equal(everything(rows), weight)
    assert not everything(rows).requires_grad
    assert Rows.open(rows) is rows


@pytest.mark.parametrize("wrap", ["plain", "weight", "softmax_fc", "both"])
def test_rows_come_from_a_file(wrap: str, tmp_path: Path) -> None:
    rows = normal(1, 4, 3).float()
    contents: dict[str, object] = {
        "plain": rows,
        "weight": {"weight": rows},
        "softmax_fc": {"state_dict_softmax_fc": rows},
        "both": {"state_dict_softmax_fc": {"weight": rows}},
    }
    path = tmp_path / "rows.pt"
    torch.save(contents[wrap], path)
    for source in (path, str(path)):
        assert torch.equal(everything(Rows.open(source)), rows)


@pytest.mark.parametrize("sizes", [(3,), (4, 3), (2, 2, 1), (3,) * 4 + (2,) * 8, (1,) * 11])
def test_shards_come_in_the_order_of_their_ranks(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """12 and 11 of them, so that rank 10 would come before rank 2 in the order of names."""
    expected = saved(tmp_path, *sizes)
    rows = Rows.open(tmp_path / "checkpoint_gpu_*.pt")
    assert rows.total == sum(sizes)
    assert torch.equal(everything(rows), expected)


def test_the_rank_is_the_last_number_of_a_files_name(tmp_path: Path) -> None:
    expected = saved(tmp_path, *[2] * 11, name="ms1mv3_r50_{}.pt")
    assert torch.equal(everything(Rows.open(tmp_path / "ms1mv3_r50_*.pt")), expected)


@pytest.mark.parametrize("folder", ["run[1]", "a run", "50%"])
def test_a_path_that_exists_is_taken_as_it_is(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    expected = saved(tmp_path / folder, 3)
    found = Rows.open(tmp_path / folder / "checkpoint_gpu_0.pt")
    assert torch.equal(everything(found), expected)


def test_half_precision_rows_are_read_as_float32(tmp_path: Path) -> None:
    rows = normal(1, 4, 3).half()
    torch.save(rows, tmp_path / "rows.pt")
    found = everything(Rows.open(tmp_path / "rows.pt"))
    assert found.dtype == torch.float32
    assert torch.equal(found, rows.float())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_a_slice_runs_across_parts(sizes: list[int], data: st.DataObject) -> None:
    matrix = torch.arange(2.0 * sum(sizes)).reshape(-1, 2)
    rows = Rows(matrix.split(sizes))
    start = data.draw(st.integers(0, rows.total))
    stop = data.draw(st.integers(start, rows.total))
    found = rows.slice(start, stop)
    assert found.shape == (stop - start, 2)
    assert torch.equal(found, matrix[start:stop])


def test_a_slice_is_a_copy() -> None:
    matrix = torch.zeros(4, 2)
    Rows([matrix]).slice(0, 4).fill_(1)
    Rows([matrix]).slice(1, 2).fill_(1)
    assert not matrix.any()


@pytest.mark.parametrize("size", [1, 2, 3, 65536])
def test_chunks_cover_all_rows_at_unit_length(size: int) -> None:
    matrix = normal(1, 7, 3).float()
    chunks = list(Rows(matrix.split([4, 3])).chunks(size))
    assert [offset for offset, _ in chunks] == list(range(0, 7, size))
    assert_close(torch.cat([rows for _, rows in chunks]), F.normalize(matrix))


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 9), st.floats(0.01, 100))
def test_nearest_is_the_row_of_largest_cosine(seed: int, c: int, length: float) -> None:
    matrix, embedding = 3 * normal(seed, c, 4).float(), length * normal(seed + 1, 6, 4).float()
    cosines = F.cosine_similarity(embedding[:, None], matrix[None], dim=2)
    found = Rows(matrix.split(2)).nearest(embedding)
    assert_close(cosines.gather(1, found[:, None])[:, 0], cosines.amax(dim=1))
    own = Rows(matrix.split(2)).nearest(matrix)
    assert torch.equal(own, torch.arange(c))


def test_nearest_looks_beyond_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(3, 9, 4).float()
    rows = Rows(matrix.split([5, 4]))
    few = rows.chunks(2)
    monkeypatch.setattr(rows, "chunks", lambda: few)
    assert torch.equal(rows.nearest(matrix.flip(0)), torch.arange(8, -1, -1))


def test_no_matching_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"no file matches '.*gone_\*\.pt'; name a tensor file"):
        Rows.open(tmp_path / "gone_*.pt")


@pytest.mark.parametrize("missing", [0, 1, 9])
def test_a_gap_in_the_ranks_is_refused(missing: int, tmp_path: Path) -> None:
    saved(tmp_path, *[1] * 11)
    (tmp_path / f"checkpoint_gpu_{missing}.pt").unlink()
    with pytest.raises(KDHooksError, match=r"numbered 0 to 9 without a gap; found checkpoint_gpu_"):
        Rows.open(tmp_path / "checkpoint_gpu_*.pt")


def test_the_same_rank_of_two_runs_is_refused(tmp_path: Path) -> None:
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        saved(tmp_path / run, 2)
    with pytest.raises(KDHooksError, match="numbered 0 to 1 without a gap"):
        Rows.open(tmp_path / "*" / "checkpoint_gpu_*.pt")


def test_files_without_a_number_are_no_shards(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(torch.ones(2, 3), tmp_path / name)
    with pytest.raises(KDHooksError, match=r"numbered 0 to 1 without a gap; found a\.pt, b\.pt"):
        Rows.open(tmp_path / "*.pt")


@pytest.mark.parametrize("sizes", [(3, 4), (4, 2), (3, 3, 1), (2, 3, 2)])
def test_sizes_that_no_run_has_are_refused(sizes: tuple[int, ...], tmp_path: Path) -> None:
    saved(tmp_path, *sizes)
    with pytest.raises(KDHooksError, match=rf"differ by one row.*_0\.pt \({sizes[0]}, 3\), "):
        Rows.open(tmp_path / "checkpoint_gpu_*.pt")


def test_widths_of_two_runs_are_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 3), tmp_path / "rows_0.pt")
    torch.save(torch.ones(2, 4), tmp_path / "rows_1.pt")
    with pytest.raises(KDHooksError, match=r"found rows_0\.pt \(2, 3\), rows_1\.pt \(2, 4\)"):
        Rows.open(tmp_path / "rows_*.pt")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.pt").write_text("not a tensor")
    with pytest.raises(KDHooksError, match=r"notes\.pt' is not a file that torch\.save wrote"):
        Rows.open(tmp_path / "notes.pt")


@pytest.mark.parametrize("content", [{"fc": torch.ones(2, 3)}, [1, 2], {"weight": 3}])
def test_a_file_without_rows_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(KDHooksError, match=r"model\.pt' holds no rows; expected a tensor \(c e\)"):
        Rows.open(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (torch.ones(3), r"shape \(3,\) and dtype torch\.float32"),
        (torch.ones(2, 3, 1), r"shape \(2, 3, 1\)"),
        (torch.ones(2, 3, dtype=torch.long), r"dtype torch\.int64"),
        (torch.ones(0, 3), r"shape \(0, 3\)"),
    ],
)
def test_rows_must_be_a_floating_point_matrix(rows: Tensor, found: str, tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=rf"matrix \(c e\); the tensor given has .*{found}"):
        Rows.open(rows)
    torch.save(rows, tmp_path / "rows.pt")
    with pytest.raises(KDHooksError, match=rf"rows\.pt' has .*{found}"):
        Rows.open(tmp_path / "rows.pt")


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


def test_other_ranks_classes_and_missing_labels_are_no_ones_own() -> None:
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
    rows[3] = 0  # has no direction; F.normalize leaves it as it is
    rows.requires_grad_(trained)
    shard = ClassShard(rows, 0, 5)
    found = (shard.measured() if measured else shard).cosines(x, 7.0)
    expected = 7 * F.normalize(x) @ F.normalize(rows).T
    assert_close(found, expected)
    inputs, weights = [x, rows][: 1 + trained], normal(3, 4, 5)
    weights[:, 3] = 0  # there the gradient is 1e12 times the others
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)]
    assert_close(*gradients)


def test_an_amount_is_added_in_place_where_no_copy_is_wanted() -> None:
    shard, values = ClassShard(normal(1, 3, 2), 4, 7), normal(2, 5, 3)
    labels, amount = torch.tensor([4, 6, 3, -1, 7]), normal(3, 5)
    expected = shard.add(values, labels, amount)
    assert shard.add_(values, labels, amount) is values
    assert_close(values, expected)


def test_a_part_keeps_the_lengths_that_were_measured() -> None:
    shard = ClassShard(normal(1, 6, 3), 10, 20)
    chunk = ClassShard(normal(2, 2, 3), 13, 20)
    assert shard.part(chunk)._known_lengths() is None
    measured = shard.measured()
    assert measured.measured() is measured
    lengths = measured.part(chunk)._known_lengths()
    assert lengths is not None
    assert_close(lengths, shard.weight[3:5].norm(dim=1))


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_rows_that_have_changed_are_measured_again(change: str) -> None:
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


def test_a_gradient_of_the_gradient_is_refused() -> None:
    x = normal(2, 4, 3).requires_grad_()
    value = ClassShard(normal(1, 5, 3), 0, 5).cosines(x).sum() + (x**3).sum()
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
_MISSING = torch.tensor([0, -1, 3, 4, 2, -1, -1, 3])  # two without a label on one rank, one else
_HEADS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "arcface": ({}, _LABELS),
    "straight_through": ({"straight_through_margin": True}, _LABELS),
    "cosface": ({"margin_type": "cosface", "scale": 16.0}, _LABELS),
    "without_labels": ({}, _MISSING),
    "extra_fcd": ({"extra_fcd_weight": 8.0}, _MISSING),
    "projector": ({"projector": True, "extra_fcd_weight": 8.0, "scale": 4.0}, _LABELS),
    "warm_up": ({"margin_warmup_steps": 2, "scale": 8.0}, _LABELS),
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
    """The same parameters in every process."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters(), start=40):
            parameter.copy_(normal(seed, *parameter.shape))
    return module


def _run_head(options: dict[str, Any], labels: Tensor) -> Results:
    """Two steps of a linear student; the second one's loss, log and gradients."""
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
    for step, labels in enumerate((_LABELS, _MISSING, _LABELS.flip(0))):
        student, theirs = normal(31 + step, _B, d), normal(35 + step, _B, 6)
        loss(mine(student), mine(theirs), mine(labels))
    return {"state": loss.state_dict()}


def _run_primitives() -> Results:
    shard = _shard()
    rank, size = here()
    values = normal(25, _B, _CLASSES).split(_SPLIT if size == 2 else (_CLASSES,), dim=1)[rank]
    amount = normal(26, _B)
    return {
        "gathered": shard.gather(mine(amount)),
        "gathered_labels": shard.gather(mine(_LABELS)),
        "gathered_transposed": shard.gather(mine(normal(28, _B, 3)).T.contiguous().T),
        "sum": shard.sum(values.sum(dim=1)),
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
    """What each of two gloo processes found."""
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
    "key", ["gathered", "gathered_labels", "gathered_transposed", "sum", "logsumexp", "own"]
)
def test_what_is_reduced_is_the_same_everywhere(
    key: str, ranks: list[dict[str, Results]], alone: dict[str, Results]
) -> None:
    for results in ranks:
        assert_close(results["primitives"][key], alone["primitives"][key])


@pytest.mark.parametrize("key", ["add", "cosines"])
def test_what_is_split_by_class_fits_together(
    key: str, ranks: list[dict[str, Results]], alone: dict[str, Results]
) -> None:
    parts = [results["primitives"]["part"][key] for results in ranks]
    assert_close(torch.cat(parts, dim=1), alone["primitives"]["part"][key])


def test_two_ranks_are_a_world(ranks: list[dict[str, Results]], alone: dict[str, Results]) -> None:
    assert [results["primitives"]["world"] for results in ranks] == [True, True]
    assert not alone["primitives"]["world"]


def test_a_head_that_another_method_froze_is_no_error(ranks: list[dict[str, Results]]) -> None:
    """As proxylesskd does in a trainer's head, beside a method that compares."""
    assert all(found["primitives"]["frozen"] for found in ranks)
