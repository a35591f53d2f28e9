"""One step goes from taps through the teacher to the losses, without side effects."""

import copy
import gc
import io
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import Distiller, EmbeddingTap, KDHooksError, Teacher, hookimpl
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.small_distiller import SMALL, Gap, Method, distil, student


def test_terms_are_weighted_and_named_in_the_order_of_the_methods() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method("b", 2.0), Method("a", 0.5), net=net)
    embedding = net(images)
    terms = kd(images, labels)
    raw = (embedding - TeacherSession(tiny_teacher())(images).embedding).square().mean()
    assert list(terms) == ["b", "a"]
    torch.testing.assert_close(terms["b"], 2 * raw)
    torch.testing.assert_close(terms["a"], 0.5 * raw)
    torch.testing.assert_close(kd.metrics["b"], raw.detach())
    assert not kd.metrics["b"].requires_grad


class Counted(Gap):
    """Logs a count and a flag together with its loss."""

    def forward(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b) -> ()."""
        loss = super().forward(student, teacher, labels)
        return loss, {"pairs": (labels >= 0).sum(), "found": (labels >= 0).any()}


def test_counts_are_logged_as_numbers_that_have_a_mean() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method("gap", loss=Counted()), net=net)
    net(images)
    kd(images, labels)
    assert kd.metrics["gap/pairs"].mean() == len(labels)
    assert kd.metrics["gap/found"].mean() == 1


def test_the_plain_loop_trains_student_and_projector() -> None:
    images, labels = tiny_batch()
    net, head = student(), nn.Linear(12, 6)
    teacher = tiny_teacher(dim=20)
    with Distiller(
        net, teacher, [{"name": "fcd", "weight": 8, "projector": True}], input_shape=SMALL
    ) as kd:
        parameters = [*net.parameters(), *head.parameters(), *kd.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        gaps = []
        for _ in range(30):
            task = F.cross_entropy(head(net(images)), labels)
            loss = sum(kd(images, labels).values(), start=task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gaps.append(float(kd.metrics["fcd"]))
    assert [name for name, _ in kd.named_parameters()] == ["losses.fcd.projector.weight"]
    assert gaps[-1] < gaps[0] / 2
    net(images)
    assert kd.pending is None, "after the with block no hook is left"


def test_weight_zero_equals_the_plain_run_bit_for_bit() -> None:
    def train(distilled: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        net = TinyFaceNet().train()
        methods = ["fcd", "coupleface", "proxylesskd"]
        kd = None
        if distilled:
            kd = distil(*[{"name": name, "weight": 0.0} for name in methods], net=net)
        head = nn.Linear(12, 6)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
        images, labels = tiny_batch()
        loss = torch.zeros(())
        for _ in range(4):
            noisy = images + 0.01 * torch.randn(images.shape)
            loss = F.cross_entropy(head(net(noisy)), labels)
            if kd is not None:
                loss = sum(kd(noisy, labels).values(), start=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return copy.deepcopy(net.state_dict()), loss.detach()

    plain, distilled = train(False), train(True)
    torch.testing.assert_close(plain, distilled, rtol=0, atol=0)


def test_the_global_generators_are_left_as_they_were() -> None:
    class Drawing(Method):
        @hookimpl
        def embedding_tap(self) -> EmbeddingTap:
            random.random()
            np.random.rand()
            torch.rand(1)
            return self.tap

    before = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    distil(Drawing(), {"name": "proxylesskd", "projector": True})
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(legacy=True), before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_initial_weights_depend_only_on_the_seed() -> None:
    def projector(seed: int) -> Tensor:
        torch.rand(seed + 1)
        kd = distil({"name": "fcd", "projector": True}, seed=seed)
        return next(kd.parameters())

    assert torch.equal(projector(1), projector(1))
    assert not torch.equal(projector(1), projector(2))


def test_probing_leaves_the_student_as_it_was() -> None:
    net = student()
    net.layer2.eval()
    before = copy.deepcopy(net.state_dict())
    distil(Method(), net=net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert net.training
    assert not net.layer2.training


def test_a_step_retains_no_tensor_of_it() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil("fcd", "coupleface", "proxylesskd", net=net)
    embedding = net(images)
    alive = weakref.ref(embedding)
    torch.stack([*kd(images, labels).values(), embedding.sum()]).sum().backward()
    del embedding
    gc.collect()
    assert alive() is None
    assert kd.pending is None
    held = [t for t in kd.metrics.values() if t.ndim or t.requires_grad]
    assert not held


def test_evaluation_runs_no_teacher_and_keeps_nothing() -> None:
    calls: list[int] = []

    def embed(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, :12]

    net, (images, _) = student(), tiny_batch()
    kd = distil(Method(), net=net, teacher=Teacher(embed))
    calls.clear()
    net.eval()(images)
    with torch.no_grad():
        net.train()(images)
    assert kd.pending is None
    assert calls == []


def test_state_dict_holds_no_teacher_and_restores_the_step() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil("fcd", "proxylesskd", Method("gap", lambda step: float(step)), net=net)
    assert set(kd.state_dict()) == {"_extra_state", "teacher_rows._extra_state"}
    assert all(tensor.numel() < 8 for tensor in kd.state_dict().values())
    for _ in range(3):
        net(images)
        kd(images, labels)
    file = io.BytesIO()
    torch.save(kd.state_dict(), file)
    file.seek(0)
    resumed = distil("fcd", "proxylesskd", Method("gap", lambda step: float(step)), net=net)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    kd.remove()
    net(images)
    terms = resumed(images, labels)
    torch.testing.assert_close(terms["gap"], 3 * resumed.metrics["gap"])


class Table(Gap):
    """A loss with a matrix that decays, and with a table that does not."""

    def __init__(self, spared: str = "rows") -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12, bias=False)
        self.table = nn.Module()
        self.table.rows = nn.Parameter(torch.ones(3))
        self.table.no_weight_decay = lambda: {spared}  # type: ignore[assignment]


def test_parameters_that_a_loss_spares_do_not_decay() -> None:
    loss = Table()
    groups = distil(Method(loss=loss)).parameter_groups(0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [list(map(id, group["params"])) for group in groups] == [
        [id(loss.linear.weight)],
        [id(loss.table.rows)],
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for parameter in loss.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = loss.linear.weight.detach().clone()
    optimizer.step()
    assert loss.table.rows.tolist() == [1, 1, 1]  # type: ignore[operator]
    torch.testing.assert_close(loss.linear.weight.detach(), before * 0.95)


def test_losses_without_parameters_make_no_group() -> None:
    assert distil(Method()).parameter_groups(0.5) == []


def test_a_name_that_no_parameter_has_is_refused() -> None:
    with pytest.raises(KDHooksError, match=r"names 'losses\.gap\.table\.row', .*did you mean"):
        distil(Method(loss=Table("row"))).parameter_groups(0.5)


def test_a_copy_has_no_teacher_and_disturbs_nothing() -> None:
    net = student()
    kd = distil("fcd", net=net)
    copied = copy.deepcopy(kd)
    assert copied._session is None
    assert copied.taps[0].loss is copied.losses["fcd"] is not kd.losses["fcd"]
    assert not any("teacher" in name for name, _ in kd.named_modules())
    copied.remove()
    assert net._forward_hooks, "those of the original stay"
    teacher = kd.train()._session.teacher.module
    assert teacher is not None
    assert not teacher.training


def test_calling_a_copy_is_refused() -> None:
    kd, (images, labels) = distil("fcd"), tiny_batch()
    copied = copy.deepcopy(kd)
    with pytest.raises(KDHooksError, match="a copy of a Distiller has no teacher and no hooks"):
        copied(images, labels)
    copied.discard()
    assert copied.state_dict().keys() == kd.state_dict().keys()


def test_losses_run_in_float32_inside_autocast() -> None:
    seen: list[torch.dtype] = []

    class Spy(Gap):
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            seen.extend([student.dtype, teacher.dtype, (student @ teacher.T).dtype])
            return super().forward(student, teacher, labels)

    net, (images, labels) = student(), tiny_batch()
    net.features = nn.Identity()  # type: ignore[assignment]  # so that the output is bfloat16
    kd = distil(Method(loss=Spy()), net=net)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype == torch.bfloat16
        kd(images, labels)
    assert seen == [torch.float32] * 3


def test_a_teacher_that_no_loss_needs_runs_only_for_the_first_check() -> None:
    calls: list[int] = []
    net, (images, labels) = student(), tiny_batch()
    kd = distil("proxylesskd", net=net)
    kd._session.teacher.module.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    for _ in range(3):
        net(images)
        kd(images, labels)
    assert calls == [1]
