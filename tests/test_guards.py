"""The Distiller's own guards in a training loop without an adapter."""

import gc
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.testing import assert_close

from kdhooks import Distiller, EmbeddingTap, KDHooksError, Teacher, hookimpl
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.ranks import Results, here, mine, on_two_ranks
from tests.second_device import NAME, Device, in_a_process, python_devices
from tests.small_distiller import teacher_network

PROJECTED = {"name": "fcd", "weight": 8.0, "projector": True}
SIZE: dict[str, Any] = {"input_shape": (3, 32, 32)}


def distiller(student: nn.Module, *methods: object, **options: Any) -> Distiller:
    return Distiller(student, tiny_teacher(), list(methods), **SIZE, **options)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([*terms.values()]).sum()


# --- the batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fcd", "kd"])
def test_a_batch_of_another_size_than_the_students_is_refused(method: str) -> None:
    student = TinyFaceNet().train()
    images, labels = tiny_batch()
    options: dict[str, Any] = {"head": head()} if method == "kd" else {}
    with distiller(student, {"name": method}, **options) as kd:
        student(images)
        with pytest.raises(KDHooksError, match=r"\(1, 3, 32, 32\) after a forward on \(12, 3"):
            kd(images[:1], labels[:1])


def head() -> Any:
    from kdhooks import ClassShard

    return ClassShard(nn.Parameter(torch.randn(6, 12)), 0, 6)


def test_a_teacher_with_fewer_embeddings_than_images_is_refused() -> None:
    student, teacher = TinyFaceNet().train(), TeacherSession(tiny_teacher())

    def first_alone(images: Tensor) -> Tensor:
        return teacher(images).embedding[: 1 if len(images) > 2 else 2]

    images, labels = tiny_batch()
    with Distiller(student, first_alone, ["fcd"], **SIZE) as kd:
        student(images)
        with pytest.raises(KDHooksError, match=r"one embedding for each of \d+ images; found 1"):
            kd(images, labels)


# --- labels --------------------------------------------------------------------------------------


