"""A Distiller refuses, omits or reports anything that would train the student wrongly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdhooks import ClassShard, Distiller, KDHooksError, Teacher
from kdhooks.testing import tiny_batch, tiny_teacher
from tests.small_distiller import SMALL, Gap, Method, distil, student, teacher_network


def test_a_call_without_a_students_forward_is_refused() -> None:
    kd, (images, labels) = distil(Method()), tiny_batch()
    with pytest.raises(KDHooksError, match="student tap 'output' recorded nothing"):
        kd(images, labels)


def test_images_and_labels_must_match() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(), net=net)
    net(images)
    with pytest.raises(KDHooksError, match="found 12 and 5"):
        kd(images, labels[:5])


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda s, t: (s - t).square(), r"found shape \(12, 12\)"),
        (lambda s, t: (s.detach() - t).square().mean(), "requires_grad False"),
    ],
)
def test_a_loss_must_be_a_scalar_with_a_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], found: str
) -> None:
    class Bad(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            return loss(student, teacher)

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(loss=Bad()), net=net)
    net(images)
    with pytest.raises(KDHooksError, match=f"gap: a loss must be a scalar.*{found}"):
        kd(images, labels)


def test_a_loss_that_is_not_finite_is_refused_in_the_first_step() -> None:
    class Infinite(Gap):
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            return super().forward(student, teacher, labels) * torch.inf

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(loss=Infinite()), net=net)
    net(images)
    with pytest.raises(KDHooksError, match="gap: its loss is inf in the first step"):
        kd(images, labels)


class FailsOnce(Gap):
    """A loss that is not finite in its second step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.map = nn.Linear(12, 12)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        gap = super().forward(self.map(student), teacher, labels)
        return gap * torch.inf if self.calls == 2 else gap


def test_a_term_that_is_not_finite_later_stops_the_run() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(loss=FailsOnce()), net=net)
    for _ in range(2):
        net(images)
        kd(images, labels)
    net(images)
    with pytest.raises(
        KDHooksError, match=r"step 2: gap not finite; .* nonfinite = 'skip' continues"
    ):
        kd(images, labels)


def test_no_checkpoint_is_written_after_a_term_that_was_not_finite() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(loss=FailsOnce()), net=net)
    for _ in range(2):
        net(images)
        kd(images, labels)
    for _ in range(2):  # each attempt is refused
        with pytest.raises(KDHooksError, match="step 2: gap not finite"):
            kd.state_dict()


def test_a_teacher_that_fails_on_some_images_names_their_labels() -> None:
    known = tiny_teacher()
    assert known.module is not None
    module = known.module
    calls: list[int] = []

    def failing(images: Tensor) -> Tensor:
        calls.append(1)
        embedding: Tensor = module(images).clone()
        if len(calls) == 3:  # after the probe and one step
            embedding[[1, 4]] = torch.nan
        return embedding

    net, (images, labels) = student(), tiny_batch()
    kd = distil("fcd", net=net, teacher=Teacher(failing))
    for _ in range(2):
        net(images)
        kd(images, labels)
    lost = labels[[1, 4]].tolist()
    net(images)
    with pytest.raises(KDHooksError, match=rf"for 2 of 12 samples \(labels \[{lost[0]}, {lost[1]}"):
        kd(images, labels)


def test_skipping_continues_without_the_terms_of_the_step(caplog: pytest.LogCaptureFixture) -> None:
    net, (images, labels) = student(), tiny_batch()
    loss = FailsOnce()
    kd = distil(Method(loss=loss), net=net, nonfinite="skip")
    values = []
    for _ in range(3):
        net.zero_grad()
        loss.zero_grad()
        net(images)
        term = kd(images, labels)["gap"]
        term.backward()
        values.append(term.item())
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
        if loss.calls == 2:
            assert not any(p.grad is not None and p.grad.any() for p in net.parameters())
            assert kd.metrics == {}
    assert values[0] == values[2] > 0 == values[1]
    assert kd.skipped == 1
    assert "step 2: gap not finite; the step continues without its terms" in caplog.text


@pytest.mark.parametrize(
    "method", ["adadistill", {"name": "coupleface", "k": 2, "relations": "bank"}]
)
def test_skipped_terms_do_not_change_a_bank(method: object) -> None:
    known = tiny_teacher()
    module, calls = known.module, []
    assert module is not None

    def failing(images: Tensor) -> Tensor:
        calls.append(1)
        embedding: Tensor = module(images)
        return embedding * torch.nan if len(calls) == 3 else embedding

    net, (images, labels) = student(), tiny_batch()
    teacher = Teacher(failing, classifier=known.classifier)
    kd = distil(method, net=net, teacher=teacher, nonfinite="skip")
    for _ in range(4):
        net(images)
        kd(images, labels)
    assert kd.skipped == 1
    assert kd.step == 4
    assert all(torch.isfinite(buffer).all() for buffer in kd.buffers())


