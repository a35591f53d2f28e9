"""Several ranks must have the same terms, batch sizes, buffers and gradients."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.testing import assert_close

from kdhooks import (
    ClassShard,
    ClassSplit,
    Distiller,
    EmbeddingTap,
    KDHooksError,
    Model,
    PerClass,
    Teacher,
    hookimpl,
)
from kdhooks.classes.per_class import share_digests
from kdhooks.replicas import own_buffers
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_plugins.fcd import FCD
from tests.ranks import Results, group, here, mine, on_two_ranks
from tests.small_distiller import teacher_network

SIZE: dict[str, Any] = {"input_shape": (3, 32, 32)}
STAGES: dict[str, Any] = {
    "student_stages": [f"layer{n}" for n in (1, 2, 3, 4)],
    "teacher_stages": [f"layer{n}" for n in (1, 2, 3, 4)],
}


def student() -> TinyFaceNet:
    torch.manual_seed(0)
    return TinyFaceNet().train()


def distiller(net: nn.Module, *methods: object, **options: Any) -> Distiller:
    return Distiller(net, tiny_teacher(), list(methods), **{**SIZE, **options})


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([*terms.values()]).sum()


# --- the same terms ------------------------------------------------------------------------------


def _different(*methods: object) -> str:
    """Return the error if each rank has the method at its own index."""
    try:
        distiller(student(), "fcd", methods[here()[0]], **STAGES).remove()
    except KDHooksError as error:
        return str(error)
    return ""


def _of_classes(
    *methods: object, classes: int = 6, rows: Tensor | None = None, **options: Any
) -> str:
    """The error of a run with class rows of its own, or of saving after its first step."""
    table = torch.eye(12)[:classes] if rows is None else rows
    module = teacher_network()
    teacher = Teacher(module, classifier=table)
    try:
        kd = Distiller(student(), teacher, list(methods), **{**SIZE, **options})
    except KDHooksError as error:
        return str(error)
    try:
        if here()[0] == 1:
            kd._finite.check = _lost  # type: ignore[method-assign]
        kd.whole_state_dict()
    except KDHooksError as error:
        return str(error)
    finally:
        kd.remove()
    return ""


def _other_totals() -> str:
    """The error of a table whose ranks disagree only on the number of all classes."""
    rank, _ = here()
    loss = PerClass(ClassSplit(3 * rank, 3 * rank + 3, 6 + rank, group()), "table")
    try:
        share_digests(loss)
    except KDHooksError as error:
        return str(error)
    return ""


def _lost() -> None:
    raise KDHooksError("step 1: coupleface not finite")


def _class_scenarios() -> dict[str, Any]:
    rank, _ = here()
    spoilt = torch.eye(12)[:6]
    spoilt[5] = torch.nan  # a row of rank 1
    bank, static = ({"name": "coupleface", "relations": kind} for kind in ("bank", "static"))
    weight = nn.Parameter(torch.randn(3, 12))
    double = ClassShard(weight, 0, 6, group())
    empty = ClassShard(weight[: 1 - rank], rank, 1, group())
    rows = (1 + rank) * torch.eye(12)[:6]
    many = torch.arange(3600.0).reshape(300, 12)
    many[1] += rank  # one of the rows that ranks do not compare at the start
    coupleface = [{"name": "coupleface", "prototypes": p} for p in (None, rows, torch.eye(12)[:6])]
    errors = {
        "one has tables": _of_classes("thkd" if rank else "fcd"),
        "one more table": _of_classes("thkd", *["coupleface"][rank:]),
        "other tables": _of_classes((bank, static)[rank]),
        "one is split": _of_classes("thkd", sharded=bool(rank)),
        "other precision": _of_classes("thkd", table_dtype=("float16", "float32")[rank]),
        "other classes": _of_classes("icdface", classes=6 - rank),
        "other rows": _of_classes("thkd", rows=rows),
        "other rows for a host": _of_classes("proxylesskd", rows=rows, host_head="margin"),
        "other whole rows": _of_classes("thkd", rows=many, sharded=False),
        "other prototypes": _of_classes(coupleface[1]),
        "one has prototypes": _of_classes(coupleface[2 * rank]),
        "other neighbours": _of_classes({"name": "coupleface", "k": 2 + rank}),
        "other totals": _other_totals(),
        "spoilt rows": _of_classes("thkd", rows=spoilt),
        "wrong argument": _of_classes("thkd", seed=-rank),
        "doubled classes": _of_classes("thkd", head=double),
        "no class": _of_classes("thkd", rows=torch.eye(12)[:1], head=empty),
        "saving": _of_classes(bank),
    }
    return {f"classes, {name}": {"error": error} for name, error in errors.items()}


def _other_teachers() -> str:
    """Return the error of ranks whose teachers have different weights."""
    module = teacher_network()
    with torch.no_grad():
        next(module.parameters()).mul_(1 + here()[0])
    try:
        Distiller(student(), module, ["fcd"], **SIZE).remove()
    except KDHooksError as error:
        return str(error)
    return ""


def _changed(how: str) -> list[Tensor]:
    """Return the losses' parameters after steps in which they were unfrozen or replaced."""
    images, labels = (mine(x) for x in tiny_batch())
    kd = distiller(net := student(), {"name": "fcd", "projector": True})
    if how == "frozen":
        kd = distiller(net := student(), _Frozen())
    wrapped = DistributedDataParallel(net)
    for step in range(4):
        if step == 2 and how == "frozen":
            kd.requires_grad_(True)
        if step == 2 and how == "assigned":
            kd.load_state_dict(copy.deepcopy(kd.state_dict()), assign=True)
        wrapped(images)
        total(kd(images, labels)).backward()
        for parameter in kd.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
        pickle.loads(pickle.dumps(kd))  # hooks must not prevent pickling
    kd.remove()
    return [parameter.detach() for parameter in kd.parameters()]


