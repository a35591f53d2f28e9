"""The cache gives what the teacher gave for the same view, and for no other teacher."""

import errno
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, EmbeddingTap, InputTransform, KDHooksError, Teacher, hookimpl
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher import cache as cache_module
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.cache_files import Index, Parts, checksums
from kdhooks.teacher.fingerprints import HEADER, ViewKeys
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_plugins.fcd import EmbeddingDistance
from tests.ranks import Results, here, on_two_ranks
from tests.test_recipe import export

SHAPE = (3, 32, 32)
Log = pytest.LogCaptureFixture


class Counting(nn.Module):
    """A teacher that notes how many images each of its calls got."""

    def __init__(self, dim: int = 12, gain: float = 1.0) -> None:
        super().__init__()
        module = tiny_teacher(dim).module
        assert module is not None
        self.inner, self.calls = module, list[int]()
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        embedding: Tensor = self.inner(images) * self.gain
        return embedding


def started(
    folder: Path, module: nn.Module | Callable[[Tensor], Tensor] | None = None, **options: Any
) -> TeacherSession:
    bound = options.pop("max_gb", None)
    teacher = Teacher(module or Counting(), cache=CacheOptions(folder, bound), **options)
    return TeacherSession(teacher, like=torch.zeros(1, *SHAPE))


def counts(session: TeacherSession) -> list[int]:
    """Images of each call since the last time."""
    module = session.teacher.module
    assert isinstance(module, Counting)
    calls, module.calls = module.calls, []
    return calls


