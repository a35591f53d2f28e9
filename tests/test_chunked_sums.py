"""Losses computed by chunks of classes equal those of all classes, and never hold all scores."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.overhead.measures import tensor_bytes
from kdhooks import ClassShard, KDHooksError, Model, Wanted
from kdhooks.classes.chunked_sums import NUMBERS, Measure, chunk_size, over_rows
from kdhooks_plugins import gkd
from kdhooks_plugins.adadistill import AdaDistill
from kdhooks_plugins.gkd import GKD
from kdhooks_plugins.kd import KD
from kdhooks_plugins.margindistillation import MarginDistillation
from kdhooks_plugins.proxylesskd import ProxylessKD
from kdhooks_plugins.thkd import THKD
from tests.maps import normal

WIDTH = 6
METHODS: dict[str, Callable[[], Any]] = {
    "kd": lambda: KD(standardize=False),
    "kd with a margin": lambda: KD(margin=0.4, standardize=False),
    "kd, standardized": KD,
    "gkd": lambda: GKD(tau=0.5, largest=5, standardize=False),
    "gkd, standardized": lambda: GKD(tau=0.5, largest=5),
    "thkd": THKD,
    "proxylesskd": lambda: ProxylessKD(head="own"),
    "margindistillation": MarginDistillation,
    "adadistill": AdaDistill,
}
COMPARE = ("kd", "kd with a margin", "kd, standardized", "gkd", "gkd, standardized")


@pytest.fixture(autouse=True)
def _numbers() -> Iterator[None]:
    before = dict(NUMBERS)
    yield
    NUMBERS.update(before)


def loss_of(name: str) -> nn.Module:
    hook = METHODS[name]().classifier_share
    tap = hook() if name in COMPARE else hook(Model(None, WIDTH), Model(None, WIDTH))
    loss: nn.Module = tap.loss.double()
    return loss


def forward(
    name: str,
    seed: int,
    b: int,
    c: int,
    rows_at_a_time: int,
    dtype: torch.dtype = torch.float64,
    wrapped: Callable[[nn.Module], Any] = lambda loss: loss,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the tensors that it trains."""
    NUMBERS["cpu"] = rows_at_a_time * max(b, WIDTH)
    student = normal(seed, b, WIDTH).to(dtype).requires_grad_()
    head = normal(seed + 1, c, WIDTH).to(dtype).requires_grad_()
    labels = torch.randint(-1, c, (b,), generator=torch.Generator().manual_seed(seed))
    rows = [ClassShard(normal(seed + 2, c, WIDTH).to(dtype), 0, c)]
    if name in COMPARE:
        rows.append(ClassShard(head, 0, c))
    teacher = normal(seed + 3, b, WIDTH).to(dtype)
    value: Tensor = wrapped(loss_of(name).to(dtype))(student, teacher, labels, *rows)[0]
    return value, [student, head][: len(rows)]