class _Frozen:
    """fcd with a projector that is initially frozen."""

    @hookimpl
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
        tap = FCD(projector=True).embedding_tap(student, teacher)
        tap.loss.requires_grad_(False)
        return tap


class _Distance(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return self.number * (student - teacher).square().mean()


class _Numbered:
    """A method whose number is not an option."""

    def __init__(self, number: int) -> None:
        self.number = number

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("numbered", _Distance(self.number))


# --- batches -------------------------------------------------------------------------------------


def _uneven(method: str, **options: Any) -> tuple[str, int]:
    """Run two even steps and one with two samples fewer on rank 1; return error and step."""
    images, labels = (mine(x) for x in tiny_batch())
    kd = distiller(net := student(), method, **options)
    found = ""
    for step in range(3):
        count = 4 if step == 2 and here()[0] == 1 else 6
        net(images[:count])
        try:
            total(kd(images[:count], labels[:count])).backward()
        except KDHooksError as error:
            found = str(error)
            break
    kd.remove()
    return found, kd.step


# --- buffers -------------------------------------------------------------------------------------


class Averages(nn.Module):
    """Keeps a running mean of the embeddings, and a number that differs by rank."""

    mean: Tensor
    own: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))
        self.register_buffer("own", torch.zeros(()))

    def buffers_by_rank(self) -> set[str]:
        return {"own"}

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        with torch.no_grad():
            self.mean.lerp_(student.mean(dim=0), 0.5)
            self.own.add_(here()[0] + 1)
        return (student - teacher - self.mean).square().mean()


class Keeping:
    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("keeping", Averages())


