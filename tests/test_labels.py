"""Runs without labels: which methods are refused, and which checks are skipped."""

from typing import Any

import pytest
import torch

import kdhooks
from kdhooks import ClassShard, KDHooksError, methods
from kdhooks.described import needs_of
from kdhooks.discovery import create
from kdhooks.guards import WITHOUT_LABELS
from kdhooks.testing import tiny_batch, tiny_teacher
from tests.small_distiller import SMALL, Method, distil, student

LABEL_FREE = ", ".join(WITHOUT_LABELS)


def own_methods() -> list[str]:
    return [info.name for info in methods() if info.package.startswith("kdhooks ")]


def test_the_methods_without_labels_are_all_named() -> None:
    free = [name for name in own_methods() if not needs_of(create(name)).labels]
    assert tuple(free) == WITHOUT_LABELS


def recipe(*named: object, **more: object) -> dict[str, Any]:
    teacher = {"module": tiny_teacher().module, "classifier": tiny_teacher().classifier}
    return {"teacher": teacher, "methods": list(named), "input_shape": list(SMALL), **more}


def test_a_recipe_without_labels_trains_on_images_only() -> None:
    net = student()
    kd = kdhooks.build(recipe("fcd", "rkd", labels=False), net)
    images, _ = tiny_batch()
    net(images)
    terms = kd(images)
    assert list(terms) == ["fcd", "rkd"]
    torch.stack([*terms.values()]).sum().backward()


def test_methods_that_need_labels_are_refused_at_construction() -> None:
    two = ["fcd", "margindistillation", "proxylesskd"]
    with pytest.raises(KDHooksError) as error:
        kdhooks.build(recipe(*two, labels=False), student())
    assert str(error.value) == (
        "labels = false, but these terms need the class of each image: margindistillation, "
        f"proxylesskd; leave them out, or use methods that need no labels: {LABEL_FREE}"
    )
    kdhooks.build(recipe(*two), student())


def test_the_trainers_own_head_needs_labels_too() -> None:
    with pytest.raises(KDHooksError, match="need the class of each image: proxylesskd"):
        distil("proxylesskd", host_head="margin", labels=False)


def test_without_the_key_the_refusal_comes_at_the_call() -> None:
    net = student()
    kd = distil("margindistillation", net=net)
    images, _ = tiny_batch()
    net(images)
    with pytest.raises(KDHooksError) as error:
        kd(images)
    assert str(error.value) == (
        "labels must be a tensor (b) of class numbers; found NoneType; needed by: "
        f"margindistillation; methods that need no labels: {LABEL_FREE}"
    )


@pytest.mark.parametrize(
    "dummy", [torch.full((12,), 10**6), torch.zeros(12), torch.zeros(3, dtype=torch.long), "none"]
)
def test_labels_that_are_passed_anyway_are_not_checked(dummy: Any) -> None:
    """Neither their range, type and number nor the order of the classes is checked."""
    net = student()
    kd = distil("fcd", net=net, labels=False)
    images, _ = tiny_batch()
    for _ in range(2):
        net(images)
        with_dummy = kd(images, dummy)["fcd"]
        net(images)
        assert torch.equal(with_dummy, kd(images)["fcd"])
    assert "teacher/accuracy" not in kd.metrics


def test_a_loss_that_ignores_labels_receives_none() -> None:
    given = []

    class Noting(torch.nn.Module):
        def forward(self, s: torch.Tensor, t: torch.Tensor, labels: object) -> torch.Tensor:
            """(b d), (b e), (b) -> ()."""
            given.append(labels)
            return (s - t).square().mean()

    class Free:
        @kdhooks.hookimpl
        def embedding_tap(self) -> kdhooks.EmbeddingTap:
            return kdhooks.EmbeddingTap("free", Noting(), needs_labels=False)

    images, labels = tiny_batch()
    for has_labels in (True, False):
        net = student()
        kd = distil(Free(), net=net, labels=has_labels)
        net(images)
        kd(images, labels)
    assert given[0] is labels
    assert given[1] is None


def test_a_teachers_classes_need_not_be_the_trainers() -> None:
    """Without labels, a head with another number of classes is accepted."""
    head = ClassShard(torch.randn(4, 12, requires_grad=True), 0, 4)
    distil("fcd", head=head, labels=False)
    with pytest.raises(KDHooksError, match="teacher classifier has 6 classes, the trainer 4"):
        distil("fcd", head=head)


@pytest.mark.parametrize("wrong", [0, "false", None])
def test_the_key_is_true_or_false(wrong: Any) -> None:
    with pytest.raises(KDHooksError, match="Distiller: labels must be true or false; found"):
        distil(Method(), labels=wrong)
    with pytest.raises(KDHooksError, match="recipe: labels must be true or false; found"):
        kdhooks.build(recipe("fcd", labels=wrong), student())


@pytest.mark.parametrize("name", [name for name in WITHOUT_LABELS if name != "cakd"])
def test_a_method_without_labels_has_the_same_terms_without_them(name: str) -> None:
    """cakd is left out: its default options need larger maps than these."""
    stages, (images, labels) = ["layer1", "layer2"], tiny_batch()
    runs: list[tuple[dict[str, bool], tuple[torch.Tensor, ...]]] = [
        ({}, (images, labels)),
        ({}, (images,)),
        ({"labels": False}, (images,)),
    ]
    values = []
    for options, arguments in runs:
        net = student()
        kd = distil(name, net=net, student_stages=stages, teacher_stages=stages, **options)
        net(images)
        values.append(kd(*arguments))
        kd.remove()
    assert values[0]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=0, atol=0)
