"""A Distiller supports each kind of tap, and each hook."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdhooks import (
    ClassifierShare,
    ClassShard,
    ComparedClassifiers,
    EmbeddingTap,
    FeatureTap,
    InheritedClassifier,
    KDHooksError,
    Model,
    ParameterTap,
    Teacher,
    hookimpl,
)
from kdhooks.hookspecs import Specs
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.small_distiller import Gap, Method, distil, student


class StageMeans(nn.Module):
    def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        gaps = [(s.mean() - t.mean()).square() for s, t in zip(student, teacher, strict=True)]
        return torch.stack(gaps).sum()


class Stages:
    """Taps the stages in `student.stages` and `teacher.stages`."""

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        self.shapes = [stage.shape for stage in (*student.stages, *teacher.stages)]
        self.channels = [stage.channels for stage in student.stages]
        return FeatureTap(
            "stages",
            StageMeans(),
            student=tuple(stage.path for stage in student.stages),
            teacher=tuple(stage.path for stage in teacher.stages),
        )


def test_hook_feature_tap() -> None:
    net, (images, labels) = student(), tiny_batch()
    method = Stages()
    options = {"student_stages": ["layer1", "layer4"], "teacher_stages": ["layer2", "layer4"]}
    kd = distil(method, net=net, **options)
    assert method.shapes == [(4, 16, 16), (16, 2, 2), (12, 8, 8), (24, 2, 2)]
    assert method.channels == [4, 16]
    net(images)
    kd(images, labels)["stages"].backward()
    assert net.get_parameter("layer4.0.weight").grad is not None
    assert net.fc.weight.grad is None


def order(steps: int, seen: Callable[[Tensor, int], Tensor]) -> list[str]:
    """Return the order of teacher and student. seen: (images, step) -> the teacher's images."""
    net, teacher = student(), tiny_teacher()
    kd = distil("fcd", net=net, teacher=teacher)
    images, labels = tiny_batch()
    assert teacher.module is not None
    found: list[str] = []
    for name, model in (("s", net), ("t", teacher.module)):
        model.register_forward_hook(lambda *_, name=name: found.append(name))
    for step in range(steps):
        net(images)
        kd(seen(images, step), labels)
    return found


def test_the_teacher_runs_before_the_student_except_in_the_first_step() -> None:
    """The student's activations take no memory yet. The first step makes checks instead."""
    assert order(3, lambda images, step: images) == ["s", "t", "t", "s", "t", "s"]


def test_a_teacher_of_other_images_runs_only_on_them() -> None:
    assert order(3, lambda images, step: images.clone()) == ["s", "t"] * 3


def test_a_teacher_that_gets_other_images_later_finally_runs_only_on_them() -> None:
    found = order(11, lambda images, step: images.clone() if step else images)
    assert found == ["s", "t", *8 * ["t", "s", "t"], *2 * ["s", "t"]]


def test_a_student_that_is_checkpointed_as_a_whole_is_recorded_once() -> None:
    net, (images, labels), calls = student(), tiny_batch(), list[int]()

    def embed(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, :12]

    kd = distil("fcd", net=net, teacher=Teacher(embed))
    calls.clear()
    for _ in range(3):
        checkpoint(net, images, use_reentrant=False)
        torch.stack(list(kd(images, labels).values())).sum().backward()
        assert kd.pending is None
    assert calls == [12, 12, 12]


class Conditioned(TinyFaceNet):
    """Takes another argument before the images."""

    def forward(self, domain: Tensor, images: Tensor) -> Tensor:  # type: ignore[override]
        embedding: Tensor = super().forward(images)
        return embedding + domain.sum()


def test_a_student_may_take_another_argument_first() -> None:
    net, (images, labels) = Conditioned().train(), tiny_batch()
    domain = torch.zeros(len(images))
    kd = distil("fcd", net=net, run_student=lambda images: net(domain[: len(images)], images))
    for _ in range(3):
        net(domain, images)
        kd(images, labels)
    assert kd.step == 3


def test_stages_that_differ_from_the_probe_are_refused() -> None:
    net, (_, labels) = student(), tiny_batch()
    kd = distil(Stages(), net=net, student_stages=["layer1"], teacher_stages=["layer1"])
    net.fc = nn.Linear(64 * 4, 12)
    images = torch.rand(12, 3, 64, 64)
    net(images)
    with pytest.raises(
        KDHooksError, match=r"'layer1' returned \(4, 32, 32\) in training, but \(4, 16"
    ):
        kd(images, labels)


