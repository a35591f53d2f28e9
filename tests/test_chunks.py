"""Losses by chunks of classes: as of all at once, and never the scores of all."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdhooks import ClassShard, Model
from kdhooks.chunks import NUMBERS, chunk_size, measured
from kdhooks_plugins.adadistill import AdaDistill
from kdhooks_plugins.gkd import GKD
from kdhooks_plugins.kd import KD
from kdhooks_plugins.margindistillation import MarginDistillation
from kdhooks_plugins.proxylesskd import ProxylessKD
from kdhooks_plugins.thkd import THKD

WIDTH = 6
METHODS: dict[str, Callable[[], Any]] = {
    "kd": KD,
    "kd with a margin": lambda: KD(margin=0.4),
    "gkd": lambda: GKD(tau=0.5, largest=5),
    "thkd": THKD,
    "proxylesskd": lambda: ProxylessKD(head="own"),
    "margindistillation": MarginDistillation,
    "adadistill": AdaDistill,
}
COMPARE = ("kd", "kd with a margin", "gkd")


@pytest.fixture(autouse=True)
def _numbers() -> Iterator[None]:
    before = dict(NUMBERS)
    yield
    NUMBERS.update(before)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def loss_of(name: str) -> nn.Module:
    hook = METHODS[name]().classifier_share
    tap = hook() if name in COMPARE else hook(Model(None, WIDTH), Model(None, WIDTH))
    loss: nn.Module = tap.loss.double()
    return loss


def outcome(name: str, seed: int, b: int, c: int, rows_at_a_time: int) -> list[Tensor]:
    """Value and gradients."""
    NUMBERS["cpu"] = rows_at_a_time * max(b, WIDTH)
    student = normal(seed, b, WIDTH).requires_grad_()
    head = normal(seed + 1, c, WIDTH).requires_grad_()
    labels = torch.randint(-1, c, (b,), generator=torch.Generator().manual_seed(seed))
    rows = [ClassShard(normal(seed + 2, c, WIDTH), 0, c)]
    if name in COMPARE:
        rows.append(ClassShard(head, 0, c))
    value, notes = loss_of(name)(student, normal(seed + 3, b, WIDTH), labels, *rows)
    value.backward()
    gradients = [x.grad for x in (student, head) if x.grad is not None]
    assert len(gradients) == len(rows)
    return [value.detach(), *notes.values(), *gradients]


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16), st.integers(1, 8), st.integers(1, 40), st.integers(1, 15))
def test_chunks_of_any_size_give_what_all_classes_at_once_do(
    name: str, seed: int, b: int, c: int, some: int
) -> None:
    assert_close(outcome(name, seed, b, c, some), outcome(name, seed, b, c, c))


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

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
def test_the_scores_of_all_classes_are_never_held(name: str) -> None:
    b, c = 64, 3000
    with Largest() as largest:
        outcome(name, 1, b, c, 100)
    assert largest.numbers <= c * WIDTH, "rows and their gradient are the largest"
    assert c * WIDTH < b * c / 10
    with Largest() as largest:
        outcome(name, 1, b, c, c)
    assert largest.numbers >= b * c


def counted(calls: list[int]) -> Callable[[Tensor, Tensor, int], Sequence[Tensor]]:
    def lse(x: Tensor, rows: Tensor, start: int) -> Sequence[Tensor]:
        calls.append(start)
        return (x @ rows.T).logsumexp(dim=1), x.new_ones(len(x))

    return lse


@pytest.mark.parametrize("trained", [False, True])
def test_frozen_rows_are_measured_once_and_trained_ones_again_for_their_gradient(
    trained: bool,
) -> None:
    NUMBERS["cpu"] = 20  # 4 rows of 5
    calls: list[int] = []
    x, rows = normal(1, 3, 5).requires_grad_(), normal(2, 10, 5).requires_grad_(trained)
    parts, ones = measured(counted(calls), x, rows)
    assert calls == [0, 4, 8]
    assert_close(ones, torch.ones(3, 3, dtype=torch.float64))
    weight = normal(3, 3)
    ((parts.logsumexp(dim=0) * weight).sum() + ones.sum()).backward()
    assert calls == [0, 4, 8] * (2 if trained else 1)
    again, other = x.detach().requires_grad_(), rows.detach().requires_grad_()
    ((again @ other.T).logsumexp(dim=1) * weight).sum().backward()
    assert_close(x.grad, again.grad)
    if trained:
        assert_close(rows.grad, other.grad)


def test_without_grad_nothing_is_kept() -> None:
    with torch.no_grad():
        found = measured(counted([]), normal(1, 3, 5).requires_grad_(), normal(2, 10, 5))
    assert not found.requires_grad


def test_rows_that_change_before_backward_are_noticed() -> None:
    x, rows = normal(1, 3, 5).requires_grad_(), normal(2, 10, 5).requires_grad_()
    found = measured(counted([]), x, rows)[0].sum()
    with torch.no_grad():
        rows += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_a_chunk_has_at_least_one_row() -> None:
    NUMBERS["cpu"] = 10
    rows = torch.ones(64, 2)
    assert chunk_size(torch.ones(3, 2), rows) == 3
    assert chunk_size(torch.ones(2, 5), rows) == 2
    assert chunk_size(torch.ones(11, 2), rows) == 1


def test_there_are_64_chunks_at_most() -> None:
    NUMBERS["cpu"] = 10
    x = torch.ones(2, 5)
    for classes in (127, 128, 129, 640, 1000):
        size = chunk_size(x, torch.ones(classes, 5))
        assert -(-classes // size) <= 64
        assert size <= max(2, classes // 64 + 1)


def test_chunks_of_a_shard_are_its_classes_in_order() -> None:
    NUMBERS["cpu"] = 15
    rows, x = normal(1, 7, 5), normal(2, 2, 5)
    shard = ClassShard(rows, 20, 40)
    chunks = list(shard.chunks(x))
    assert [(chunk.offset, len(chunk.weight)) for chunk in chunks] == [(20, 3), (23, 3), (26, 1)]
    assert_close(torch.cat([chunk.weight for chunk in chunks]), rows)
    other = ClassShard(normal(3, 7, 4), 20, 40)
    assert_close(torch.cat([other.part(chunk).weight for chunk in chunks]), other.weight)
    (seen,) = shard.by_chunks(lambda x, chunk: (x[:, 0] * 0 + chunk.offset,), x)
    assert seen.tolist() == [[20, 20], [23, 23], [26, 26]]


def test_sums_over_chunks_are_those_over_classes() -> None:
    scores = normal(1, 4, 12) * 1e4
    shard = ClassShard(normal(2, 12, 3), 0, 12)
    parts = torch.stack([part.logsumexp(dim=1) for part in scores.split(5, dim=1)])
    assert_close(shard.logsumexp(parts), scores.logsumexp(dim=1))
    assert_close(shard.sum(parts), parts.sum(dim=0))
    assert_close(shard.topk(scores, 3), scores.topk(3).values)
    assert_close(shard.topk(scores[:, :2], 3)[:, :2], scores[:, :2].topk(2).values)
    x, labels = normal(3, 4, 3), torch.tensor([0, 11, 5, -1])
    cosines = F.cosine_similarity(x, shard.weight[labels]) * (labels >= 0)
    assert_close(shard.own(x, labels), cosines)