def _buffers(wrapped: bool) -> Results:
    images, labels = (mine(x) for x in tiny_batch())
    net = DistributedDataParallel(inner := student()) if here()[1] > 1 else (inner := student())
    kd = distiller(inner, Keeping(), "acsr", **STAGES)
    losses: nn.Module = DistributedDataParallel(kd) if wrapped and here()[1] > 1 else kd
    optimizer = SGD([*inner.parameters(), *kd.parameters()], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        net(images)
        total(losses(images, labels)).backward()
        optimizer.step()
    kd.remove()
    own = kd.losses["keeping"].own
    shared = {name: b for name, b in kd.named_buffers() if not name.endswith("own")}
    return {"own": own, "shared": shared}


def _sharded_inside_ddp(told: bool) -> str:
    """Train adadistill with each rank's own classes as the child of a module that DDP wraps.

    told: whether DDP is told to ignore these buffers.
    """

    class Whole(nn.Module):
        def __init__(self, net: nn.Module, kd: Distiller) -> None:
            super().__init__()
            self.net, self.kd = net, kd

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            self.net(images)
            return total(self.kd(images, labels))

    rank, _ = here()
    images, labels = (mine(x) for x in tiny_batch())
    head = ClassShard(nn.Parameter(torch.randn(3, 12)), 3 * rank, 6, group())
    kd = distiller(net := student(), "adadistill", head=head)
    whole = Whole(net, kd)
    if told:
        names = [f"kd.{name}" for name in own_buffers(kd)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, names)
    wrapped = DistributedDataParallel(whole)
    try:
        for _ in range(2):
            wrapped(images, labels).backward()
        kd.load_state_dict(kd.state_dict())
        wrapped(images, labels).backward()
    except KDHooksError as error:
        return str(error)
    finally:
        kd.remove()
    return ""


# --- gradients of a static graph -----------------------------------------------------------------


def _static_graph(alone: bool) -> tuple[str, list[Tensor]]:
    """Train only on the terms, or also on a loss of the module's output."""
    images, labels = (mine(x) for x in tiny_batch())
    net = student()
    kd = distiller(net, "fcd")
    wrapped = DistributedDataParallel(net, static_graph=True)
    optimizer = SGD(net.parameters(), lr=0.01)
    try:
        for _ in range(3):
            optimizer.zero_grad()
            embedding = wrapped(images)
            loss = total(kd(images, labels))
            if not alone:
                loss = loss + F.cross_entropy(embedding, labels)
            loss.backward()
            optimizer.step()
    except KDHooksError as error:
        return str(error), []
    finally:
        kd.remove()
    return "", [parameter.detach() for parameter in net.parameters()]


# --- all of it on two ranks ----------------------------------------------------------------------


def _scenarios() -> dict[str, Any]:
    sharded = {"head": ClassShard(nn.Parameter(torch.randn(3, 12)), 3 * here()[0], 6, group())}
    return {
        "methods": {"error": _different("at", "rkd")},
        "weights": {
            "error": _different({"name": "at", "weight": 1.0}, {"name": "at", "weight": 2})
        },
        "one option": {
            "error": _different(*({"name": "rkd", "angle_weight": a} for a in (1.0, 2.0)))
        },
        "one number": {"error": _different(_Numbered(1), _Numbered(2))},
        "teachers": {"error": _other_teachers()},
        "frozen": {"losses": _changed("frozen")},
        "assigned": {"losses": _changed("assigned")},
        "uneven rkd": dict(zip(("error", "step"), _uneven("rkd"), strict=True)),
        "uneven thkd": dict(zip(("error", "step"), _uneven("thkd", **sharded), strict=True)),
        "uneven fcd": dict(zip(("error", "step"), _uneven("fcd"), strict=True)),
        "buffers": _buffers(wrapped=False),
        "buffers wrapped": _buffers(wrapped=True),
        "sharded": {"error": _sharded_inside_ddp(told=False)},
        "sharded, told": {"error": _sharded_inside_ddp(told=True)},
        "static alone": dict(zip(("error", "net"), _static_graph(alone=True), strict=True)),
        "static": dict(zip(("error", "net"), _static_graph(alone=False), strict=True)),
        **_class_scenarios(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("rank_guards"))


Ranks = list[dict[str, Results]]


def test_ranks_with_different_methods_are_refused_by_name(ranks: Ranks) -> None:
    for rank in ranks:
        message = rank["methods"]["error"]
        assert "all ranks must declare the same terms" in message
        assert "only rank 0 has: the method AT" in message
        assert "only rank 1 has: the method RKD" in message


def test_ranks_with_different_weights_are_refused(ranks: Ranks) -> None:
    for rank in ranks:
        assert "all ranks must declare the same terms" in rank["weights"]["error"]


def test_ranks_with_other_options_or_teachers_are_refused(ranks: Ranks) -> None:
    for rank in ranks:
        assert "the method RKD with angle_weight = 1.0; only" in rank["one option"]["error"]
        assert "only rank 0 has: EmbeddingTap numbered" in rank["one number"]["error"]
        assert "only rank 0 has: a teacher with weights of" in rank["teachers"]["error"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one has tables", "only rank 0 has: the method FCD; only rank 1 has: the method THKD"),
        ("one more table", "only rank 0 has: the method CoupleFace; only rank 1 has: none"),
        ("other tables", "only rank 0 has: the method CoupleFace with relations = 'bank'"),
        ("one is split", "only rank 0 has: class tables with sharded = False"),
        ("other precision", "rows in torch.float16; only rank 1 has: class tables with"),
        ("other classes", "only rank 1 has: teacher.classifier: 5 class rows of width 12"),
        ("other rows", "teacher.classifier: 6 class rows of width 12, 6 of them with the digest"),
        ("other rows for a host", "only rank 0 has: teacher.classifier: 6 class rows of width"),
        ("other whole rows", "only rank 0 has: teacher.classifier: 300 classes, rows with the dig"),
        ("other prototypes", "prototypes = a Tensor, prototypes: 6 class rows of width 12, 6 of"),
        ("one has prototypes", "only rank 0 has: the method CoupleFace; only rank 1 has: the meth"),
        ("other neighbours", "the method CoupleFace with k = 2; only rank 1 has: the method Coupl"),
        ("other totals", "table: the ranks must share the same classes, each rank at least one"),
        ("spoilt rows", "that of class 5 in the tensor given is not finite"),
        ("wrong argument", "Distiller: seed must be at least 0"),
        ("doubled classes", "each class must be on one rank; found 0 to 2 of 6, 0 to 2 of 6"),
        ("no class", "each rank at least one, and each class must be on one rank; found 0 to 0"),
        ("saving", "step 1: coupleface not finite"),
    ],
)
def test_ranks_that_disagree_on_classes_fail_together(
    ranks: Ranks, name: str, message: str
) -> None:
    """None of them waits for another one, and each has the reason in its error."""
    for rank in ranks:
        assert message in rank[f"classes, {name}"]["error"]


@pytest.mark.parametrize("how", ["frozen", "assigned"])
def test_parameters_that_were_unfrozen_or_replaced_stay_equal(ranks: Ranks, how: str) -> None:
    zero, one = (rank[how]["losses"] for rank in ranks)
    assert_close(zero, one, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["rkd", "thkd"])
def test_an_uneven_batch_of_a_loss_over_all_ranks_names_the_sizes(
    ranks: Ranks, method: str
) -> None:
    for rank in ranks:
        found = rank[f"uneven {method}"]
        assert "whose batches must be of one size; found [6, 4] by rank" in found["error"]
        assert found["step"] == 2


def test_an_uneven_batch_of_another_loss_is_no_error(ranks: Ranks) -> None:
    assert [rank["uneven fcd"] for rank in ranks] == [{"error": "", "step": 3}] * 2


@pytest.mark.parametrize("way", ["buffers", "buffers wrapped"])
def test_buffers_are_the_ranks_mean_unless_a_loss_keeps_them_by_rank(
    ranks: Ranks, way: str
) -> None:
    zero, one = (rank[way] for rank in ranks)
    assert len(zero["shared"]) > 3, "acsr keeps a running mean of each stage and kind"
    assert_close(zero["shared"], one["shared"], rtol=0, atol=0)
    assert (float(zero["own"]), float(one["own"])) == (3.0, 6.0)
    assert_close(ranks[0]["buffers"]["shared"], zero["shared"])


def test_a_ddp_that_would_overwrite_the_ranks_own_classes_is_refused(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["sharded, told"]["error"] == ""
    assert "holds this rank's own classes, but was overwritten" in ranks[1]["sharded"]["error"]


def test_a_static_graph_that_averages_nothing_is_refused(ranks: Ranks) -> None:
    for rank in ranks:
        assert "static_graph=True) averaged no gradient" in rank["static alone"]["error"]
        assert rank["static"]["error"] == ""
    assert_close(ranks[0]["static"]["net"], ranks[1]["static"]["net"], rtol=0, atol=0)