def test_hook_model_stages() -> None:
    class Known:
        @hookimpl
        def model_stages(self, model: nn.Module) -> list[str] | None:
            return ["layer3"] if isinstance(model, TinyFaceNet) else None

    method = Stages()
    distil(method, plugins=[Known()])
    assert method.shapes == [(12, 4, 4), (18, 4, 4)]


def test_hook_embedding_tap() -> None:
    class Asking:
        @hookimpl
        def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
            self.widths = student.embedding_dim, teacher.embedding_dim
            return EmbeddingTap("gap", Gap())

    method = Asking()
    distil(method)
    assert method.widths == (12, 12)


def test_hook_parameter_tap() -> None:
    """The term counts once per optimiser step."""

    class Size(nn.Module):
        def forward(self, parameters: list[Tensor]) -> Tensor:
            """[(…)] -> ()."""
            return torch.stack([p.square().sum() for p in parameters]).sum()

    class Decay:
        @hookimpl
        def parameter_tap(self, student: Model) -> ParameterTap:
            return ParameterTap("decay", Size(), 0.5, parameters=("fc.weight",))

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Decay(), net=net)
    kd.accumulation = 2
    for _ in range(2):
        net(images)
        kd(images, labels)["decay"].backward()
    torch.testing.assert_close(net.fc.weight.grad, net.fc.weight.detach())


@pytest.mark.parametrize("kind", [ClassifierShare, InheritedClassifier, ComparedClassifiers])
def test_hook_classifier_share(kind: type[ClassifierShare]) -> None:
    class Scores(nn.Module):
        def forward(
            self,
            student: Tensor,
            teacher: Tensor,
            labels: Tensor,
            classifier: ClassShard,
            head: ClassShard | None = None,
        ) -> Tensor:
            """(b d), (b e), (b), classifier, head -> ()."""
            theirs = classifier.cosines(teacher)
            return ((head or classifier).cosines(student) - theirs).square().mean()

    class Sharing:
        @hookimpl
        def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
            assert teacher.classifier is not None
            self.classes = teacher.classifier.total
            return kind("scores", Scores())

    net, (images, labels) = student(), tiny_batch()
    weight = nn.Parameter(torch.randn(6, 12))
    method = Sharing()
    kd = distil(method, net=net, head=ClassShard(weight, 0, 6))
    net(images)
    kd(images, labels)["scores"].backward()
    assert method.classes == 6
    assert net.fc.weight.grad is not None
    assert (weight.grad is not None) == (kind is ComparedClassifiers)
    assert kd.teacher_rows is not None
    assert not kd.teacher_rows.rows.requires_grad


def test_hook_adapt_teacher() -> None:
    class Prompted(nn.Module):
        """Trains a shift of the teacher's embedding, but not the teacher."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(12))

        def forward(self, teacher: nn.Module, images: Tensor) -> Tensor:
            embedding: Tensor = teacher(images)
            return embedding + self.shift

    class Adapting(Method):
        @hookimpl
        def adapt_teacher(self, teacher: Model) -> nn.Module:
            assert teacher.embedding_dim == 12
            return Prompted()

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Adapting(), net=net)
    assert [name for name, _ in kd.named_parameters()] == ["adapter.shift"]
    net(images)
    kd(images, labels)["gap"].backward()
    assert kd.adapter is not None
    assert kd.adapter.shift.grad is not None
    module = kd._session.teacher.module
    assert module is not None
    assert all(p.grad is None for p in module.parameters())
    assert not module.training


def test_hook_student_view() -> None:
    class Mirrored(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            """(b 3 h w) -> (b 3 h w)."""
            return images.flip(3)

    class Viewing(Method):
        @hookimpl
        def student_view(self) -> nn.Module:
            return Mirrored()

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Viewing(), net=net)
    seen: list[Tensor] = []
    net.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(images)
    kd(images, labels)
    assert torch.equal(seen[0], images.flip(3))


def test_every_hook_has_its_test() -> None:
    hooks = {f"test_hook_{name}" for name in vars(Specs) if not name.startswith("_")}
    assert hooks == {name for name in globals() if name.startswith("test_hook_")}
