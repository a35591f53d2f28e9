"""A Distiller passes the right arguments to each hook, and uses its result."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdhooks import (
    ClassifierShare,
    ClassShard,
    Distiller,
    EmbeddingTap,
    FeatureTap,
    Model,
    ParameterTap,
    hookimpl,
)
from kdhooks.hookspecs import Specs
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher


def step(method: object, **options: object) -> dict[str, Tensor]:
    """Return the terms of a first step with this method."""
    student, (images, labels) = TinyFaceNet().train(), tiny_batch()
    with Distiller(student, tiny_teacher(), [method], input_shape=(3, 32, 32), **options) as kd:  # type: ignore[arg-type]
        student(images)
        terms: dict[str, Tensor] = kd(images, labels)
        return terms


class Gap(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher).square().mean()


def test_hook_embedding_tap() -> None:
    class Method:
        @hookimpl
        def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
            assert (student.embedding_dim, teacher.embedding_dim) == (12, 12)
            return EmbeddingTap("gap", Gap(), weight=2.0)

    assert list(step(Method())) == ["gap"]


def test_hook_feature_tap() -> None:
    class Means(nn.Module):
        def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
            """[(b k h w)], [(b k h w)], (b) -> ()."""
            (ours,), (theirs,) = student, teacher
            assert (ours.shape[1], theirs.shape[1]) == (16, 24)
            return (ours.mean(dim=1) - theirs.mean(dim=1)).square().mean()

    class Method:
        @hookimpl
        def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
            ours, theirs = student.stages[-1].path, teacher.stages[-1].path
            return FeatureTap("means", Means(), student=(ours,), teacher=(theirs,))

    stages = ["layer2", "layer4"]
    assert list(step(Method(), student_stages=stages, teacher_stages=stages)) == ["means"]


def test_hook_classifier_share() -> None:
    class Own(nn.Module):
        def forward(
            self, student: Tensor, teacher: Tensor, labels: Tensor, classifier: ClassShard
        ) -> Tensor:
            """(b d), (b e), (b), classifier -> ()."""
            return 1 - classifier.own(student, labels).mean()

    class Method:
        @hookimpl
        def classifier_share(self, teacher: Model) -> ClassifierShare:
            assert teacher.classifier is not None
            return ClassifierShare("own", Own())

    assert list(step(Method())) == ["own"]


def test_hook_parameter_tap() -> None:
    class Length(nn.Module):
        def forward(self, parameters: Sequence[Tensor]) -> Tensor:
            """[(…)] -> ()."""
            return torch.stack([parameter.square().sum() for parameter in parameters]).sum()

    class Method:
        @hookimpl
        def parameter_tap(self) -> ParameterTap:
            return ParameterTap("length", Length(), parameters=("fc.weight",))

    assert list(step(Method())) == ["length"]


def test_hook_adapt_teacher() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, teacher: nn.Module, images: Tensor) -> Tensor:
            """teacher, (b 3 h w) -> (b e)."""
            embedding: Tensor = teacher(images + self.shift)
            return embedding

    class Method:
        def __init__(self) -> None:
            self.adapter = Shifted()

        @hookimpl
        def adapt_teacher(self, teacher: Model) -> nn.Module:
            return self.adapter

        @hookimpl
        def embedding_tap(self) -> EmbeddingTap:
            return EmbeddingTap("gap", Gap())

    method = Method()
    step(method)["gap"].backward()
    assert method.adapter.shift.grad is not None


def test_hook_model_stages() -> None:
    class Host:
        @hookimpl
        def model_stages(self, model: nn.Module) -> list[str]:
            return ["layer1", "layer3"]

    seen = []

    class Method:
        @hookimpl
        def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
            seen.extend([student.stages, teacher.stages])
            return EmbeddingTap("gap", Gap())

    step(Method(), plugins=[Host()])
    assert [[stage.path for stage in stages] for stages in seen] == [["layer1", "layer3"]] * 2


def test_hook_student_view() -> None:
    class Mirrored(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            """(b 3 h w) -> (b 3 h w)."""
            return images.flip(3)

    seen = []

    class Method:
        @hookimpl
        def student_view(self) -> nn.Module:
            return Mirrored()

        @hookimpl
        def embedding_tap(self) -> EmbeddingTap:
            return EmbeddingTap("gap", Gap())

    student, (images, labels) = TinyFaceNet().train(), tiny_batch()
    with Distiller(student, tiny_teacher(), [Method()], input_shape=(3, 32, 32)) as kd:
        student.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        student(images)
        kd(images, labels)
    assert torch.equal(seen[0], images.flip(3))


def test_every_hook_has_its_test() -> None:
    hooks = {f"test_hook_{name}" for name in vars(Specs) if not name.startswith("_")}
    assert hooks == {name for name in globals() if name.startswith("test_hook_")}