def test_nonfinite_must_be_raise_or_skip() -> None:
    with pytest.raises(
        KDHooksError, match="nonfinite must be one of 'raise', 'skip'; found 'pass'"
    ):
        distil("fcd", nonfinite="pass")


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        (lambda x: x.flatten(1)[:, :12] * torch.inf, "teacher tap 'embedding' is not finite"),
        (
            lambda x: torch.zeros(len(x), 12),
            "an embedding of zeros for all .*, which has no direction",
        ),
        (lambda x: torch.ones(len(x), 12), "the same embedding for all .*mean cosine 1.00000"),
    ],
)
def test_a_teacher_with_useless_embeddings_is_refused(
    teacher: Callable[[Tensor], Tensor], match: str
) -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(), net=net, teacher=Teacher(teacher))
    net(images)
    with pytest.raises(KDHooksError, match=match):
        kd(images, labels)


def test_a_batch_of_one_constant_image_does_not_refuse_the_teacher() -> None:
    net = student()
    kd = distil(Method(), net=net)
    images = torch.zeros(4, *SMALL)
    net(images)
    assert "gap" in kd(images, torch.zeros(4, dtype=torch.long))


def test_a_wrong_class_order_is_refused() -> None:
    good = tiny_teacher()
    assert good.module is not None
    assert good.classifier is not None
    rows = good.classifier.slice(0, 6)
    net, (images, labels) = student(), tiny_batch()
    kd = distil("proxylesskd", net=net, teacher=Teacher(good.module, classifier=rows.roll(1, 0)))
    net(images)
    with pytest.raises(KDHooksError, match="found 0% of 12 samples of the first batch nearest"):
        kd(images, labels)


def test_a_label_beyond_the_classifier_is_refused() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil("thkd", net=net)
    net(images)
    with pytest.raises(KDHooksError, match="below the classifier's 6 classes; found 6; teacher"):
        kd(images, labels + 1)


def test_labels_that_no_term_needs_may_be_of_other_classes() -> None:
    values = []
    for shift in (0, 100):
        net, (images, labels) = student(), tiny_batch()
        kd = distil("fcd", net=net)
        net(images)
        values.append(kd(images, labels + shift))
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)


def test_classifier_and_embedding_must_be_of_one_network() -> None:
    module = teacher_network()
    teacher = Teacher(module, classifier=torch.randn(6, 20))
    with pytest.raises(
        KDHooksError, match="rows of width 20, but the teacher's embedding is 12 wide"
    ):
        distil("fcd", teacher=teacher)


def test_teacher_and_trainer_must_have_the_same_classes() -> None:
    with pytest.raises(KDHooksError, match="has 6 classes, the trainer 7"):
        distil("proxylesskd", head=ClassShard(torch.randn(7, 12), 0, 7))


def test_an_embedding_that_is_no_matrix_names_the_way_out() -> None:
    with pytest.raises(KDHooksError, match=r"student embedding 'layer4' must be \(b d\)"):
        distil(Method(), student_embedding="layer4")


def test_a_term_that_the_hosts_head_computes_is_left_out() -> None:
    kd = distil("fcd", "proxylesskd", host_head="margin")
    assert kd.inherited is not None
    assert (kd.inherited.name, kd.inherited.weight) == ("proxylesskd", 1.0)
    assert kd.inherited.rows().shape == (6, 12)
    assert [tap.name for tap in kd.taps] == ["fcd"]
    assert not list(kd.buffers()), "the host's head holds the rows now"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"m": 0.3}, "own head can't compute it; its options m ask for"),
        ({"weight": lambda step: 1.0}, "its weight must be a number if the trainer's head"),
    ],
)
def test_a_term_that_the_hosts_head_cannot_compute_is_refused(
    options: dict[str, object], match: str
) -> None:
    net = student()
    with pytest.raises(KDHooksError, match=match):
        distil({"name": "proxylesskd", **options}, net=net, host_head="margin")
    assert not net._forward_hooks


def test_without_such_a_head_or_with_weight_zero_kdhooks_computes_it() -> None:
    for host_head, weight in ((None, 1.0), ("margin", 0.0)):
        kd = distil({"name": "proxylesskd", "weight": weight}, host_head=host_head)
        assert kd.inherited is None
        assert [tap.name for tap in kd.taps] == ["proxylesskd"]


def test_images_of_a_wrong_shape_name_the_setting() -> None:
    net = student()
    with pytest.raises(KDHooksError, match=r"student must run on images of the shape \(3, 112"):
        Distiller(net, tiny_teacher(), ["fcd"])
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 12))
    with pytest.raises(
        KDHooksError, match=r"teacher must run .* or teacher\.input\.size to the size"
    ):
        Distiller(net, wide, ["fcd"], input_shape=SMALL)
    assert not net._forward_hooks
