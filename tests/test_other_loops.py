"""A Distiller in loops of Lightning Fabric and of accelerate, compared with a plain torch loop."""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Teacher
from kdhooks.paths import find, unwrap
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.ranks import Results, as_torchrun, here, mine, on_two_ranks
from tests.test_guards import PROJECTED, SIZE, _parallel, total

METHODS = [PROJECTED, "rkd", "at", "adadistill"]  # the last keeps centres, in a float buffer
NOTHING_TO_TRAIN = ["rkd", "at"]
STAGES: dict[str, Any] = {"student_stages": ["layer2"], "teacher_stages": ["layer2"]}


@dataclass
class Host:
    """The calls of a loop, which each host names differently."""

    setup: Callable[[nn.Module], nn.Module]
    setup_optimizer: Callable[[Optimizer], Any]
    together: Callable[[nn.Module, Distiller, Optimizer], tuple[nn.Module, nn.Module, Any]]
    backward: Callable[[Tensor], object]
    forward: Callable[[], AbstractContextManager[object]] = nullcontext  # around the student's
    host: Any = None


def bare(half: bool = False) -> Host:
    return Host(
        setup=_parallel,
        setup_optimizer=lambda optimizer: optimizer,
        together=lambda student, kd, optimizer: (_parallel(student), _parallel(kd), optimizer),
        backward=Tensor.backward,
        forward=partial(torch.autocast, "cpu", torch.bfloat16, enabled=half),
    )


def fabric(half: bool = False) -> Host:
    size = here()[1]
    host: Any = import_module("lightning_fabric").Fabric(
        accelerator="cpu",
        strategy="ddp" if size > 1 else "auto",
        devices=size,
        precision="bf16-mixed" if half else "32-true",
    )
    host.launch()

    def together(
        student: nn.Module, kd: Distiller, optimizer: Optimizer
    ) -> tuple[nn.Module, nn.Module, Any]:
        outside, stepped = host.setup(student, optimizer)
        return outside, host.setup(kd), stepped

    return Host(host.setup, host.setup_optimizers, together, host.backward, host=host)


def accelerate(half: bool = False) -> Host:
    import_module("accelerate.state").AcceleratorState._reset_state(True)  # a process has only one
    host: Any = import_module("accelerate").Accelerator(
        cpu=True, mixed_precision="bf16" if half else "no"
    )
    assert host.num_processes == here()[1]
    return Host(host.prepare, host.prepare, host.prepare, host.backward, host=host)


HOSTS: dict[str, tuple[str, Callable[[bool], Host]]] = {
    "fabric": ("lightning_fabric", fabric),
    "accelerate": ("accelerate", accelerate),
}


