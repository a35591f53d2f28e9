"""A Distiller and a recipe train with the cache as without it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, EmbeddingTap, KDHooksError, Teacher, hookimpl
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher.cache import CacheOptions
from kdhooks.testing import TinyFaceNet, tiny_batch
from kdhooks_plugins.fcd import EmbeddingDistance
from tests.cache_samples import SHAPE, Counting, Mean, stored, views

# --- in a Distiller --------------------------------------------------------------------------


def distilled(teacher: Teacher, steps: int = 4) -> tuple[list[Tensor], nn.Module]:
    """Train a few steps; return the losses and the student."""
    torch.manual_seed(0)
    student = TinyFaceNet().train()
    kd = Distiller(student, teacher, ["fcd", "rkd"], input_shape=SHAPE)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.01)
    losses = []
    images, labels = tiny_batch()
    for step in range(steps):
        seen = images.flip(-1) if step % 2 else images
        student(seen)
        loss = torch.stack(list(kd(seen, labels).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    kd.remove()
    return losses, student


def test_a_cached_training_equals_the_uncached_one_up_to_rounding(tmp_path: Path) -> None:
    plain, _ = distilled(Teacher(Counting()))
    cached, first = distilled(Teacher(Counting(), cache=CacheOptions(path=tmp_path)))
    assert_close(cached, plain, rtol=1e-3, atol=1e-3)
    again, second = distilled(Teacher(Counting(), cache=CacheOptions(path=tmp_path)))
    assert_close(again, cached, rtol=0, atol=0)
    assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_with_a_filled_cache_the_teacher_does_not_run(tmp_path: Path) -> None:
    distilled(Teacher(Counting(), cache=CacheOptions(path=tmp_path)), steps=2)
    module = Counting()
    distilled(Teacher(module, cache=CacheOptions(path=tmp_path)), steps=6)
    assert module.calls == [2, 2, 12]  # the probe of shapes, the fingerprint, and the first step


class Overwriting(TinyFaceNet):
    """Normalises its images in place."""

    def forward(self, images: Tensor) -> Tensor:
        images.mul_(0.5)
        return super().forward(images)


class Seeing(EmbeddingDistance):
    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("seeing", self)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        self.seen = teacher
        return super().forward(student, teacher, labels)


@pytest.mark.parametrize("student", [TinyFaceNet, Overwriting])
def test_the_teacher_sees_teacher_images_whatever_the_student_saw(
    student: Callable[[], TinyFaceNet], tmp_path: Path
) -> None:
    teacher = Teacher(Counting(), cache=CacheOptions(path=tmp_path))
    net, method = student().train(), Seeing()
    kd = Distiller(net, teacher, [method], input_shape=SHAPE)
    for step in range(3):
        images = views(8 * step, 8 * step + 8)
        given = images.flip(-1)
        net(images)
        kd(
            images.clone() if student is Overwriting else images,
            torch.arange(8),
            teacher_images=given,
        )
        assert_close(method.seen, Counting()(given).half().float())
        (cache,) = kd._session.caches
        cache.flush()
        assert cache.look_up(cache.keys(given))[0].all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_student_trains_with_a_cache(tmp_path: Path) -> None:
    teacher = Teacher(Counting(), cache=CacheOptions(path=tmp_path))
    net, method = TinyFaceNet().train(), Seeing()
    kd = Distiller(net, teacher, [method], input_shape=SHAPE)
    fast = torch.compile(net, backend="eager")
    for _ in range(2):
        fast(images := views(0, 8))
        kd(images, torch.arange(8))
        assert_close(method.seen, Counting()(images).half().float())


class Adapter(nn.Module):
    def forward(self, teacher: nn.Module, images: Tensor) -> Tensor:
        embedding: Tensor = teacher(images)
        return embedding


class Adapted:
    @hookimpl
    def adapt_teacher(self) -> nn.Module:
        return Adapter()

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("adapted", EmbeddingDistance())


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("at", "stores embeddings only, but the teacher is tapped at layer1, layer2; remove teach"),
        (Adapted(), "stores embeddings only, but the teacher is adapted in training; remove teac"),
    ],
)
def test_features_and_adapted_teachers_are_refused(
    method: object, match: str, tmp_path: Path
) -> None:
    teacher = Teacher(Counting().inner, cache=CacheOptions(path=tmp_path / "cache"))
    stages = ("layer1", "layer2")
    with pytest.raises(KDHooksError, match=match):
        Distiller(
            TinyFaceNet(), teacher, [method], input_shape=SHAPE,
            student_stages=stages, teacher_stages=stages,
        )  # fmt: skip
    assert not (tmp_path / "cache").exists()


# --- in a recipe -----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["cache", {"path": "cache", "max_gb": 0.5}])
def test_the_folder_of_a_recipe_is_relative_to_its_file(table: object, tmp_path: Path) -> None:
    text = '"cache"' if isinstance(table, str) else '{ path = "cache", max_gb = 0.5 }'
    (tmp_path / "teacher.onnx").write_text("onnx")
    (tmp_path / "kd.toml").write_text(
        f'methods = ["fcd"]\nteacher = {{ onnx = "teacher.onnx", cache = {text} }}'
    )
    bound = None if isinstance(table, str) else 0.5
    options = Recipe.read(tmp_path / "kd.toml").teachers[0].cache
    assert isinstance(options, CacheOptions)
    assert (options.path, options.max_gb) == (tmp_path / "cache", bound)


def test_the_cache_of_a_recipe_reaches_the_teacher(tmp_path: Path) -> None:
    spec = {"module": Counting(), "cache": str(tmp_path / "cache")}
    teacher = build_teacher(Recipe.read({"teacher": spec, "methods": ["fcd"]}))
    distilled(teacher, steps=1)
    assert stored(tmp_path / "cache") == 12


@pytest.mark.parametrize(
    ("cache", "match"),
    [
        (3, "teacher.cache must be a table or a path; found 3"),
        ({"max_gb": 3}, "teacher.cache needs its option 'path'"),
        ({"pth": "cache"}, "teacher.cache has no option 'pth'; did you mean 'path'"),
        ({"path": "cache", "max_gb": 0}, "max_gb must be above 0 GB; found 0"),
        (__file__, "teacher.cache: path must be a folder; '.*py' is a file"),
    ],
)
def test_a_recipe_refuses(cache: object, match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        Recipe.read({"teacher": {"module": Mean(), "cache": cache}, "methods": ["fcd"]})
