"""Tables with a row for each class train the same student whether split over ranks or whole."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.measuring import peak_bytes
from kdhooks import ClassShard, Distiller, KDHooksError, Teacher
from kdhooks.classes.per_class import PerClass, digest, is_split
from kdhooks.classes.rows import Rows
from kdhooks.classes.splits import ClassSplit, ClassTables
from kdhooks.teacher_rows import TeacherRows
from kdhooks_plugins.coupleface import MutualRelations
from tests.maps import normal
from tests.ranks import Results, group, here, mine, on_ranks

RANKS = 4  # the methods' own tests run two ranks
CLASSES, BATCH, STEPS, ACCUMULATED = 7, 12, 2, 2
METHODS: dict[str, dict[str, Any]] = {
    "static": {"name": "coupleface", "k": 3},
    "two-sided": {"name": "coupleface", "k": 3, "two_sided": True, "projector": True},
    "near": {"name": "coupleface", "k": 3, "max_neighbour_sim": 0.3},
    "bank": {"name": "coupleface", "k": 3, "relations": "bank"},
    "averaged": {"name": "coupleface", "k": 6, "relations": "bank", "bank_momentum": 0.6},
    "icdface": {"name": "icdface", "slots": 2, "projector": True},
    "adadistill": {"name": "adadistill", "scale": 8.0},
    "quality": {"name": "adadistill", "scale": 8.0, "margin_type": "adaface", "geometry": 3.0},
    "proxylesskd": {"name": "proxylesskd", "head": "own", "scale": 8.0},
    "thkd": {"name": "thkd", "scale": 8.0},
}


class Student(nn.Module):
    """(b 3 2 2) -> (b 4), in float64 and without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4).double()
        with torch.no_grad():
            self.fc.weight.copy_(normal(1, 4, 12))
            self.fc.bias.copy_(normal(2, 4))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.fc(images.flatten(1))
        return found


def teach(images: Tensor) -> Tensor:
    return (images.flatten(1) @ normal(3, 12, 4).to(images)).tanh()


def patterns() -> Tensor:
    return normal(4, CLASSES, 3, 2, 2)


def rows() -> Tensor:
    return teach(patterns()).float()


def images_of(step: int, labels: Tensor) -> Tensor:
    """Return images near the pattern of their class, so that the teacher recognises them."""
    return patterns()[labels] + 0.2 * normal(20 + step, BATCH, 3, 2, 2)


def labels_of(step: int) -> Tensor:
    """Some samples have none; of four ranks the first one has no other samples."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(-1, CLASSES, (BATCH,), generator=generator)
    labels[: BATCH // 4] = -1
    return labels


def distiller(student: Student, *methods: dict[str, Any], **options: Any) -> Distiller:
    teacher = Teacher(teach, classifier=options.pop("rows", rows()))
    return Distiller(student, teacher, methods, input_shape=(3, 2, 2), **options)


def train(student: Student, kd: Distiller, steps: range) -> list[Tensor]:
    """The losses of some optimizer steps, of two batches each."""
    kd.accumulation = ACCUMULATED
    groups = [{"params": list(student.parameters())}, *kd.parameter_groups(0.0)]
    optimizer, losses = torch.optim.SGD(groups, lr=0.1), []
    for step in steps:
        optimizer.zero_grad()
        for part in range(ACCUMULATED):
            number = ACCUMULATED * step + part
            labels = labels_of(number)
            images = mine(images_of(number, labels))
            student(images)
            loss = sum(kd(images, mine(labels)).values()) / ACCUMULATED
            assert isinstance(loss, Tensor)
            loss.backward()
            losses.append(loss.detach())
        _average(student)
        optimizer.step()
    return losses


def _average(student: nn.Module) -> None:
    """Average the student's gradients, as DistributedDataParallel does."""
    if dist.is_initialized():
        for parameter in student.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def tables_of(kd: Distiller) -> list[Tensor]:
    return [table for m in kd.modules() if isinstance(m, PerClass) for table in m.tables()]


def outcome(method: dict[str, Any], **options: Any) -> Results:
    student = Student()
    with distiller(student, method, **options) as kd:
        losses = train(student, kd, range(STEPS))
        state = {name: t.clone() for name, t in kd.whole_state_dict().items()}
        return {
            "losses": torch.stack(losses),
            "student": student.state_dict(),
            "state": state,
            "split": is_split(kd),
            "bytes": sum(table.nbytes for table in tables_of(kd)),
        }