def views(start: int, stop: int) -> Tensor:
    """Different images, the same ones for the same numbers."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (64, *SHAPE), generator=generator)[start:stop]
    return (pixels.float() - 127.5) / 127.5


def stored(folder: Path) -> int:
    return sum(len(keys) for _, _, keys in Parts(folder, 12).read_on())


def filled(folder: Path, stop: int = 8) -> Tensor:
    """A folder with some views; their embeddings."""
    teacher = started(folder)
    embedding = teacher(views(0, stop)).embedding
    teacher.close()
    return embedding


# --- keys ------------------------------------------------------------------------------------


def test_all_trainers_ways_to_scale_a_picture_give_one_key() -> None:
    pixels = torch.randint(0, 256, (8, *SHAPE), generator=torch.Generator().manual_seed(0)).float()
    ways = [
        (pixels - 127.5) / 127.5,
        (pixels / 255 - 0.5) / 0.5,
        pixels * (1 / 127.5) - 1,
        (pixels.double() / 127.5 - 1),
        ((pixels - 127.5) / 127.5).half(),
    ]
    keys = [ViewKeys()(way) for way in ways]
    for other in keys[1:]:
        assert torch.equal(keys[0], other)
    assert len(set(keys[0].tolist())) == 8


def test_a_key_is_the_sum_it_is_said_to_be() -> None:
    """A loop over Python's whole numbers; the numbers are part of the format of a cache."""
    raw = np.random.PCG64(20180118).random_raw(12).view(np.uint32).tolist()
    pixels = [0, 255, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    high, low = (
        sum(weight * (0x4B400000 + 15 * pixel) for weight, pixel in zip(half, pixels, strict=True))
        for half in (raw[:12], raw[12:])
    )
    image = torch.tensor(pixels).reshape(1, 3, 2, 2).float()
    (found,) = ViewKeys()((image - 127.5) / 127.5).tolist()
    assert found % 2**64 == (high % 2**32) << 32 | low % 2**32


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_key_of_any_numbers_is_of_three_roundings(scale: float, dtype: torch.dtype) -> None:
    """As numpy does them; a fused multiply-add would give other keys."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(64, *SHAPE, generator=generator) * scale).to(dtype)
    images[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, 0]).to(dtype)
    pixels = images.float().numpy().reshape(64, -1)
    with np.errstate(over="ignore"):
        grid = (pixels + np.float32(1)) * np.float32(1912.5) + np.float32(1.5 * 2**23)
    bits = grid.view(np.uint32).astype(np.uint64)
    raw: Any = np.random.PCG64(20180118).random_raw(bits.shape[1])
    weights = raw.view(np.uint32).reshape(2, -1)
    halves = [(bits * half).astype(np.uint32).sum(axis=1, dtype=np.uint32) for half in weights]
    low_first = np.stack(halves[::-1], axis=1).astype("<u4")
    assert ViewKeys()(images).tolist() == low_first.view("<i8")[:, 0].tolist()


def test_a_key_does_not_depend_on_the_batch_and_notices_one_level_of_one_pixel() -> None:
    keys, images = ViewKeys(), views(0, 6)
    assert torch.equal(keys(images)[2:3], keys(images[2:3]))
    rearranged = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(keys(images), keys(rearranged))
    plain = keys(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(keys(images), plain)
    other = images.clone()
    other[2, 1, 5, 5] += (1 if other[2, 1, 5, 5] < 0 else -1) / 127.5
    assert (keys(images) != keys(other)).tolist() == [False, False, True, False, False, False]


def test_no_two_of_65536_pictures_share_a_key() -> None:
    """Every pair of levels of two pixels."""
    first, second = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    images = torch.stack([first.flatten(), second.flatten(), torch.zeros(65536)], dim=1)
    keys = ViewKeys()((images[:, :, None, None] - 127.5) / 127.5)
    assert len(keys.unique()) == 65536


@pytest.mark.gpu
def test_a_gpu_gives_the_same_keys_and_a_call_of_hits_waits_for_them_alone(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = views(0, 8).cuda()
    assert torch.equal(ViewKeys()(images).cpu(), ViewKeys()(images.cpu()))
    teacher = TeacherSession(Teacher(Counting(), cache=CacheOptions(tmp_path)), like=images)
    teacher(images)
    expected = teacher(images).embedding
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        found = teacher(images).embedding
    torch.cuda.set_sync_debug_mode("default")
    assert not waits, "but for the event of the keys, which torch does not count"
    assert_close(found, expected, rtol=0, atol=0)


# --- hits and misses -------------------------------------------------------------------------


def test_an_epoch_repeats_the_first_to_the_bit_without_the_teacher(tmp_path: Path) -> None:
    teacher = started(tmp_path)
    first = [teacher(views(i, i + 8)).embedding for i in (0, 8)]
    teacher(views(0, 8))  # the first batch that hits goes through the teacher once more
    counts(teacher)
    second = [teacher(views(i, i + 8)).embedding for i in (0, 8)]
    assert counts(teacher) == []
    assert_close(second, first, rtol=0, atol=0)
    assert second[0].dtype == torch.float32


def test_it_gives_the_teachers_embedding_rounded_to_float16(tmp_path: Path) -> None:
    teacher, images = started(tmp_path), views(0, 8)
    plain = TeacherSession(Teacher(Counting()))(images).embedding
    for _ in range(2):
        assert_close(teacher(images).embedding, plain.half().float(), rtol=0, atol=0)


def test_a_mirrored_view_is_one_of_its_own(tmp_path: Path) -> None:
    teacher, images = started(tmp_path), views(0, 4)
    plain = TeacherSession(Teacher(Counting()))
    for flipped in ([0, 1], [], [0, 1, 2, 3], [2], [0, 3]):
        seen = images.clone()
        seen[flipped] = images[flipped].flip(-1)
        expected = plain(seen).embedding
        assert_close(teacher(seen).embedding, expected, rtol=1e-3, atol=1e-3)
    teacher.close()
    assert stored(tmp_path) == 8


def test_misses_go_through_the_teacher_in_one_batch(tmp_path: Path) -> None:
    teacher = started(tmp_path)
    teacher(views(0, 8))
    teacher(views(0, 8))
    counts(teacher)
    mixed = torch.cat([views(6, 8), views(20, 23), views(0, 3)])
    expected = TeacherSession(Teacher(Counting()))(mixed).embedding.half().float()
    assert_close(teacher(mixed).embedding, expected, rtol=2e-3, atol=2e-3)
    assert counts(teacher) == [4]  # 3, and one that fills them up to a power of two


def test_a_view_twice_in_a_batch_is_embedded_once(tmp_path: Path) -> None:
    teacher, images = started(tmp_path), views(0, 4)[[0, 1, 0, 1]]
    counts(teacher)
    found = teacher(images).embedding
    assert counts(teacher) == [2]
    assert_close(found[:2], found[2:], rtol=0, atol=0)
    teacher.close()
    assert stored(tmp_path) == 2


def test_a_later_run_finds_it_and_tries_the_teacher_once(tmp_path: Path) -> None:
    expected = filled(tmp_path)
    teacher = started(tmp_path)
    counts(teacher)
    assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    assert counts(teacher) == [8]
    assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    assert counts(teacher) == []


def test_rows_of_the_cache_are_known_to_be_finite_and_the_teachers_are_not(tmp_path: Path) -> None:
    teacher = started(tmp_path)
    known = [
        teacher(views(start, start + 8)).finite
        for start in (0, 0, 0, 4, 4)  # misses, hits, hits, both, hits
    ]
    assert known == [False, True, True, False, True]


def test_a_miss_that_is_not_finite_is_noticed_among_hits(tmp_path: Path) -> None:
    """Hits are not looked at in each step, since they were when they were written."""

    def bad_if_bright(images: Tensor) -> Tensor:
        embedding = images.mean(dim=(2, 3)).repeat(1, 4)
        return torch.where(images.amax(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0] > 5, nan, embedding)

    nan = torch.tensor(torch.nan)
    teacher = Teacher(bad_if_bright, cache=CacheOptions(tmp_path))
    net = TinyFaceNet().train()
    kd = Distiller(net, teacher, ["fcd"], input_shape=SHAPE)
    for start in (0, 0, 8):
        net(images := views(start, start + 8))
        kd(images, torch.arange(8))
    mixed = views(0, 8)
    mixed[5] += 10
    net(mixed)
    kd(mixed, torch.arange(8))
    with pytest.raises(
        KDHooksError,
        match=r"step 4: fcd not finite and the teacher's embedding not finite for 1 of 8 samples "
        r"\(labels \[5\]\)",
    ):
        kd.check_finite()


def test_rows_that_float16_can_not_hold_are_not_kept(tmp_path: Path) -> None:
    teacher = started(tmp_path, lambda images: images.mean(dim=(2, 3)) * 1e8)
    assert not teacher(views(0, 4)).embedding.isfinite().all()
    teacher.close()
    assert stored(tmp_path) == 0


def test_a_session_that_knows_no_images_opens_no_cache(tmp_path: Path) -> None:
    teacher = Teacher(Counting(), cache=CacheOptions(tmp_path / "cache"))
    TeacherSession(teacher)(views(0, 4))
    assert not (tmp_path / "cache").exists()


# --- in a Distiller --------------------------------------------------------------------------


def distilled(teacher: Teacher, steps: int = 4) -> tuple[list[Tensor], nn.Module]:
    """The losses of a short training, and the student."""
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


def test_a_cached_training_is_the_uncached_one_but_for_the_rounding(tmp_path: Path) -> None:
    plain, _ = distilled(Teacher(Counting()))
    cached, first = distilled(Teacher(Counting(), cache=CacheOptions(tmp_path)))
    assert_close(cached, plain, rtol=1e-3, atol=1e-3)
    again, second = distilled(Teacher(Counting(), cache=CacheOptions(tmp_path)))
    assert_close(again, cached, rtol=0, atol=0)
    assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_steps_of_a_filled_cache_leave_the_teacher_alone(tmp_path: Path) -> None:
    distilled(Teacher(Counting(), cache=CacheOptions(tmp_path)), steps=2)
    module = Counting()
    distilled(Teacher(module, cache=CacheOptions(tmp_path)), steps=6)
    assert module.calls == [2, 2, 12]  # shapes, fingerprint, and the first step


class Overwriting(TinyFaceNet):
    """Normalises its images where they are."""

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
def test_the_teacher_sees_what_it_is_given_whatever_the_student_saw(
    student: Callable[[], TinyFaceNet], tmp_path: Path
) -> None:
    teacher = Teacher(Counting(), cache=CacheOptions(tmp_path))
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
        cache = kd._session.cache
        assert cache is not None
        cache.flush()
        assert cache.look_up(cache.keys(given))[0].all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_student_trains_with_a_cache(tmp_path: Path) -> None:
    teacher = Teacher(Counting(), cache=CacheOptions(tmp_path))
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
        ("at", "keeps embeddings alone, and the teacher is tapped at layer1, layer2; remove teach"),
        (Adapted(), "keeps embeddings alone, and the teacher is adapted in training; remove teac"),
    ],
)
def test_features_and_adapted_teachers_are_refused(
    method: object, match: str, tmp_path: Path
) -> None:
    teacher = Teacher(Counting().inner, cache=CacheOptions(tmp_path / "cache"))
    stages = ("layer1", "layer2")
    with pytest.raises(KDHooksError, match=match):
        Distiller(
            TinyFaceNet(), teacher, [method], input_shape=SHAPE,
            student_stages=stages, teacher_stages=stages,
        )  # fmt: skip
    assert not (tmp_path / "cache").exists()


# --- other teachers --------------------------------------------------------------------------


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"module": Counting(gain=1.001)},
            r"was filled with weights '[0-9a-f]{64}', the teacher at",
        ),
        (
            {"transform": InputTransform(order="bgr")},
            "was filled with input .InputTransform.*'rgb'",
        ),
        ({"dtype": torch.bfloat16}, "with dtype 'torch.float32', the teacher at hand has 'torch.b"),
        ({"module": Counting(dim=8)}, "was filled with dim 12, the teacher at hand has 8"),
        (
            {"embedding": "inner.fc"},
            "was filled with embedding '', the teacher at hand has 'inner.fc'",
        ),
    ],
)
def test_another_teacher_is_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    filled(tmp_path)
    started(tmp_path)  # the twin: the same one is not
    with pytest.raises(KDHooksError, match=match):
        started(tmp_path, **options)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    teacher = Teacher(Mean(), cache=CacheOptions(tmp_path))
    TeacherSession(teacher, like=torch.zeros(1, 3, 8, 8))
    with pytest.raises(KDHooksError, match=r"filled with images \[3, 8, 8\], .* has \[3, 4, 4\]"):
        TeacherSession(teacher, like=torch.zeros(1, 3, 4, 4))


def test_functions_are_told_by_their_embeddings(tmp_path: Path) -> None:
    started(tmp_path, lambda images: images.mean(dim=(2, 3)))
    started(tmp_path, lambda images: images.mean(dim=(2, 3)) * 1.001)
    with pytest.raises(KDHooksError, match=r"another teacher: embeddings of one fixed batch are 9"):
        started(tmp_path, lambda images: images.mean(dim=(2, 3)) * 1.1)


class Named:
    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def test_a_file_that_runs_as_a_function_is_told_by_its_hash(tmp_path: Path) -> None:
    for _ in range(2):
        started(tmp_path, Named("1f"))
    with pytest.raises(KDHooksError, match="with weights '1f', the teacher at hand has '2e'"):
        started(tmp_path, Named("2e"))


@pytest.mark.parametrize("convert", [False, True])
def test_an_onnx_file_has_the_same_fingerprint_in_each_run(convert: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export(Counting().inner, views(0, 4), tmp_path / "teacher.onnx")
    spec = {"onnx": tmp_path / "teacher.onnx", "convert": convert, "cache": tmp_path / "cache"}
    recipe = Recipe.read({"teacher": spec, "methods": ["fcd"]})
    for hits in (0, 4):
        teacher = TeacherSession(build_teacher(recipe), like=views(0, 1))
        teacher(views(0, 4))
        assert teacher.cache is not None
        assert teacher.cache.hits == hits
        teacher.close()
    assert '"weights": null' not in (tmp_path / "cache" / HEADER).read_text()


def test_embeddings_of_length_zero_are_the_same(tmp_path: Path) -> None:
    for _ in range(2):
        teacher = started(tmp_path, lambda images: images.mean(dim=(2, 3)).clamp(1, 2) - 1)
        assert not teacher(views(0, 4)).embedding.any()
        teacher.close()


def test_a_transform_of_the_users_own_is_told_by_the_embeddings(tmp_path: Path) -> None:
    for _ in range(2):
        started(tmp_path, transform=lambda images: images.flip(1))
    with pytest.raises(KDHooksError, match="embeddings of one fixed batch are"):
        started(tmp_path, transform=lambda images: images.flip(-1))


def test_of_two_that_begin_a_folder_at_once_the_first_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    before = (tmp_path / HEADER).read_text()
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # as the second one saw it
    with pytest.raises(KDHooksError, match="was filled with weights"):
        started(tmp_path, Counting(gain=2.0))
    assert (tmp_path / HEADER).read_text() == before
    assert list(tmp_path.glob(f"{HEADER}.*")) == []


def test_an_edited_forward_is_noticed_though_the_weights_are_the_same(tmp_path: Path) -> None:
    filled(tmp_path)
    module = Counting()
    module.inner.register_forward_hook(lambda _, args, output: output.flip(1))
    with pytest.raises(KDHooksError, match="embeddings of one fixed batch are"):
        started(tmp_path, module)


def test_rows_of_another_teacher_are_noticed_on_the_first_batch(tmp_path: Path) -> None:
    """As if somebody had copied files from one cache to another."""
    filled(tmp_path / "one")
    other = started(tmp_path / "other", Counting(gain=2.0))
    other(views(0, 8))
    other.close()
    for path in (tmp_path / "other").glob("*.[kr]*s"):
        path.replace(tmp_path / "one" / path.name)
    with pytest.raises(
        KDHooksError, match=r"another teacher: its rows for the first batch are 100"
    ):
        started(tmp_path / "one")(views(0, 8))


@pytest.mark.parametrize("content", ["", "{", "[1"])
def test_a_header_that_can_not_be_read_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / HEADER).write_text(content)
    with pytest.raises(KDHooksError, match=r"teacher\.json' can't be read .*; remove the folder"):
        started(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 2}'])
def test_a_header_of_another_format_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / HEADER).write_text(content)
    with pytest.raises(KDHooksError, match=r"must be of format 1, which .*; remove the folder"):
        started(tmp_path)


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KDHooksError, match=r"can't be begun .*; make room, or name another folder"):
        started(tmp_path / "file" / "cache")


# --- damage ----------------------------------------------------------------------------------


def part_of(folder: Path, suffix: str) -> Path:
    (path,) = folder.glob(f"*.{suffix}")
    return path


@pytest.mark.parametrize(
    ("suffix", "cut", "left"), [("keys", 1, 7), ("rows", 1, 7), ("rows", 30, 6)]
)
def test_a_torn_tail_is_left_out(suffix: str, cut: int, left: int, tmp_path: Path) -> None:
    expected = filled(tmp_path)
    path = part_of(tmp_path, suffix)
    os.truncate(path, path.stat().st_size - cut)
    teacher = started(tmp_path)
    found = teacher(views(0, 8)).embedding
    assert teacher.cache is not None
    assert teacher.cache.hits == left
    assert_close(found, expected, rtol=2e-3, atol=2e-3)
    teacher.close()
    assert stored(tmp_path) == 8


@pytest.mark.parametrize("content", [b"\0" * 24, b"\x01\x02" * 12])
def test_a_row_that_is_not_what_was_written_is_embedded_anew(
    content: bytes, tmp_path: Path
) -> None:
    """As after a power cut: the file has its length, but not its content."""
    expected = filled(tmp_path)
    path = part_of(tmp_path, "rows")
    with path.open("r+b") as file:
        file.seek(3 * 24)
        file.write(content)
    for hits in (7, 8):
        teacher = started(tmp_path)
        assert_close(teacher(views(0, 8)).embedding, expected, rtol=2e-3, atol=2e-3)
        assert teacher.cache is not None
        assert teacher.cache.hits == hits
        teacher.close()


WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from tests.test_teacher_cache import Counting, started, views

def write(descriptor, content):
    calls.append(descriptor)
    if len(calls) == int(sys.argv[2]):
        real(descriptor, content[: len(content) // 2 + 1])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(descriptor, content)

calls = []
real, os.write = os.write, write
module = Counting()  # the other process's: a few threads more or less give other last bits
module.load_state_dict(torch.load(sys.argv[3]))
teacher = started(Path(sys.argv[1]), module)
for start in range(0, 64, 8):
    teacher(views(start, start + 8))
"""


@pytest.mark.parametrize(("fatal", "kept"), [(1, 0), (5, 16), (6, 20)])
def test_kill_9_in_the_middle_of_a_write_leaves_a_whole_cache(
    fatal: int, kept: int, tmp_path: Path
) -> None:
    """Each batch of 8 is two writes, rows and keys; of the fatal one half gets through."""
    torch.save(Counting().state_dict(), tmp_path / "teacher.pt")
    folder = tmp_path / "cache"
    given = [str(folder), str(fatal), str(tmp_path / "teacher.pt")]
    ended = subprocess.run([sys.executable, "-c", WRITER, *given], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert stored(folder) == kept
    teacher, plain = started(folder), TeacherSession(Teacher(Counting()))
    for start in range(0, 64, 8):
        wanted = plain(views(start, start + 8)).embedding.half().float()
        found = teacher(views(start, start + 8)).embedding
        assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    assert teacher.cache is not None
    assert teacher.cache.hits == kept
    teacher.close()
    assert stored(folder) == 64


# --- a full disk, and the bound --------------------------------------------------------------


def test_a_full_disk_is_said_once_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    """The disk takes half of a write, and then nothing."""
    expected = filled(tmp_path)
    teacher = started(tmp_path)
    written: list[int] = []

    def write(descriptor: int, content: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(real(descriptor, content[: len(content) // 2]))
        return written[0]

    real = os.write
    monkeypatch.setattr(os, "write", write)
    plain = TeacherSession(Teacher(Counting()))(views(8, 16)).embedding.half().float()
    for _ in range(3):
        assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
        assert_close(teacher(views(8, 16)).embedding, plain, rtol=0, atol=0)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "can't be written (No space left on device); what it holds is used on" in said
    assert str(tmp_path) in said
    monkeypatch.undo()
    teacher.close()
    assert stored(tmp_path) == 8
    assert_close(started(tmp_path)(views(0, 8)).embedding, expected, rtol=0, atol=0)


def test_a_write_that_takes_several_goes_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda to, content: real(to, content[:7]))
    expected = filled(tmp_path)
    monkeypatch.undo()
    teacher = started(tmp_path)
    assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    assert teacher.cache is not None
    assert teacher.cache.hits == 8


def test_a_folder_without_room_for_a_header_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KDHooksError, match=r"can't be begun \(No space left on device\); make ro"):
        started(tmp_path)


def test_a_full_cache_keeps_what_it_has_and_adds_nothing(tmp_path: Path, caplog: Log) -> None:
    record = 24 + 12
    teacher = started(tmp_path, max_gb=15 * record / 1e9)
    for start in (0, 8, 16, 24):
        teacher(views(start, start + 8))
    teacher.close()
    assert stored(tmp_path) == 8  # a second batch would pass the bound
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"{tmp_path} holds max_gb = 5.4e-07; what it holds is used on" in said
    teacher = started(tmp_path, max_gb=15 * record / 1e9)
    assert teacher.cache is not None
    for start in (0, 16):
        teacher(views(start, start + 8))
    assert teacher.cache.hits == 8


def test_the_last_of_the_disk_is_left_to_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    expected = filled(tmp_path)
    monkeypatch.setattr("kdhooks.teacher.cache.RESERVE_GB", 1e9)
    teacher = started(tmp_path)
    for start in (0, 8, 16, 0):
        teacher(views(start, start + 8))
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"{tmp_path} leaves the disk its last 1000000000.0 GB; what it holds is used on" in said
    assert said.endswith("(8 of 16 were found so far)")
    assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    teacher.close()
    assert stored(tmp_path) == 8


@pytest.mark.parametrize("bound", [0, -1, "20"])
def test_a_bound_must_be_positive(bound: Any) -> None:
    with pytest.raises(KDHooksError, match=f"max_gb must be positive; found {bound}"):
        CacheOptions(Path("cache"), bound)


# --- several ranks ---------------------------------------------------------------------------


def test_what_another_process_wrote_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdhooks.teacher.cache.READ_ON_EVERY", 0.0)
    one, two = started(tmp_path), started(tmp_path)
    for start in (0, 8):
        expected = one(views(start, start + 8)).embedding
        one.cache.flush()  # type: ignore[union-attr]
        assert_close(two(views(start, start + 8)).embedding, expected, rtol=0, atol=0)
    assert two.cache is not None
    assert two.cache.hits == 16


def test_other_processes_are_asked_at_intervals_alone(tmp_path: Path) -> None:
    one, two = started(tmp_path), started(tmp_path)
    one(views(0, 8))
    one.close()
    two(views(0, 8))
    assert two.cache is not None
    assert two.cache.hits == 0


def scenarios() -> dict[str, Results]:
    """Each rank sees its half of the views, and then, in a second epoch, the other half."""
    cache_module.READ_ON_EVERY = 0.0
    teacher = started(Path(os.environ["CACHE_OF_RANKS"]))
    rank, _ = here()
    halves = [views(0, 8), views(8, 16)]
    first = teacher(halves[rank]).embedding
    assert teacher.cache is not None
    teacher.cache.flush()
    torch.distributed.barrier()
    second = teacher(halves[1 - rank]).embedding
    counts(teacher)
    third = teacher(torch.cat(halves)).embedding
    results = {"first": first, "second": second, "third": third}
    return {"": {**results, "hits": teacher.cache.hits, "calls": counts(teacher)}}


def test_two_ranks_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_OF_RANKS", str(tmp_path / "cache"))
    zero, one = (found[""] for found in on_two_ranks(scenarios, tmp_path))
    assert_close(zero["second"], one["first"], rtol=0, atol=0)
    assert_close(one["second"], zero["first"], rtol=0, atol=0)
    assert_close(zero["third"], one["third"], rtol=0, atol=0)
    assert zero["hits"] == one["hits"] == 8 + 16
    assert zero["calls"] == one["calls"] == []
    assert len(list((tmp_path / "cache").glob("*.keys"))) == 2
    assert stored(tmp_path / "cache") == 16


# --- the index -------------------------------------------------------------------------------


def test_the_index_is_a_dict_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdhooks.teacher.cache_files._RECENT", 50)
    generator = np.random.default_rng(0)
    index, expected = Index(), dict[int, int]()
    for size in [*generator.integers(0, 40, 40), 200, 3]:
        keys = generator.integers(-(2**62), 2**62, size) // 2**53  # small ones meet again
        places = generator.integers(0, 2**62, size)
        index.add(keys, places)
        expected.update(zip(keys.tolist(), places.tolist(), strict=True))
        asked = np.concatenate([keys, np.arange(-520, 520)])
        assert index.find(asked).tolist() == [expected.get(key, -1) for key in asked.tolist()]


def test_a_checksum_covers_key_and_row() -> None:
    rows = np.ones((2, 4), np.float16)
    keys = np.array([1, 2])
    one, two = checksums(keys, rows)
    assert one != two
    rows[0, 3] = 2
    assert checksums(keys, rows)[0] != one


# --- in a recipe -----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["cache", {"path": "cache", "max_gb": 0.5}])
def test_a_recipe_names_a_folder_beside_it(table: object, tmp_path: Path) -> None:
    text = '"cache"' if isinstance(table, str) else '{ path = "cache", max_gb = 0.5 }'
    (tmp_path / "teacher.onnx").write_text("")
    (tmp_path / "kd.toml").write_text(
        f'methods = ["fcd"]\nteacher = {{ onnx = "teacher.onnx", cache = {text} }}'
    )
    bound = None if isinstance(table, str) else 0.5
    options = Recipe.read(tmp_path / "kd.toml").teacher["cache"]
    assert options == CacheOptions(tmp_path / "cache", bound)


def test_the_cache_of_a_recipe_reaches_the_teacher(tmp_path: Path) -> None:
    spec = {"module": Counting(), "cache": str(tmp_path / "cache")}
    teacher = build_teacher(Recipe.read({"teacher": spec, "methods": ["fcd"]}))
    distilled(teacher, steps=1)
    assert stored(tmp_path / "cache") == 12


@pytest.mark.parametrize(
    ("cache", "match"),
    [
        (3, "teacher.cache must be a table; found int"),
        ({"max_gb": 3}, 'teacher.cache must name a folder, as "cache" or as .* found .*max_gb'),
        ({"pth": "cache"}, "teacher.cache has no key 'pth'; did you mean 'path'"),
        ({"path": "cache", "max_gb": 0}, "max_gb must be positive; found 0"),
        (__file__, "teacher.cache must be a folder; '.*py' is a file"),
    ],
)
def test_a_recipe_refuses(cache: object, match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        Recipe.read({"teacher": {"module": Mean(), "cache": cache}, "methods": ["fcd"]})
