"""`Distiller.compare_gradients`: how much the student learns from each loss, in any loop."""

import copy
import itertools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from kdhooks import ClassShard, Distiller, KDHooksError
from kdhooks.balance import DWARFS, NEGLIGIBLE, Balance
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.ranks import Results, mine, on_two_ranks

METHODS: list[Any] = [{"name": "fcd", "weight": 8.0}, {"name": "rkd", "weight": 2.0}]


class Loop:
    """A student with a classifier, in a loop of its own."""

    def __init__(
        self,
        methods: list[Any] | None = None,
        make: Callable[[], nn.Module] = TinyFaceNet,
        teacher: object = None,
        task_weight: float = 1.0,
    ) -> None:
        torch.manual_seed(0)
        self.student: nn.Module = make().train()
        self.head = nn.Linear(12, 6)
        self.kd = Distiller(
            self.student,
            teacher or tiny_teacher().module,  # type: ignore[arg-type]
            METHODS if methods is None else methods,
            input_shape=(3, 32, 32),
            task_weight=task_weight,
        )
        self.forward = self.student
        self.images, self.labels = tiny_batch()
        self.optimizer = SGD([*self.student.parameters(), *self.kd.parameters()], lr=0.1)

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        task = F.cross_entropy(self.head(self.forward(self.images)), self.labels % 6)
        return task, self.kd(self.images, self.labels)

    def compared(self) -> Balance:
        return self.kd.compare_gradients(*self.losses())

    def train(self, steps: int, compare: bool) -> None:
        for _ in range(steps):
            task, terms = self.losses()
            if compare:
                self.kd.compare_gradients(task, terms)
            self.optimizer.zero_grad()
            torch.stack([task, *terms.values()]).sum().backward()
            self.optimizer.step()


def norm(student: nn.Module, loss: Tensor) -> float:
    """The norm of a gradient, computed in another way."""
    student.zero_grad()
    loss.backward(retain_graph=True)
    every = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    return float(torch.cat(every).double().norm())


def test_each_norm_is_that_of_its_own_backward_pass() -> None:
    loop = Loop()
    task, terms = loop.losses()
    found = loop.kd.compare_gradients(task, terms)
    assert found.task.gradient == pytest.approx(norm(loop.student, task), rel=1e-5)
    for name, term in terms.items():
        assert found.terms[name].gradient == pytest.approx(norm(loop.student, term), rel=1e-5)
    whole = torch.stack([task, *terms.values()]).sum()
    assert found.whole == pytest.approx(norm(loop.student, whole), rel=1e-5)
    assert [pull.weight for pull in found.terms.values()] == [8.0, 2.0]


def test_the_balancing_weight_balances() -> None:
    weight = Loop().compared().balancing_weight("rkd")
    found = Loop([METHODS[0], {"name": "rkd", "weight": weight}]).compared()
    assert found.ratio("rkd") == pytest.approx(1.0, rel=1e-4)