# --- several ranks -----------------------------------------------------------------------------


def resumed(method: dict[str, Any], folder: str) -> Results:
    """Return the losses of the straight run, and of those resumed from the two kinds of state."""
    rank, _ = here()
    student = Student()
    with distiller(student, method) as kd:
        train(student, kd, range(STEPS))
        saved = {"student": student.state_dict(), "kd": kd.state_dict()}
        torch.save(saved, f"{folder}/own_{rank}.pt")
        whole = kd.whole_state_dict()
        if rank == 0:
            torch.save(whole, f"{folder}/whole.pt")
        straight = train(student, kd, range(STEPS, 2 * STEPS))
    loaded = torch.load(f"{folder}/own_{rank}.pt", weights_only=True)
    gone_on = []
    for state in (loaded["kd"], torch.load(f"{folder}/whole.pt", weights_only=True)):
        again = Student()
        again.load_state_dict(loaded["student"])
        with distiller(again, method) as kd:
            kd.load_state_dict(state)
            gone_on.append(torch.stack(train(again, kd, range(STEPS, 2 * STEPS))))
    return {"straight": torch.stack(straight), "own": gone_on[0], "whole": gone_on[1]}


def copied() -> Results:
    """Copy a student that has kd as a child, as callbacks that average weights do."""
    student = Student()
    with distiller(student, METHODS["adadistill"]) as kd:
        student.kd = kd
        copies = copy.deepcopy(student), pickle.loads(pickle.dumps(student))
        error, copied_kd = "", copies[0].kd
        assert isinstance(copied_kd, Distiller)
        try:
            copied_kd.whole_state_dict()
        except KDHooksError as found:
            error = str(found)
        return {"weights": [one.fc.weight.detach() for one in copies], "whole": error}


def scenarios(folder: str) -> dict[str, Results]:
    found: dict[str, Results] = {}
    for name, method in METHODS.items():
        found[name] = outcome(method)
        found[f"{name}, whole"] = outcome(method, sharded=False)
    for name in ("averaged", "icdface", "adadistill"):
        found[f"{name}, resumed"] = resumed(METHODS[name], folder)
    found["copied"] = copied()
    sizes = [ClassSplit.even(total, group()) for total in (2, 7)]
    found["sizes"] = {"of 2 and 7": [len(split) for split in sizes]}
    rank, _ = here()
    heads = {
        "whole": ClassShard(rows(), 0, CLASSES),
        "of other classes": ClassShard(rows()[:1], rank, RANKS, group()),
        "split": ClassShard(rows()[: 4 if rank == 3 else 1], rank, CLASSES, group()),
    }
    found["beside"] = {name: len(ClassTables(h).split(CLASSES)) for name, h in heads.items()}
    with distiller(Student(), METHODS["static"]) as kd:
        torch.save(kd.state_dict(), f"{folder}/frozen_{rank}.pt")
    found["learnt whole"] = outcome(METHODS["bank"], learnt_whole=True)
    found["frozen, learnt whole"] = outcome(METHODS["static"], learnt_whole=True)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(RANKS, partial(scenarios, str(folder)), folder), folder


