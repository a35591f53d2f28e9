"""The cache returns the teacher's embedding of a known view, and runs the teacher for new ones."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Teacher
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.fingerprints import ViewKeys
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet
from tests.cache_samples import SHAPE, Counting, counts, filled, started, stored, views

# --- keys ------------------------------------------------------------------------------------


def test_every_usual_way_to_scale_a_picture_leads_to_the_same_key() -> None:
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


def test_a_key_is_the_specified_sum() -> None:
    """The reference is a loop over Python integers; the keys are part of the format of a cache."""
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
def test_a_key_of_any_numbers_has_three_roundings(scale: float, dtype: torch.dtype) -> None:
    """They are numpy's roundings; a fused multiply-add would lead to other keys."""
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
    """The pictures are every pair of levels of two pixels."""
    first, second = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    images = torch.stack([first.flatten(), second.flatten(), torch.zeros(65536)], dim=1)
    keys = ViewKeys()((images[:, :, None, None] - 127.5) / 127.5)
    assert len(keys.unique()) == 65536


@pytest.mark.gpu
def test_a_gpu_computes_the_same_keys_and_a_call_of_hits_waits_only_for_them(
    tmp_path: Path,
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = views(0, 8).cuda()
    assert torch.equal(ViewKeys()(images).cpu(), ViewKeys()(images.cpu()))
    teacher = TeacherSession(Teacher(Counting(), cache=CacheOptions(path=tmp_path)), like=images)
    teacher(images)
    expected = teacher(images).embedding
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        found = teacher(images).embedding
    torch.cuda.set_sync_debug_mode("default")
    assert not waits, "torch does not count the wait for the event of the keys"
    assert_close(found, expected, rtol=0, atol=0)


# --- hits and misses -------------------------------------------------------------------------


def test_an_epoch_repeats_the_first_to_the_bit_without_the_teacher(tmp_path: Path) -> None:
    teacher = started(tmp_path)
    first = [teacher(views(i, i + 8)).embedding for i in (0, 8)]
    teacher(views(0, 8))  # the first batch of hits also runs the teacher, to compare
    counts(teacher)
    second = [teacher(views(i, i + 8)).embedding for i in (0, 8)]
    assert counts(teacher) == []
    assert_close(second, first, rtol=0, atol=0)
    assert second[0].dtype == torch.float32


def test_it_returns_the_teachers_embedding_rounded_to_float16(tmp_path: Path) -> None:
    teacher, images = started(tmp_path), views(0, 8)
    plain = TeacherSession(Teacher(Counting()))(images).embedding
    for _ in range(2):
        assert_close(teacher(images).embedding, plain.half().float(), rtol=0, atol=0)


def test_a_mirrored_view_is_another_view(tmp_path: Path) -> None:
    teacher, images = started(tmp_path), views(0, 4)
    plain = TeacherSession(Teacher(Counting()))
    for flipped in ([0, 1], [], [0, 1, 2, 3], [2], [0, 3]):
        seen = images.clone()
        seen[flipped] = images[flipped].flip(-1)
        expected = plain(seen).embedding
        assert_close(teacher(seen).embedding, expected, rtol=1e-3, atol=1e-3)
    teacher.close()
    assert stored(tmp_path) == 8


def test_the_teacher_embeds_misses_in_one_batch(tmp_path: Path) -> None:
    teacher = started(tmp_path)
    teacher(views(0, 8))
    teacher(views(0, 8))
    counts(teacher)
    mixed = torch.cat([views(6, 8), views(20, 23), views(0, 3)])
    expected = TeacherSession(Teacher(Counting()))(mixed).embedding.half().float()
    assert_close(teacher(mixed).embedding, expected, rtol=2e-3, atol=2e-3)
    assert counts(teacher) == [4]  # 3 misses, padded to a power of two


def test_a_view_twice_in_a_batch_is_embedded_once(tmp_path: Path) -> None:
    teacher, images = started(tmp_path), views(0, 4)[[0, 1, 0, 1]]
    counts(teacher)
    found = teacher(images).embedding
    assert counts(teacher) == [2]
    assert_close(found[:2], found[2:], rtol=0, atol=0)
    teacher.close()
    assert stored(tmp_path) == 2


def test_a_later_run_finds_the_rows_and_compares_the_first_batch(tmp_path: Path) -> None:
    expected = filled(tmp_path)
    teacher = started(tmp_path)
    counts(teacher)
    assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    assert counts(teacher) == [8]
    assert_close(teacher(views(0, 8)).embedding, expected, rtol=0, atol=0)
    assert counts(teacher) == []


def test_only_cached_rows_are_known_to_be_finite(tmp_path: Path) -> None:
    teacher = started(tmp_path)
    known = [
        teacher(views(start, start + 8)).finite
        for start in (0, 0, 0, 4, 4)  # misses, hits, hits, both, hits
    ]
    assert known == [False, True, True, False, True]


def test_a_miss_that_is_not_finite_is_noticed_among_hits(tmp_path: Path) -> None:
    """Hits are not checked in each step, because they were checked when they were written."""

    def bad_if_bright(images: Tensor) -> Tensor:
        embedding = images.mean(dim=(2, 3)).repeat(1, 4)
        return torch.where(images.amax(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0] > 5, nan, embedding)

    nan = torch.tensor(torch.nan)
    teacher = Teacher(bad_if_bright, cache=CacheOptions(path=tmp_path))
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


def test_rows_beyond_the_range_of_float16_are_not_stored(tmp_path: Path) -> None:
    teacher = started(tmp_path, lambda images: images.mean(dim=(2, 3)) * 1e8)
    assert not teacher(views(0, 4)).embedding.isfinite().all()
    teacher.close()
    assert stored(tmp_path) == 0


def test_a_session_without_sample_images_opens_no_cache(tmp_path: Path) -> None:
    teacher = Teacher(Counting(), cache=CacheOptions(path=tmp_path / "cache"))
    TeacherSession(teacher)(views(0, 4))
    assert not (tmp_path / "cache").exists()