def test_it_changes_nothing_in_the_training() -> None:
    plain, measured = Loop(), Loop()
    plain.train(3, compare=False)
    measured.train(3, compare=True)
    for ours, theirs in zip(plain.student.parameters(), measured.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_that_are_being_accumulated_stay() -> None:
    loop = Loop()
    task, terms = loop.losses()
    task.backward(retain_graph=True)
    before = [copy.copy(p.grad) for p in loop.student.parameters()]
    loop.kd.compare_gradients(task, terms)
    for parameter, grad in zip(loop.student.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert grad is not None
        assert torch.equal(parameter.grad, grad)


def test_terms_that_are_only_measured_still_count_as_not_trained() -> None:
    loop = Loop()

    def step() -> None:
        task, terms = loop.losses()
        loop.kd.compare_gradients(task, terms)
        loop.optimizer.zero_grad()
        task.backward()
        loop.optimizer.step()

    step()
    with pytest.raises(KDHooksError, match="without fcd, rkd: no backward pass reached"):
        step()


def test_a_schedule_is_named_by_its_value_and_measured_in_its_step() -> None:
    schedule = {"value": 8.0, "warmup": 4}
    loop = Loop([{"name": "fcd", "weight": schedule}])
    assert loop.compared().terms == {}, "the weight of the first step is 0"
    loop = Loop([{"name": "fcd", "weight": schedule}])
    loop.train(1, compare=False)
    task, terms = loop.losses()
    (pull,) = loop.kd.compare_gradients(task, terms).terms.values()
    assert pull.gradient == pytest.approx(norm(loop.student, terms["fcd"]), rel=1e-5)
    assert (pull.weight, pull.by_schedule) == (8.0, True)


def test_a_term_of_weight_zero_is_left_out() -> None:
    found = Loop([{"name": "fcd", "weight": 0.0}]).compared()
    assert found.terms == {}
    for figure in (found.ratio, found.balancing_weight):
        with pytest.raises(KDHooksError, match="found 'fcd' with none; terms of weight 0 are left"):
            figure("fcd")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_may_be_called_where_gradients_are_off(mode: Callable[[], Any]) -> None:
    loop = Loop()
    task, terms = loop.losses()
    expected = loop.kd.compare_gradients(task, terms)
    with mode():
        assert loop.kd.compare_gradients(task, terms) == expected
    torch.stack([task, *terms.values()]).sum().backward()


def test_a_term_can_take_the_place_of_the_task() -> None:
    loop = Loop()
    _, terms = loop.losses()
    assert loop.kd.compare_gradients(terms["fcd"], terms).ratio("fcd") == 1.0


def test_the_text_names_a_weight_that_does_almost_nothing() -> None:
    found = str(Loop([{"name": "fcd", "weight": 1e-5}]).compared())
    assert found.startswith("task ")
    assert "fcd: its gradient is 1/" in found
    assert "so it changes almost nothing; weight = " in found
    assert "clip" not in found, "kdhooks does not know whether a loop of one's own clips"


CLASSES = int(tiny_batch()[1].max()) + 1


class WithHead(nn.Module):
    """A student that holds its head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyFaceNet()
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.backbone(images))
        return found


@pytest.mark.parametrize("shared", [False, True])
def test_a_head_inside_the_student_is_not_counted(shared: bool) -> None:
    """shared: whether a term trains the head too."""
    torch.manual_seed(0)
    net = WithHead().train()
    images, labels = tiny_batch()
    kd = Distiller(
        net,
        tiny_teacher(),
        ["fcd", "kd"] if shared else ["fcd"],
        student_embedding="backbone",
        head=ClassShard(net.head.weight, 0, CLASSES) if shared else None,
        input_shape=(3, 32, 32),
    )
    task = F.cross_entropy(net(images), labels)
    found = kd.compare_gradients(task, kd(images, labels))
    assert found.task.gradient == pytest.approx(norm(net.backbone, task), rel=1e-5)


class Checkpointed(TinyFaceNet):
    """Its first block is checkpointed, the others are not."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        first = self.layer1.forward

        def checkpointed(x: Tensor) -> Tensor:
            found: Tensor = checkpoint(first, x.detach().requires_grad_(), use_reentrant=reentrant)
            return found

        self.layer1.forward = checkpointed  # type: ignore[method-assign]


def test_checkpointed_blocks_are_measured_unless_they_are_reentrant() -> None:
    plain = Loop().compared()
    found = Loop(make=partial(Checkpointed, reentrant=False)).compared()
    assert found.whole == pytest.approx(plain.whole)
    with pytest.raises(KDHooksError, match="checkpointed blocks must not be reentrant"):
        Loop(make=partial(Checkpointed, reentrant=True)).compared()


def test_recomputed_blocks_leave_the_statistics_of_batch_norm() -> None:
    loop = Loop(make=partial(Checkpointed, reentrant=False))
    task, terms = loop.losses()
    before = {name: buffer.clone() for name, buffer in loop.student.named_buffers()}
    loop.kd.compare_gradients(task, terms)
    for name, buffer in loop.student.named_buffers():
        assert torch.equal(buffer, before[name]), name
    torch.stack([task, *terms.values()]).sum().backward()
    assert int(loop.student.get_buffer("layer1.1.num_batches_tracked")) == 2, "recomputed once"


def test_a_factor_that_is_only_compared_still_counts_as_not_read() -> None:
    loop = Loop(task_weight=0.5)
    task, terms = loop.losses()
    assert loop.kd.compare_gradients(0.5 * task, terms).task.weight == 0.5
    torch.stack([task, *terms.values()]).sum().backward()
    loop.optimizer.step()
    with pytest.raises(KDHooksError, match="the loop has never read it"):
        loop.train(1, compare=True)


def test_wrong_losses_are_refused() -> None:
    loop = Loop()
    task, terms = loop.losses()
    given: Any
    for given in (task.detach(), float(task.detach()), task[None]):
        with pytest.raises(KDHooksError, match="task_loss must be a scalar tensor with a grad"):
            loop.kd.compare_gradients(given, terms)
    with pytest.raises(KDHooksError, match="without the terms; found rkd in it; pass it before"):
        loop.kd.compare_gradients(task + terms["rkd"], terms)
    values = {name: loop.kd.metrics[name] for name in terms}
    for given in (values, {name: float(value) for name, value in values.items()}):
        with pytest.raises(KDHooksError, match="the term fcd must be the tensor that kd returned"):
            loop.kd.compare_gradients(task, given)
    for given in ({"fcd": terms["fcd"]}, list(terms.values())):
        with pytest.raises(KDHooksError, match="terms must be what kd returned in this step"):
            loop.kd.compare_gradients(task, given)
    task.backward()
    with pytest.raises(KDHooksError, match="before the training's own backward pass"):
        loop.kd.compare_gradients(task, terms)


class Overwriting(torch.autograd.Function):
    """Its backward pass changes a tensor that it has saved, as that of PartialFC does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        saved = 2 * x
        ctx.save_for_backward(saved)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        found: Tensor = saved.mul_(gradients[0])
        return found


def test_a_loss_whose_backward_pass_runs_only_once_is_named() -> None:
    loop = Loop()
    embedding = loop.student(loop.images)
    task: Any = Overwriting.apply(embedding)  # type: ignore[no-untyped-call]
    terms = loop.kd(loop.images, loop.labels)
    with pytest.raises(KDHooksError, match="a loss that overwrites nothing in its backward"):
        loop.kd.compare_gradients(task, terms)


def both_ranks() -> dict[str, Results]:
    """The student after three steps, with and without measuring."""
    found: dict[str, Results] = {}
    methods = ["fcd", {"name": "coupleface", "k": 3}]
    for static, compare in itertools.product((False, True), (False, True)):
        loop = Loop(methods, teacher=tiny_teacher())
        loop.images, loop.labels = mine(loop.images), mine(loop.labels)
        loop.forward = DistributedDataParallel(loop.student, static_graph=static)
        loop.train(3, compare)
        found[f"{static} {compare}"] = {
            name: p.detach().clone() for name, p in loop.student.named_parameters()
        }
    return found


def test_on_two_ranks_it_changes_nothing_in_the_training(tmp_path: Path) -> None:
    for found in on_two_ranks(both_ranks, tmp_path):
        for static in ("False", "True"):
            for name, weight in found[f"{static} False"].items():
                assert torch.equal(weight, found[f"{static} True"][name]), (static, name)


DOCS = Path(__file__).parents[1] / "docs"


def test_the_loop_of_the_documentation_compares(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "own_loop.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python gradients\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    loop = Loop([{"name": "fcd", "weight": 1e-4}])

    def criterion(embedding: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(loop.head(embedding), labels % 6)

    names = {"student": loop.student, "kd": loop.kd, "criterion": criterion}
    exec(block, {**names, "images": loop.images, "labels": loop.labels})
    assert capsys.readouterr().out.startswith("task ")
    assert f"at\nleast {DWARFS:g} times as long" in text
    assert NEGLIGIBLE == 1 / 100
    assert "less than a hundredth" in text