def test_a_column_of_labels_is_taken_as_labels() -> None:
    images, labels = tiny_batch()
    values = []
    for given in (labels, labels[:, None], labels.int(), labels.to(torch.uint8)):
        torch.manual_seed(0)
        student = TinyFaceNet().train()
        with distiller(student, "adadistill") as kd:
            student(images)
            values.append(kd(images, given)["adadistill"])
    assert_close(values[1:], [values[0]] * 3, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels.tolist(), r"must be a tensor \(b\) of class numbers; found list"),
        (lambda labels: F.one_hot(labels, 6), r"found shape \(\d+, 6\); convert one-hot rows to"),
        (lambda labels: labels.float(), r"whole numbers \(b\); found dtype torch.float32; use lab"),
        (lambda labels: labels > 0, r"whole numbers \(b\); found dtype torch.bool"),
        (lambda labels: labels[:3], r"of the same samples; found \d+ and 3"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(
    change: Callable[[Tensor], Any], message: str
) -> None:
    student = TinyFaceNet().train()
    images, labels = tiny_batch()
    with distiller(student, "fcd") as kd:
        student(images)
        with pytest.raises(KDHooksError, match=message):
            kd(images, change(labels))


@pytest.mark.parametrize("method", ["thkd", "coupleface", "adadistill", "margindistillation"])
def test_a_label_beyond_the_classes_is_refused_in_any_step(method: str) -> None:
    student = TinyFaceNet().train()
    images, labels = tiny_batch()
    with distiller(student, {"name": method, **({"k": 2} if method == "coupleface" else {})}) as kd:
        for _ in range(2):
            student(images)
            kd(images, labels)
        labels[3], labels[4] = 6, -1  # -1 means no class, and is accepted
        student(images)
        with pytest.raises(
            KDHooksError, match="below the classifier's 6 classes; found 6; teacher"
        ):
            kd(images, labels)


def beyond_elsewhere(nonfinite: Any) -> tuple[int, str]:
    """Return the step in which the label was noticed, and the message."""
    with Device():
        student = TinyFaceNet().to(NAME).train()
        kd = distiller(student, "thkd", nonfinite=nonfinite)
        images, labels = (x.to(NAME) for x in tiny_batch())
        for step in range(4):
            student(images)
            if step == 2:
                labels = torch.where(labels == 0, 7, labels)
            try:
                kd(images, labels)
            except KDHooksError as error:
                return step, str(error)
    return -1, ""


@python_devices
@pytest.mark.parametrize(("nonfinite", "step"), [("raise", 3), ("skip", 2)])
def test_a_wrong_label_on_a_device_is_reported_without_a_wait(nonfinite: str, step: int) -> None:
    with in_a_process() as pool:
        found, message = pool.submit(beyond_elsewhere, nonfinite).result()
    assert found == step
    assert message.startswith("step 3: labels must be below the classifier's 6 classes; found 7")


# --- weights, and the end ------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -5.0, "8"])
def test_a_weight_by_function_is_checked_in_every_step(wrong: Any) -> None:
    student = TinyFaceNet().train()
    images, labels = tiny_batch()
    weight: Callable[[int], Any] = lambda step: 1.0 if step < 2 else wrong  # noqa: E731
    with distiller(student, {"name": "fcd", "weight": weight}) as kd:
        for _ in range(2):
            student(images)
            kd(images, labels)
        student(images)
        with pytest.raises(KDHooksError, match=f"fcd: weight in step 2 must be .*found '?{wrong}"):
            kd(images, labels)


def test_a_weight_may_be_a_number_of_numpy() -> None:
    student, (images, labels) = TinyFaceNet().train(), tiny_batch()
    weight: Callable[[int], Any] = lambda step: np.float32(2)  # noqa: E731
    with distiller(student, {"name": "fcd", "weight": weight}) as kd:
        student(images)
        assert kd(images, labels)["fcd"].dtype == torch.float32


class _LateNaN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        self.calls += 1
        return student.square().mean() * (math.nan if self.calls > 1 else 1.0)


class _Late:
    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("late", _LateNaN())


def _end_late(student: nn.Module, error: Exception | None = None) -> None:
    """Run two steps, of which the second is not finite, and then may raise another error."""
    images, labels = tiny_batch()
    with distiller(student, _Late()) as kd:
        for _ in range(2):
            student(images)
            kd(images, labels)
        if error:
            raise error


def test_a_term_not_finite_in_the_last_step_is_reported_at_the_end() -> None:
    student = TinyFaceNet().train()
    with pytest.raises(KDHooksError, match="step 2: late not finite"):
        _end_late(student)
    assert not student._forward_hooks, "the hooks are removed nevertheless"


def test_a_step_without_its_terms_has_a_gradient_of_zero_even_if_a_tap_is_infinite() -> None:
    class Infinite(TinyFaceNet):
        shift: Tensor

        def forward(self, images: Tensor) -> Tensor:
            embedding = super().forward(images)
            shift = torch.where(torch.arange(12) == 3, self.shift, torch.zeros(12))
            return embedding + shift

    student, (images, labels) = Infinite().train(), tiny_batch()
    student.shift = torch.zeros(())
    kd = distiller(student, "fcd", nonfinite="skip")
    for shift in (0.0, math.inf):
        student.shift = torch.tensor(shift)
        student.zero_grad()
        student(images)
        terms = kd(images, labels)
        total(terms).backward()
    assert kd.skipped == 1
    assert terms["fcd"] == 0
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def test_the_end_does_not_hide_another_error() -> None:
    with pytest.raises(ZeroDivisionError):
        _end_late(TinyFaceNet().train(), ZeroDivisionError())


# --- a constructor that raises -------------------------------------------------------------------


def hooks(*models: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(vars(m)[kind]) for model in models for m in model.modules() for kind in kinds)


def test_a_constructor_that_raises_leaves_no_hook(tmp_path: Path) -> None:
    student = TinyFaceNet().train()
    module = teacher_network()
    cached = Teacher(module, cache=CacheOptions(path=tmp_path))
    stages: dict[str, Any] = {"student_stages": ["layer1"], "teacher_stages": ["layer1"]}
    with pytest.raises(KDHooksError, match=r"teacher\.cache stores embeddings only"):
        Distiller(student, cached, ["at"], **stages, **SIZE)
    assert hooks(student, module) == 0
    with Distiller(student, Teacher(module), ["at"], **stages, **SIZE):
        assert hooks(student, module) > 0, "this would be noticed"


# --- the optimizer -------------------------------------------------------------------------------


def steps(student: nn.Module, kd: Distiller, *optimizers: Optimizer, count: int = 3) -> None:
    images, labels = tiny_batch()
    for _ in range(count):
        student(images)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total(kd(images, labels)).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_a_projector_in_no_optimizer_is_refused_before_the_second_step() -> None:
    student = TinyFaceNet().train()
    with distiller(student, PROJECTED) as kd:
        optimizer = SGD(student.parameters(), lr=0.01)
        steps(student, kd, optimizer, count=1)
        before = [parameter.clone() for parameter in student.parameters()]
        with pytest.raises(
            KDHooksError, match=r"in no optimizer: losses\.fcd\.projector\.weight; "
        ):
            steps(student, kd, optimizer, count=1)
        assert_close([*student.parameters()], before, rtol=0, atol=0)


def test_losses_may_be_trained_or_frozen() -> None:
    def together(student: nn.Module, kd: Distiller) -> list[Optimizer]:
        return [SGD([*student.parameters(), *kd.parameters()], lr=0.01)]

    def apart(student: nn.Module, kd: Distiller) -> list[Optimizer]:
        return [SGD(student.parameters(), lr=0.01), SGD(kd.parameters(), lr=0.01)]

    def frozen(student: nn.Module, kd: Distiller) -> list[Optimizer]:
        kd.requires_grad_(False)
        return [SGD(student.parameters(), lr=0.01)]

    for make in (together, apart, frozen):
        student = TinyFaceNet().train()
        with distiller(student, PROJECTED) as kd:
            steps(student, kd, *make(student, kd))


def test_an_optimizer_that_steps_later_counts() -> None:
    student = TinyFaceNet().train()
    with distiller(student, PROJECTED) as kd:
        often, seldom = SGD(student.parameters(), lr=0.01), SGD(kd.parameters(), lr=0.01)
        steps(student, kd, often)
        seldom.step()
        assert kd.step == 3


def test_a_second_optimizer_without_the_losses_is_refused() -> None:
    student = TinyFaceNet().train()
    with distiller(student, PROJECTED) as kd:
        steps(student, kd, SGD([*student.parameters(), *kd.parameters()], lr=0.01))
        with pytest.raises(KDHooksError, match=r"in no optimizer: losses\.fcd\.projector"):
            steps(student, kd, SGD(student.parameters(), lr=0.01))


def test_a_resumed_run_is_checked_too() -> None:
    student, (images, _) = TinyFaceNet().train(), tiny_batch()
    with distiller(student, "fcd") as kd:
        kd.set_extra_state(torch.tensor(100))
        optimizer = SGD(student.parameters(), lr=0.01)
        student.forward(images).sum().backward()
        optimizer.step()
        with pytest.raises(KDHooksError, match="kd has computed no term"):
            optimizer.step()


def test_a_classifier_that_a_term_trains_must_be_in_an_optimizer() -> None:
    student, shard = TinyFaceNet().train(), head()
    lacking = pytest.raises(KDHooksError, match=r"no optimizer: the student's classifier \(head\)")
    with distiller(student, "kd", head=shard) as kd, lacking:
        steps(student, kd, SGD(student.parameters(), lr=0.01))
    with distiller(student, "kd", head=shard) as kd:
        steps(student, kd, SGD([*student.parameters(), shard.weight], lr=0.01))


def test_an_optimizer_of_another_model_is_not_checked() -> None:
    student, other = TinyFaceNet().train(), nn.Linear(2, 2)
    with distiller(student, PROJECTED):
        optimizer = SGD(other.parameters(), lr=0.01)
        for _ in range(3):
            other(torch.ones(1, 2)).sum().backward()
            optimizer.step()


@pytest.fixture
def registered() -> Iterator[Callable[[], int]]:
    """Return a function that counts the hooks on all optimizers added since the start."""
    gc.collect()  # removes distillers of other tests, and their hooks
    hooked: Any = import_module("torch.optim.optimizer")._global_optimizer_pre_hooks
    before = len(hooked)
    yield lambda: len(hooked) - before
    assert len(hooked) == before


def test_nothing_is_registered_after_the_end(registered: Callable[[], int]) -> None:
    student = TinyFaceNet().train()
    with distiller(student, PROJECTED) as kd:
        assert registered() == 1
        steps(student, kd, SGD([*student.parameters(), *kd.parameters()], lr=0.01))
    assert registered() == 0
    kd = distiller(student, "fcd")
    assert registered() == 1
    del kd  # without a call of remove()
    gc.collect()


# --- several ranks -------------------------------------------------------------------------------

METHODS = [PROJECTED, {"name": "rkd"}]


class Whole(nn.Module):
    """A module with its distiller as a child, as with Lightning."""

    def __init__(self, student: nn.Module, kd: Distiller) -> None:
        super().__init__()
        self.student, self.kd = student, kd

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """(b 3 h w), (b) -> ()."""
        self.student(images)
        return total(self.kd(images, labels))


def _parallel(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module) if here()[1] > 1 else module


def _trained(way: str) -> Results:
    rank, _ = here()
    torch.manual_seed(rank)  # the students differ until DDP makes them equal
    student = TinyFaceNet().train()
    kd = distiller(student, *METHODS, seed=rank)
    held = _parallel(Whole(student, kd)) if way == "child" else None
    outside = _parallel(student) if held is None else student
    losses = _parallel(kd) if way == "wrapped" else kd
    optimizer = SGD([*student.parameters(), *kd.parameters()], lr=0.01, momentum=0.9)
    images, labels = (mine(x) for x in tiny_batch())
    for _ in range(6):
        optimizer.zero_grad()
        if held is None:
            outside(images)
            loss = total(losses(images, labels))
        else:
            loss = held(images, labels)
        loss.backward()
        optimizer.step()
    kd.remove()
    return {
        "student": [p.detach() for p in student.parameters()],
        "losses": [p.detach() for p in kd.parameters()],
    }


WAYS = ("bare", "wrapped", "child")


def _scenarios() -> dict[str, Results]:
    return {way: _trained(way) for way in WAYS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("guards"))


@pytest.mark.parametrize("way", WAYS)
def test_the_ranks_keep_equal_losses(way: str, ranks: list[dict[str, Results]]) -> None:
    for what in ("student", "losses"):
        assert_close(ranks[0][way][what], ranks[1][way][what], rtol=0, atol=0)
    assert_close(ranks[0][way], ranks[0]["bare"], rtol=1e-5, atol=1e-6)
