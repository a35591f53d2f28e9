"""The running mean over images: its bias correction, its state, and two ranks."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks.replicas import own_buffers
from kdhooks_plugins._running_mean import RunningMean
from tests.maps import normal
from tests.ranks import Results, mine, on_two_ranks

BATCHES = [1 + normal(seed, 6, 3, 2, 2) for seed in range(4)]


def expected(batches: list[Tensor], momentum: float) -> Tensor:
    """Return the weighted mean of the batches' means; the latest batch has weight 1."""
    weights = [momentum ** (len(batches) - 1 - place) for place in range(len(batches))]
    weighted = [w * x.mean(dim=0) for w, x in zip(weights, batches, strict=True)]
    return torch.stack(weighted).sum(dim=0) / sum(weights)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_subtracts_the_weighted_mean_of_all_batches(momentum: float) -> None:
    running = RunningMean(3, 2, 2, momentum=momentum).double()
    for step, batch in enumerate(BATCHES, start=1):
        found = running(batch)
        assert_close(found, batch - expected(BATCHES[:step], momentum))


def test_the_result_for_the_first_batch_has_mean_zero() -> None:
    running = RunningMean(3, 2, 2).double()
    assert_close(running(BATCHES[0]).mean(dim=0), torch.zeros(3, 2, 2).double())


def test_only_training_updates_it() -> None:
    running = RunningMean(3, 2, 2).double().eval()
    assert_close(running(BATCHES[0]), BATCHES[0])  # there is no mean yet
    running.train()(BATCHES[0])
    before = copy.deepcopy(running.state_dict())
    found = running.eval()(BATCHES[1])
    assert_close(found, BATCHES[1] - BATCHES[0].mean(dim=0))
    assert_close(running.state_dict(), before)
    running.train()(BATCHES[1])
    assert not torch.equal(running.average, before["average"])


def test_its_state_dict_holds_the_mean() -> None:
    first, second = RunningMean(3, 2, 2), RunningMean(3, 2, 2)
    first(BATCHES[0].float())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(BATCHES[1].float()), second(BATCHES[1].float()))


def test_keeps_no_graph_but_passes_the_gradient() -> None:
    running = RunningMean(3, 2, 2).double()
    x = BATCHES[0].clone().requires_grad_()
    running(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, torch.ones_like(x))
    assert not any(buffer.requires_grad for buffer in running.buffers())


def test_another_shape_is_refused() -> None:
    with pytest.raises(
        KDHooksError,
        match=r"needs features of the shape \(3, 2, 2\), as they were probed; found \(3, 4, 4\); "
        "set input_shape to the shape of the training images",
    ):
        RunningMean(3, 2, 2)(torch.zeros(1, 3, 4, 4))


def test_reads_no_value_in_forward() -> None:
    """Tensors on the meta device have no values."""
    assert RunningMean(3).to("meta")(torch.zeros(2, 3, device="meta")).shape == (2, 3)


def _scenarios() -> dict[str, Results]:
    running = RunningMean(3, 2, 2).double()
    outputs = [running(mine(batch)) for batch in BATCHES]
    return {"run": {"last": outputs[-1], **running.state_dict()}}


def test_two_ranks_have_the_mean_of_one_process(tmp_path: Path) -> None:
    first, second = (found["run"] for found in on_two_ranks(_scenarios, tmp_path))
    alone = _scenarios()["run"]
    assert torch.equal(first["average"], second["average"])
    assert_close(first["average"], alone["average"])
    assert_close(torch.cat([first["last"], second["last"]]), alone["last"])


def test_the_ranks_do_not_average_it_again() -> None:
    assert own_buffers(RunningMean(3)) == {"average", "weight"}