@pytest.mark.parametrize("name", METHODS)
def test_split_tables_train_like_whole_ones(ranks: Any, name: str) -> None:
    """Values, gradients and state agree; some samples have no label, and the split is uneven."""
    found, _ = ranks
    for of_rank in found:
        split, whole = of_rank[name], of_rank[f"{name}, whole"]
        assert split["split"]
        assert not whole["split"]
        assert split["bytes"] < whole["bytes"]
        assert_close(split["student"], whole["student"], rtol=1e-9, atol=1e-12)
        assert_close(split["state"], whole["state"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["", ", whole"])
@pytest.mark.parametrize("name", METHODS)
def test_several_ranks_train_as_one(ranks: Any, name: str, form: str) -> None:
    """The factor of the gradients is 1, also if a rank has fewer labelled samples than others."""
    found, _ = ranks
    alone = outcome(METHODS[name])
    losses = torch.stack([of_rank[f"{name}{form}"]["losses"] for of_rank in found])
    assert_close(losses.mean(dim=0), alone["losses"], rtol=1e-6, atol=1e-9)
    for of_rank in found:
        assert_close(of_rank[f"{name}{form}"]["student"], alone["student"])
        assert_close(of_rank[f"{name}{form}"]["state"], alone["state"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["averaged", "icdface", "adadistill"])
@pytest.mark.parametrize("state", ["own", "whole"])
def test_each_rank_resumes_to_the_last_bit(ranks: Any, name: str, state: str) -> None:
    """From its own state, and from the classes of its own that it cuts out of the whole state."""
    found, _ = ranks
    for of_rank in found:
        losses = of_rank[f"{name}, resumed"]
        assert torch.equal(losses["straight"], losses[state])


def test_the_first_ranks_have_one_class_more_and_no_rank_has_none(ranks: Any) -> None:
    """Fewer classes than ranks are whole on each of them."""
    found, _ = ranks
    assert {of_rank["sizes"]["of 2 and 7"][0] for of_rank in found} == {2}
    sizes = [of_rank["sizes"]["of 2 and 7"][1] for of_rank in found]
    assert sizes == [2, 2, 2, 1]


def test_tables_follow_a_split_head_of_the_same_classes(ranks: Any) -> None:
    found = {name: [of_rank["beside"][name] for of_rank in ranks[0]] for name in ("whole", "split")}
    assert found == {"whole": [2, 2, 2, 1], "split": [1, 1, 1, 4]}
    assert [of_rank["beside"]["of other classes"] for of_rank in ranks[0]] == [2, 2, 2, 1]


def test_a_host_that_saves_one_rank_keeps_learnt_tables_whole(ranks: Any) -> None:
    found, _ = ranks
    for of_rank in found:
        assert not of_rank["learnt whole"]["split"]
        assert of_rank["frozen, learnt whole"]["split"]  # training does not change these
        assert_close(of_rank["learnt whole"]["student"], of_rank["bank"]["student"])


def test_a_student_with_split_tables_is_copied(ranks: Any) -> None:
    for of_rank in ranks[0]:
        for weight in of_rank["copied"]["weights"]:
            assert torch.equal(weight, Student().fc.weight)


def test_a_copy_does_not_pass_its_part_off_as_the_whole(ranks: Any) -> None:
    for of_rank in ranks[0]:
        assert "adadistill: a copy has the classes" in of_rank["copied"]["whole"]


def test_the_whole_state_is_loaded_by_any_number_of_ranks(ranks: Any) -> None:
    _, folder = ranks
    with distiller(Student(), METHODS["adadistill"]) as kd:
        kd.load_state_dict(torch.load(folder / "whole.pt", weights_only=True))
        assert kd.step == STEPS * ACCUMULATED


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_state_of_frozen_tables_is_loaded_by_any_number_of_ranks(ranks: Any, rank: int) -> None:
    """Each rank's state holds the digest of all classes."""
    _, folder = ranks
    with distiller(Student(), METHODS["static"]) as kd:
        kd.load_state_dict(torch.load(folder / f"frozen_{rank}.pt", weights_only=True))


def test_a_part_of_the_state_is_refused_by_another_number_of_ranks(ranks: Any) -> None:
    _, folder = ranks
    state = torch.load(folder / "own_0.pt", weights_only=True)["kd"]
    with (
        distiller(Student(), METHODS["adadistill"]) as kd,
        pytest.raises(KDHooksError, match=r"holds the classes 0 to \d, and this rank has thos"),
    ):
        kd.load_state_dict(state)


# --- one rank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["static", "proxylesskd", "bank"])
def test_a_checkpoint_holds_a_digest_of_frozen_rows(name: str) -> None:
    with distiller(Student(), METHODS[name]) as kd:
        state = kd.state_dict()
        if name != "bank":  # which is learnt; its neighbours follow from the rows
            assert sum(tensor.nbytes for tensor in state.values()) < rows().nbytes
        kd.load_state_dict(state)
    others = rows().flip(0)
    with (
        distiller(Student(), METHODS[name], rows=others) as kd,
        pytest.raises(KDHooksError, match="class rows must be those of the run that is resum"),
    ):
        kd.load_state_dict(state)


def test_other_classes_are_refused() -> None:
    with distiller(Student(), METHODS["bank"]) as kd:
        state = kd.state_dict()
    with (
        distiller(Student(), METHODS["bank"], rows=rows()[:5]) as kd,
        pytest.raises(KDHooksError, match="saved with 7 classes, and there are 5; resume with"),
    ):
        kd.load_state_dict(state)


@pytest.mark.parametrize("entry", ["centres", "_extra_state"])
def test_a_state_without_a_table_or_its_classes_is_refused_by_torch(entry: str) -> None:
    name = f"losses.adadistill.{entry}"
    with distiller(Student(), METHODS["adadistill"]) as kd:
        state = {key: value for key, value in kd.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            kd.load_state_dict(state)
        kd.load_state_dict(state, strict=False)


def test_frozen_rows_in_float16_stay_so_and_change_the_losses_little() -> None:
    for name in ("static", "proxylesskd", "thkd", "adadistill"):
        student, precise = Student(), outcome(METHODS[name])
        with distiller(student, METHODS[name], table_dtype="float16") as kd:
            losses = torch.stack(train(student, kd, range(STEPS)))
            frozen = [table for table in tables_of(kd) if table.dtype == torch.float16]
            assert [len(one) for one in frozen] == [CLASSES]
            kd.load_state_dict(kd.state_dict())
        # Centres start at the rows before rounding.
        assert torch.equal(losses, precise["losses"]) == (name == "adadistill")
        assert_close(losses, precise["losses"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["adadistill", "averaged", "icdface"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_student_that_is_converted_later_keeps_learnt_tables_precise(
    name: str, dtype: torch.dtype
) -> None:
    """A step of a centre may be too small for bfloat16."""
    student = Student().float()
    with distiller(student, {"name": "fcd", "projector": True}, METHODS[name]) as kd:
        student.to(dtype)
        for step in range(2):
            labels = labels_of(step)
            images = images_of(step, labels).to(dtype)
            student(images)
            total = torch.stack([*kd(images, labels).values()]).sum()
            assert total.isfinite()
        learnt = [buffer for buffer in kd.buffers() if buffer.ndim > 1]
        assert learnt
        for table in learnt:
            assert table.dtype in (torch.long, torch.promote_types(dtype, torch.float32))


def test_the_digest_of_a_table_is_the_sum_of_those_of_its_parts() -> None:
    table = rows()
    parts = digest(table[:3], 0) + digest(table[3:], 3)
    assert digest(table, 0) == parts % 2**63
    assert digest(table, 1) != digest(table, 0)
    assert digest(table.flip(0), 0) != digest(table, 0)


@pytest.mark.parametrize("name", ["teacher", "coupleface"])
def test_a_rank_reads_its_own_rows_and_never_holds_twice_as_many(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdhooks.classes.rows._CHUNK", 64)
    table, own = normal(7, 4096, 32).float(), slice(1024, 2048)
    for rank, part in enumerate(table.chunk(4)):
        torch.save({"weight": part.clone()}, tmp_path / f"checkpoint_gpu_{rank}.pt")
    rows = Rows.open(tmp_path / "checkpoint_gpu_*.pt")
    split, kept = ClassSplit(own.start, own.stop, 4096), torch.float32
    found: list[Tensor] = []

    def read() -> None:
        if name == "teacher":
            found.append(TeacherRows(rows, split, [], kept, kept).rows)
        else:
            loss = MutualRelations(split, torch.zeros(0, 3))
            loss.keep_rows("prototypes", rows.slice(own.start, own.stop), kept, unit=True)
            found.append(loss.prototypes)

    assert peak_bytes(read, torch.device("cpu")) < 1.5 * table[own].nbytes
    unit = name == "coupleface"
    assert_close(found[0], nn.functional.normalize(table[own]) if unit else table[own])


def test_rows_that_a_host_takes_over_are_not_held_twice() -> None:
    head = ClassSplit.whole(CLASSES).shard(rows())
    kept = torch.float32
    held = TeacherRows(Rows.open(rows()), ClassSplit.whole(CLASSES), [], kept, kept, head)
    assert held.rows.untyped_storage().nbytes() == 0
    assert held.shard().weight.data_ptr() == head.weight.data_ptr()


def test_one_process_has_all_classes() -> None:
    assert ClassTables().split(5) == ClassSplit.whole(5) == ClassSplit(0, 5, 5)
    split = ClassSplit(2, 5, 9)
    places, mine_ = split.places(torch.tensor([-1, 1, 2, 4, 5]))
    assert mine_.tolist() == [False, False, True, True, False]
    assert places[mine_].tolist() == [0, 2]
    assert places.amin() >= 0
    assert places.amax() < len(split)