@pytest.fixture(params=HOSTS, scope="module")
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield each installed host; its changes to the environment are undone."""
    chosen: str = request.param
    pytest.importorskip(HOSTS[chosen][0])
    with mock.patch.dict(os.environ):
        yield chosen


@pytest.fixture
def make(name: str) -> Callable[[bool], Host]:
    return HOSTS[name][1]


# --- one loop for all ----------------------------------------------------------------------------


def trained(
    host: Host, way: str, methods: list[Any] = METHODS, teacher: Teacher | None = None
) -> Results:
    """Train six steps.

    together: kd is created first, and the host sets up the student, kd and the optimizer.
    before, after: kd is created before or after the student's set-up; the host does not set it up.
    after-wrapped: kd is created after the student's set-up, and the host sets it up, too.
    """
    rank, _ = here()
    torch.manual_seed(rank)  # the students differ until the host makes them equal
    student = TinyFaceNet().train()

    def distiller(model: nn.Module) -> Distiller:
        given = teacher or tiny_teacher()
        return Distiller(model, given, methods, seed=rank, **STAGES, **SIZE)

    def sgd(kd: Distiller) -> SGD:
        return SGD([*student.parameters(), *kd.parameters()], lr=0.01, momentum=0.9)

    losses: nn.Module
    if way == "together":
        kd = distiller(student)
        outside, losses, optimizer = host.together(student, kd, sgd(kd))
    else:
        made = distiller(student) if way == "before" else None
        outside = host.setup(student)
        kd = made or distiller(outside)
        losses = host.setup(kd) if way == "after-wrapped" else kd
        optimizer = host.setup_optimizer(sgd(kd))
    images, labels = (mine(x) for x in tiny_batch())
    loss = torch.zeros(())
    for _ in range(6):
        optimizer.zero_grad()
        with host.forward():
            outside(images)
        loss = total(losses(images, labels))
        host.backward(loss)
        optimizer.step()
    kd.remove()
    state = kd.whole_state_dict()
    return {
        "student": [p.detach() for p in student.parameters()],
        "losses": [p.detach() for p in kd.parameters()],
        "buffers": [
            state[n] for n, b in kd.named_buffers() if b.is_floating_point() and n in state
        ],
        "loss": loss.detach(),
    }


# --- two ranks -----------------------------------------------------------------------------------

WAYS = ("together", "before", "after", "after-wrapped")


def _scenarios(name: str) -> dict[str, Results]:
    as_torchrun()
    make = HOSTS[name][1]
    found = {way: trained(make(False), way) for way in WAYS}
    found["nothing to train"] = trained(make(False), "after", NOTHING_TO_TRAIN)
    found["bare"] = trained(bare(), "before")
    found["bare, nothing to train"] = trained(bare(), "before", NOTHING_TO_TRAIN)
    return found


@pytest.fixture(scope="module")
def ranks(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(partial(_scenarios, name), tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("way", [*WAYS, "nothing to train"])
def test_the_ranks_stay_equal_and_train_as_with_ddp(
    way: str, ranks: list[dict[str, Results]]
) -> None:
    for what in ("student", "losses", "buffers"):
        assert_close(ranks[0][way][what], ranks[1][way][what], rtol=0, atol=0)
    expected = "bare" if way in WAYS else f"bare, {way}"
    for rank in ranks:
        assert_close(rank[way], rank[expected], rtol=1e-5, atol=1e-6)
    assert len(ranks[0][way]["buffers"]) > 0 or way not in WAYS


# --- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_one_process_trains_as_a_bare_loop(
    way: str, half: bool, name: str, make: Callable[[bool], Host]
) -> None:
    found = trained(make(half), way)
    assert math.isfinite(found["loss"])
    if half and name == "fabric" and way in ("together", "after-wrapped"):
        return  # Fabric rounds the images that it passes to a module to bfloat16
    assert_close(found, trained(bare(half), "before"), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_the_host_restores_the_losses(
    name: str, make: Callable[[bool], Host], tmp_path: Path
) -> None:
    host = make(False)
    student = TinyFaceNet().train()
    outside = host.setup(student)
    with Distiller(outside, tiny_teacher(), [PROJECTED], **SIZE) as kd:
        images, labels = tiny_batch()
        for _ in range(3):
            outside(images)
            host.backward(total(kd(images, labels)))
        parts = {"model": outside, "kd": kd}
        if name == "fabric":
            host.host.save(tmp_path / "all.pt", parts)
        else:
            host.host.register_for_checkpointing(kd)
            host.host.save_state(str(tmp_path))
        kept = [p.detach().clone() for p in kd.parameters()]
        for p in kd.parameters():
            p.data.zero_()
        kd.set_extra_state(torch.tensor(0))
        if name == "fabric":
            host.host.load(tmp_path / "all.pt", parts)
        else:
            host.host.load_state(str(tmp_path))
        assert kd.step == 3
        assert_close([*kd.parameters()], kept, rtol=0, atol=0)


def test_fabrics_wrapper_is_unwrapped() -> None:
    pytest.importorskip("lightning_fabric")
    net = TinyFaceNet()
    wrapped = fabric().setup(net)
    assert unwrap(wrapped) is net
    assert find(nn.Sequential(OrderedDict(backbone=wrapped)), "backbone.layer3.0", "student") is (
        net.get_submodule("layer3.0")
    )


@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_compared_with_fabric_unless_its_precision_is_mixed(half: bool) -> None:
    pytest.importorskip("lightning_fabric")
    images, labels = tiny_batch()
    wrapped = fabric(half).setup(TinyFaceNet().train())
    kd = Distiller(wrapped, tiny_teacher(), ["fcd"], input_shape=(3, 32, 32))
    task = wrapped(images).square().mean()
    terms = kd(images, labels)
    refused = pytest.raises(KDHooksError, match=r"run with Fabric\(precision='32-true'\)")
    with refused if half else nullcontext():
        assert kd.compare_gradients(task, terms).task.gradient > 0


class _Wrapper(nn.Module):
    """Holds a module twice, like Fabric's wrapper: wrapped by the strategy, and as it was."""

    def __init__(self, forward_module: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = forward_module, original


@pytest.mark.parametrize("strategy", [nn.Identity, nn.DataParallel])
def test_a_wrapper_that_holds_a_module_twice_is_unwrapped(strategy: Any) -> None:
    net = TinyFaceNet()
    wrapped = _Wrapper(net if strategy is nn.Identity else strategy(net), net)
    assert unwrap(wrapped) is net
    assert unwrap(nn.DataParallel(wrapped)) is net
    inside = nn.Sequential(OrderedDict(backbone=wrapped))
    for path in ("backbone.layer3.0", "backbone._forward_module.layer3.0"):
        assert find(inside, path, "student") is net.get_submodule("layer3.0")