def outcome(
    name: str, seed: int, b: int, c: int, some: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return the value and the gradients."""
    value, inputs = forward(name, seed, b, c, some, dtype)
    value.backward()
    gradients = [x.grad for x in inputs if x.grad is not None]
    assert len(gradients) == len(inputs)
    return [value.detach(), *gradients]


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16), st.integers(1, 8), st.integers(1, 40), st.integers(1, 15))
def test_chunks_of_any_size_agree_with_one_chunk(
    name: str, seed: int, b: int, c: int, some: int
) -> None:
    assert_close(outcome(name, seed, b, c, some), outcome(name, seed, b, c, c))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is created inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [
            x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and not x._is_view()
        ]
        self.numbers = max([self.numbers, *made])
        return result


@pytest.mark.parametrize("name", METHODS)
def test_the_scores_of_all_classes_are_never_held(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, c = 64, 3000
    monkeypatch.setattr(gkd, "_BINS", 64)  # its default would exceed the limit below
    with Largest() as largest:
        outcome(name, 1, b, c, 100)
    assert largest.numbers <= c * WIDTH, "rows and their gradient are the largest"
    assert c * WIDTH < b * c / 10
    with Largest() as largest:
        outcome(name, 1, b, c, c)
    assert largest.numbers >= b * c


def counted(calls: list[int]) -> Measure:
    def lse(x: Tensor, rows: Tensor, start: int) -> Wanted:
        calls.append(start)
        constant = rows.detach()[:, 0].expand(len(x), -1)
        return Wanted(logs=[x @ rows.T], means=[((x @ rows.T).sin(), constant)])

    return lse


@pytest.mark.parametrize("trained", [False, True])
def test_frozen_rows_are_measured_once_and_trained_ones_again_for_their_gradient(
    trained: bool,
) -> None:
    NUMBERS["cpu"] = 20  # 4 rows of 5
    calls: list[int] = []
    x, rows = normal(1, 3, 5).requires_grad_(), normal(2, 10, 5).requires_grad_(trained)
    (log,), (mean,), (under,) = over_rows(counted(calls), x, rows)
    assert calls == [0, 4, 8]
    weight = normal(3, 2, 3)
    (weight * torch.stack([log, mean])).sum().backward()
    assert calls == [0, 4, 8] * (2 if trained else 1)
    again, other = x.detach().requires_grad_(), rows.detach().requires_grad_()
    scores, constant = again @ other.T, rows.detach()[:, 0]
    expected = torch.stack(
        [scores.logsumexp(dim=1), (scores.sin() * constant.softmax(dim=0)).sum(dim=1)]
    )
    (weight * expected).sum().backward()
    assert_close(torch.stack([log, mean]), expected)
    assert_close(under, constant.logsumexp(dim=0).expand(3))
    assert_close(x.grad, again.grad)
    if trained:
        assert_close(rows.grad, other.grad)


def test_large_scores_and_chunks_without_any_are_handled() -> None:
    NUMBERS["cpu"] = 4
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64).requires_grad_()
    rows = torch.tensor([[-1e30, 0.0], [0.0, 1e4], [0.0, -1e4], [0.0, -1e4]]).double()
    (log,), (mean,), _ = over_rows(
        lambda x, rows, _: Wanted([x @ rows.T], [(x @ rows.T, (x @ rows.T).detach())]), x, rows
    )
    (log + mean).backward()
    assert_close(log, torch.tensor([1e4 + math.log(2)]).double())
    assert_close(mean, torch.tensor([1e4]).double())
    assert x.grad is not None
    assert_close(x.grad, torch.tensor([[0.0, -2e4]]).double())


def test_without_grad_nothing_is_differentiated() -> None:
    def refuses(x: Tensor, rows: Tensor, start: int) -> Wanted:
        assert not torch.is_grad_enabled()
        return Wanted([x @ rows.T])

    with torch.no_grad():
        found = over_rows(refuses, normal(1, 3, 5).requires_grad_(), normal(2, 10, 5))
    assert not found[0].requires_grad


def test_rows_that_change_before_backward_are_noticed() -> None:
    x, rows = normal(1, 3, 5).requires_grad_(), normal(2, 10, 5).requires_grad_()
    found = over_rows(counted([]), x, rows)[0].sum()
    with torch.no_grad():
        rows += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.parametrize("name", METHODS)
def test_autocast_around_backward_changes_nothing(name: str) -> None:
    found = []
    for dtype in (None, torch.bfloat16, torch.float16):
        value, inputs = forward(name, 1, 4, 9, 3, torch.float32)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            value.backward()
        found.append([x.grad for x in inputs])
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(found[2], found[0], rtol=0, atol=0)


def test_autocast_around_scores_changes_nothing() -> None:
    x, rows = normal(1, 3, 5).float(), normal(2, 10, 5).float()
    expected = over_rows(counted([]), x, rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(over_rows(counted([]), x, rows), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in COMPARE])
def test_a_loss_that_is_kept_after_backward_keeps_no_gradients_of_chunks(name: str) -> None:
    kept: list[Tensor] = []
    b, c = 16, 200

    def step(backward: bool) -> None:
        value, inputs = forward(name, 1, b, c, 50)
        if backward:
            value.backward()
        kept[:] = [value, *inputs, *(x.grad for x in inputs if x.grad is not None)]

    own = 8 * (2 * b * WIDTH + 1)  # the student, its gradient and the value
    assert tensor_bytes(partial(step, True)).held <= own
    assert tensor_bytes(partial(step, False)).held > own, "this would be noticed"


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_chunks_are_measured_once_more_at_most(reentrant: bool) -> None:
    NUMBERS["cpu"] = 20
    calls: list[int] = []
    rows, x = normal(2, 40, 5), normal(1, 3, 5).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return over_rows(counted(calls), x, rows)[0].sum()

    value = checkpoint(loss, x, use_reentrant=reentrant)
    value.backward()
    assert len(calls) == 2 * 10
    again = x.detach().requires_grad_()
    (again @ rows.T).logsumexp(dim=1).sum().backward()
    assert_close(x.grad, again.grad)


def test_a_chunk_has_at_least_one_row() -> None:
    NUMBERS["cpu"] = 10
    assert chunk_size(torch.ones(3, 2), False) == 3
    assert chunk_size(torch.ones(2, 5), False) == 2
    assert chunk_size(torch.ones(11, 2), False) == 1


def test_chunks_of_a_shard_are_its_classes_in_order() -> None:
    NUMBERS["cpu"] = 15
    rows, x = normal(1, 7, 5), normal(2, 2, 5)
    shard = ClassShard(rows, 20, 40)
    chunks = list(shard.chunks(x))
    assert [(chunk.offset, len(chunk.weight)) for chunk in chunks] == [(20, 3), (23, 3), (26, 1)]
    assert_close(torch.cat([chunk.weight for chunk in chunks]), rows)
    other = ClassShard(normal(3, 7, 4), 20, 40)
    assert_close(torch.cat([other.part(chunk).weight for chunk in chunks]), other.weight)
    seen: list[tuple[int, int]] = []

    def measure(x: Tensor, chunk: ClassShard) -> Wanted:
        seen.append((chunk.offset, len(chunk.weight)))
        return Wanted(logs=[chunk.cosines(x)])

    ((found,), ()) = shard.over_classes(measure, x)
    assert seen == [(20, 3), (23, 3), (26, 1)]
    assert_close(found, shard.cosines(x).logsumexp(dim=1))


def test_own_cosines_are_those_of_the_labels_classes() -> None:
    shard = ClassShard(normal(2, 12, 3), 0, 12)
    x, labels = normal(3, 4, 3), torch.tensor([0, 11, 5, -1])
    cosines = F.cosine_similarity(x, shard.weight[labels]) * (labels >= 0)
    assert_close(shard.own(x, labels), cosines)


@pytest.mark.parametrize("trained", [False, True])
def test_a_mean_without_any_log_is_that_of_all_chunks(trained: bool) -> None:
    NUMBERS["cpu"] = 15
    rows, x = normal(1, 7, 5).requires_grad_(trained), normal(2, 2, 5).requires_grad_()
    starts: list[int] = []

    def of(x: Tensor, chunk: ClassShard) -> Wanted:
        starts.append(chunk.offset)
        z, constant = x @ chunk.weight.T, chunk.weight.detach()[:, 0].expand(len(x), -1)
        return Wanted(logs=[], means=[(z, z.detach()), (z.sin(), constant)])

    ((), found) = ClassShard(rows, 0, 7).over_classes(of, x)
    assert starts == [0, 3, 6]
    ((), last) = ClassShard(rows[6:], 6, 7).over_classes(of, x)
    expected = [(v * z.softmax(dim=1)).sum(dim=1) for v, z in of(x, ClassShard(rows, 0, 7)).means]
    inputs = [x, rows][: 1 + trained]
    for mean, whole, of_last in zip(found, expected, last, strict=True):
        assert_close(mean, whole)
        assert not torch.isclose(mean, of_last).any(), "that of the last chunk would be noticed"
        ours, theirs = (
            torch.autograd.grad(y.sum(), inputs, retain_graph=True) for y in (mean, whole)
        )
        assert_close(ours, theirs)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("gone", [(0, 1), (0, 1, 2, 3), (2, 3), (4, 5), (6,), (1, 2, 3, 4, 5, 6)])
def test_a_chunk_may_be_left_out_whole(gone: tuple[int, ...], trained: bool) -> None:
    """A chunk has two classes. All its scores are -inf, so its softmax is undefined."""
    x, rows = normal(1, 3, 4).requires_grad_(), normal(2, 7, 4).requires_grad_(trained)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, list(gone)] = True

    def of(x: Tensor, chunk: ClassShard) -> Wanted:
        v = x @ chunk.weight.T
        part = mask[:, chunk.offset : chunk.offset + len(chunk.weight)]
        z = v.masked_fill(part, -torch.inf)
        return Wanted(logs=[z, 2 * v], means=[(v, z.detach())])

    NUMBERS["cpu"] = 2 * 4
    (logs, means) = ClassShard(rows, 0, 7).over_classes(of, x)
    whole = of(x, ClassShard(rows, 0, 7))
    expected = [z.logsumexp(dim=1) for z in whole.logs]
    expected += [(v * z.softmax(dim=1)).sum(dim=1) for v, z in whole.means]
    inputs = [x, rows][: 1 + trained]
    for found, wanted in zip([*logs, *means], expected, strict=True):
        assert_close(found, wanted)
        ours, theirs = (
            torch.autograd.grad(y.sum(), inputs, retain_graph=True) for y in (found, wanted)
        )
        assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler reads it
@pytest.mark.parametrize("name", ["kd", "thkd"])
def test_chunks_are_not_compiled_each(name: str) -> None:
    """A compiled loss has as many graphs for ten chunks as for one, and the same value."""
    graphs: dict[int, int] = {}
    for size in (20, 2):
        counted = CompileCounterWithBackend("aot_eager")
        torch.compiler.reset()
        value, _ = forward(name, 1, 3, 20, size, wrapped=partial(torch.compile, backend=counted))
        value.backward()
        graphs[size] = counted.frame_count
        assert_close(value, forward(name, 1, 3, 20, size)[0])
    torch.compiler.reset()
    assert graphs[2] == graphs[20] > 0


class _Norms(TorchDispatchMode):
    """Counts how many rows' lengths were computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.linalg_vector_norm.default and args[0].shape[1] == WIDTH:
            self.rows += len(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "classifiers"), [("kd", 2), ("thkd", 1), ("proxylesskd", 1)])
def test_the_rows_lengths_are_computed_once_however_many_chunks(
    name: str, classifiers: int
) -> None:
    b, c = 2, 300
    with _Norms() as counted:
        value, trained = forward(name, 1, b, c, rows_at_a_time=50)
        torch.autograd.grad(value, trained)
    others = counted.rows - classifiers * c
    assert 0 < others < c / 2, "the embeddings' alone, a few of each chunk"


def test_a_mean_weighted_by_trained_scores_is_refused() -> None:
    """Its gradient would need all chunks."""

    def of(x: Tensor, rows: Tensor, start: int) -> Wanted:
        z = x @ rows.T
        return Wanted(logs=[z], means=[(z, z)])

    with pytest.raises(KDHooksError, match="a mean must go by a constant z; detach it, or ask for"):
        over_rows(of, torch.rand(2, 3, requires_grad=True), torch.rand(4, 3))
