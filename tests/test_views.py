"""The built-in views agree with independent computations, and refuse wrong options."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kdhooks import KDHooksError, StudentView, viewed
from kdhooks.recipe import Recipe
from kdhooks.testing import tiny_teacher
from kdhooks.views.blocks import _CHROMA, _LUMA, Compress
from kdhooks.views.blur import GaussianBlur
from kdhooks.views.low_resolution import Resample
from kdhooks.views.mask import _COLOURS, _SHAPES, CoverLowerFace

LEFT_EYE, RIGHT_EYE, NOSE = (38.29, 51.70), (73.53, 51.50), (56.03, 71.74)
LEFT_MOUTH, RIGHT_MOUTH = (41.55, 92.37), (70.73, 92.20)  # x and y in the template of 112 pixels


def images(count: int = 6, h: int = 112, w: int = 112, dtype: Any = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    fine = F.interpolate(smooth, (h, w), mode="bilinear")
    noise = torch.randn(fine.shape, generator=generator, dtype=torch.float64)
    return (fine + 0.2 * noise).clamp(-1, 1).to(dtype)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers)[:, None]


# --- low resolution ------------------------------------------------------------------------------


@pytest.mark.parametrize("up", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("down", ["area", "bilinear", "bicubic"])
def test_low_resolution_is_torchs_interpolation_of_each_image(down: Any, up: Any) -> None:
    given = images(4)
    sizes = (14, 28, 20, 25 if down == "area" else 112)  # the expected means take much memory
    found = Resample(sizes, down, up)(given, column(0.1, 0.3, 0.6, 0.9))
    for image, size, one in zip(given, sizes, found, strict=True):
        if down == "area":
            small = means_over_regions(image, size)
        else:
            small = F.interpolate(image[None], (size, size), mode=down, antialias=True)
        if up == "nearest":
            again = F.interpolate(small, (112, 112), mode="nearest-exact")
        else:
            again = F.interpolate(small, (112, 112), mode=up, align_corners=False)
        assert_close(one[None], again.clamp(-1, 1), rtol=0, atol=1e-12)
    assert found.abs().max() <= 1


def means_over_regions(image: Tensor, size: int) -> Tensor:
    """(3 s s) -> (1 3 n n): each pixel in size² equal parts, of which each region has s²."""
    parts = image.repeat_interleave(size, 1).repeat_interleave(size, 2)
    return F.avg_pool2d(parts[None], image.shape[1])


@pytest.mark.parametrize("up", ["bilinear", "nearest"])
def test_low_resolution_does_not_shift_the_face(up: Any) -> None:
    """The view of a mirrored image is the mirrored view, even if the size divides no side."""
    view = StudentView(low_resolution={"sizes": [20], "up": up})
    given = images(1)
    assert_close(viewed(view, given.flip(3)), viewed(view, given).flip(3), rtol=0, atol=1e-6)


def test_the_shorter_side_has_the_size_and_the_other_its_proportion() -> None:
    given = images(2, 64, 32)
    found = Resample((8,), "area", "bilinear")(given, column(0, 0))
    small = F.interpolate(given, (16, 8), mode="area")
    expected = F.interpolate(small, (64, 32), mode="bilinear")
    assert_close(found, expected, rtol=0, atol=1e-12)


def test_low_resolution_removes_detail_beyond_14_pixels() -> None:
    """A pattern with a period of 8 pixels becomes flat; one of 112 pixels stays."""
    place = torch.arange(112, dtype=torch.float64)
    view = StudentView(low_resolution={"sizes": [14]})

    def kept(period: int) -> float:
        wave = torch.sin(2 * math.pi * (place + 0.5) / period).expand(1, 3, 112, 112)
        return float(viewed(view, wave).std() / wave.std())

    assert kept(8) < 1e-6
    assert kept(112) > 0.95


def test_each_size_is_drawn() -> None:
    given = images(1).expand(40, -1, -1, -1)
    found = viewed(StudentView(low_resolution={"sizes": [14, 28]}), given)
    both = [viewed(StudentView(low_resolution={"sizes": [size]}), given)[0] for size in (14, 28)]
    counts = [sum(torch.allclose(one, like) for one in found) for like in both]
    assert sum(counts) == 40
    assert min(counts) > 10


# --- masks ---------------------------------------------------------------------------------------


def cover(draws: Tensor, h: int = 112, w: int = 112) -> Tensor:
    """(b 5) -> (b h w): how much the mask covers each pixel."""
    flat = torch.full((len(draws), 3, h, w), -1.0, dtype=torch.float64)
    first, second = (CoverLowerFace()(grey, draws) for grey in (flat, -flat))
    covers: Tensor = 1 - (second - first)[:, 0] / 2
    return covers


def at(covers: Tensor, place: tuple[float, float]) -> Tensor:
    """Return the pixel at x, y of the template."""
    scales = covers.shape[2] / 112, covers.shape[1] / 112
    x, y = (
        int((coordinate + 0.5) * scale) for coordinate, scale in zip(place, scales, strict=True)
    )
    return covers[:, y, x]


def every_mask() -> Tensor:
    """(b 5): each shape with each extreme shift."""
    shapes = [(number + 0.5) / len(_SHAPES) for number in range(len(_SHAPES))]
    ends = (0.0, 0.5, 0.9999)
    rows = [[shape, 0.1, 0.5, x, y] for shape in shapes for x in ends for y in ends]
    return torch.tensor(rows)


@pytest.mark.parametrize("size", [(112, 112), (224, 224), (56, 56), (112, 96)])
def test_every_mask_covers_nose_and_mouth_and_no_eye(size: tuple[int, int]) -> None:
    covers = cover(every_mask(), *size)
    for place in (NOSE, LEFT_MOUTH, RIGHT_MOUTH):
        assert (at(covers, place) == 1).all(), place
    for x, y in (LEFT_EYE, RIGHT_EYE):
        for dx in (-8, 0, 8):
            for dy in (-5, 0, 4):
                assert (at(covers, (x + dx, y + dy)) == 0).all(), (x + dx, y + dy)
    assert (at(covers, (56.0, 20.0)) == 0).all()


def test_a_mask_keeps_the_rest_of_the_image_and_has_its_colour() -> None:
    draws = torch.tensor([[0.1, (number + 0.5) / 8, 2 / 3, 0.5, 0.5] for number in range(8)])
    given = images(1).expand(8, -1, -1, -1)
    found = CoverLowerFace()(given, draws)
    untouched = cover(draws) == 0
    assert 0.5 < float(untouched.double().mean()) < 0.9
    where = untouched[:, None].expand_as(found)
    assert torch.equal(found[where], given[where])
    middle = (found[:, :, 92, 56] + 1) * 127.5  # light and shade are neutral here
    assert_close(middle, torch.tensor(_COLOURS).double(), rtol=0.01, atol=0.5)


def test_masks_differ_from_image_to_image() -> None:
    found = viewed(StudentView(mask={"p": 1.0}), torch.zeros(64, 3, 112, 112))
    outlines = {tuple((row != 0).flatten().nonzero().flatten().tolist()) for row in found[:, 0]}
    colours = {tuple(one) for one in found[:, :, 92, 56].mul(10).round().tolist()}
    assert len(outlines) > 40
    assert len(colours) > 20


# --- blur and grey -------------------------------------------------------------------------------


def test_blur_is_a_gaussian_with_its_own_width_for_each_image() -> None:
    point = torch.zeros(2, 3, 112, 112, dtype=torch.float64)
    point[:, :, 56, 50] = 1.0
    found = GaussianBlur(1.0, 3.0)(point, column(0.0, 0.5))
    for sigma, one in zip((1.0, 2.0), found, strict=True):
        place = torch.arange(112, dtype=torch.float64)
        bells = [torch.exp(-((place - middle) ** 2) / (2 * sigma**2)) for middle in (56, 50)]
        rows, columns = (bell / bell.sum() for bell in bells)
        assert_close(one, (rows[:, None] * columns).expand(3, -1, -1), rtol=0, atol=1e-9)


def test_blur_keeps_a_flat_image_and_scales_with_its_size() -> None:
    flat = torch.full((1, 3, 40, 56), 0.3, dtype=torch.float64)
    assert_close(GaussianBlur(2.0, 2.0)(flat, column(0.0)), flat)
    large = GaussianBlur(2.0, 2.0)(images(1, 224, 224), column(0.0))
    plain = GaussianBlur(4.0, 4.0)  # in pixels of a 112-pixel image: 2 become 4 in 224 pixels
    rows = torch.eye(224, dtype=torch.float64)[None, None].expand(1, 3, -1, -1)
    small = torch.eye(112, dtype=torch.float64)[None, None].expand(1, 3, -1, -1)
    width = GaussianBlur(2.0, 2.0)(rows, column(0.0))[0, 0, 112, 112]
    assert_close(width, plain(small, column(0.0))[0, 0, 56, 56], rtol=0.01, atol=0)
    assert large.std() < images(1, 224, 224).std()


def test_grey_is_the_luma_in_each_channel() -> None:
    given = images()
    found = viewed(StudentView(grey={"p": 1.0}), given)
    luma = torch.einsum("bkhw,k->bhw", given, torch.tensor([0.299, 0.587, 0.114]).double())
    assert_close(found, luma[:, None].expand_as(found))


# --- blocks --------------------------------------------------------------------------------------


def slow_jpeg(image: Tensor, quality: int) -> Tensor:
    """(3 h w) in [-1, 1], by the definition: each block, each coefficient, in float64."""
    weights = torch.tensor(
        [
            [0.299, 0.587, 0.114],
            [-0.299 / 1.772, -0.587 / 1.772, (1 - 0.114) / 1.772],
            [(1 - 0.299) / 1.402, -0.587 / 1.402, -0.114 / 1.402],
        ],
        dtype=torch.float64,
    )
    pixels = (image.double() + 1) * 127.5
    planes = torch.einsum("ck,khw->chw", weights, pixels)
    planes[0] -= 128
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    out = torch.zeros_like(planes)
    for channel, table in enumerate((_LUMA, _CHROMA, _CHROMA)):
        for top in range(0, image.shape[1], 8):
            for left in range(0, image.shape[2], 8):
                block = planes[channel, top : top + 8, left : left + 8]
                for u in range(8):
                    for v in range(8):
                        wave = basis(u, v)
                        step = min(max((table[8 * u + v] * scale + 50) // 100, 1), 255)
                        kept = round(float((wave * block).sum()) / step) * step
                        out[channel, top : top + 8, left : left + 8] += kept * wave
    out[0] += 128
    rgb = torch.einsum("kc,chw->khw", torch.linalg.inv(weights), out)
    return rgb.clamp(0, 255) / 127.5 - 1


def basis(u: int, v: int) -> Tensor:
    """(8 8): the cosine of the two frequencies, of length 1."""
    wave = torch.tensor(
        [
            [
                math.cos((2 * y + 1) * u * math.pi / 16) * math.cos((2 * x + 1) * v * math.pi / 16)
                for x in range(8)
            ]
            for y in range(8)
        ],
        dtype=torch.float64,
    )
    unit: Tensor = wave / wave.norm()
    return unit


@pytest.mark.parametrize("quality", [5, 30, 75, 100])
def test_blocks_agree_with_a_slow_reference(quality: int) -> None:
    given = images(2, 24, 16)
    found = Compress(quality, quality)(given, column(0.0, 0.9))
    expected = torch.stack([slow_jpeg(image, quality) for image in given])
    assert_close(found, expected, rtol=0, atol=1e-9)


def test_each_image_has_its_own_quality() -> None:
    given = images(3)
    found = Compress(5, 95)(given, column(0.0, 0.5, 0.9999))
    for quality, image, one in zip((5, 50, 95), given, found, strict=True):
        assert_close(one, Compress(quality, quality)(image[None], column(0.0))[0])
    lost = (found - given).square().mean((1, 2, 3))
    assert lost[0] > lost[1] > lost[2]


def test_sides_that_are_no_multiples_of_8_are_padded_with_the_edge() -> None:
    given = images(1, 20, 13)
    padded = F.pad(given, (0, 3, 0, 4), mode="replicate")
    found = Compress(20, 20)(given, column(0.0))
    assert_close(found, Compress(20, 20)(padded, column(0.0))[:, :, :20, :13])


# --- several views -------------------------------------------------------------------------------


def test_views_are_applied_in_their_order() -> None:
    """The order is mask, grey, blur, low_resolution, blocks, whatever the order of the table."""
    given = images(dtype=torch.float32)
    always: dict[str, Any] = {
        "blocks": {"p": 1.0}, "low_resolution": {"p": 1.0}, "blur": {"p": 1.0}, "grey": {"p": 1.0},
        "mask": {"p": 1.0},
    }  # fmt: skip
    one_by_one = given
    for name in ("mask", "grey", "blur", "low_resolution", "blocks"):
        one_by_one = viewed(StudentView(**{name: always[name]}), one_by_one)
    assert torch.equal(viewed(StudentView(**always), given), one_by_one)


@pytest.mark.parametrize("name", ["mask", "grey", "blur", "low_resolution", "blocks"])
def test_p_is_the_share_of_changed_images(name: str) -> None:
    given = images(1, 16, 16, torch.float16).expand(400, -1, -1, -1)
    options: dict[str, Any] = {"low_resolution": {"sizes": [4]}, "blur": {"sigma": [9, 9]}}

    def share(p: float) -> float:
        found = viewed(StudentView(**{name: {"p": p, **options.get(name, {})}}), given)
        return float((found != given).flatten(1).any(1).double().mean())

    assert share(0.0) == 0
    assert abs(share(0.3) - 0.3) < 0.08
    assert share(1.0) == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{"mask": {"p": 0.5}}, {"low_resolution": {"sizes": [14]}}])
def test_a_view_keeps_the_memory_format(layout: torch.memory_format, options: Any) -> None:
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).contiguous(memory_format=layout)
    seen = viewed(StudentView(**options), images)
    assert seen.is_contiguous(memory_format=layout)
    assert_close(seen, viewed(StudentView(**options), images.contiguous()), rtol=0, atol=1e-6)


def test_a_view_of_test_images_does_not_depend_on_the_batch_size() -> None:
    given = images(dtype=torch.float32)
    view = StudentView(mask={"p": 0.5}, low_resolution={"sizes": [14, 28]})
    whole = viewed(view, given, seed=1)
    parts = [viewed(view, given[i : i + 2], seed=1, first=i) for i in range(0, 6, 2)]
    assert_close(torch.cat(parts), whole)
    assert torch.equal(viewed(view, given, seed=1), whole), "a view is deterministic"
    assert not torch.equal(viewed(view, given, seed=2), whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "must name at least one view (mask, grey, blur, low_resolution, blocks); found an em"),
        ({"msk": {}}, "has no option 'msk'; did you mean 'mask'?"),
        ({"mask": 0.5}, "mask must be a table; found 0.5"),
        ({"mask": {"p": 1.5}}, "mask.p must be at least 0 and at most 1; found 1.5"),
        ({"grey": {"p": -1}}, "grey.p must be at least 0 and at most 1; found -1"),
        ({"blur": {"p": "0.5"}}, "blur.p must be a number; found '0.5'; write 0.5, without quotes"),
        ({"blur": {"sigma": 2}}, "blur.sigma must be a list of 2 numbers; found 2"),
        ({"blur": {"sigma": [0, 2]}}, "blur.sigma[0] must be above 0 pixels; found 0"),
        ({"blur": {"sigma": [2, 1]}}, "blur.sigma must be the smallest and the largest; found [2"),
        ({"blocks": {"quality": [0, 9]}}, "blocks.quality[0] must be at least 1 and at most 100;"),
        (
            {"blocks": {"quality": [9, 3]}},
            "blocks.quality must be the lowest and the highest; f",
        ),
        ({"low_resolution": {"sizes": []}}, "low_resolution.sizes must be a list of at least one;"),
        ({"low_resolution": {"sizes": [0]}}, "low_resolution.sizes[0] must be at least 1 pixels; "),
        ({"low_resolution": {"size": [14]}}, "low_resolution has no option 'size'; did you mean"),
        ({"low_resolution": {"p": 2}}, "low_resolution.p must be at least 0 and at most 1; found"),
        ({"low_resolution": {"up": "area"}}, "low_resolution.up must be one of 'bilinear', 'bicub"),
        ({"low_resolution": {"down": "nearest"}}, "low_resolution.down must be one of 'area', 'bi"),
        ({"blocks": {"p": None}}, "blocks.p must be a number; found None"),
    ],
)
def test_a_wrong_option_is_refused_in_python_and_in_a_recipe(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(KDHooksError) as in_python:
        StudentView(**options)
    recipe = {"teacher": tiny_teacher().module, "methods": ["fcd"], "student_view": options}
    with pytest.raises(KDHooksError) as in_recipe:
        Recipe.read(recipe)
    joint = " " if said.startswith(("must", "has")) else ": "
    assert str(in_python.value).startswith(f"student_view{joint}{said}")
    joint = " " if joint == " " else "."
    assert str(in_recipe.value).startswith(f"recipe: student_view{joint}{said}")


def test_a_view_must_be_a_table_or_a_module() -> None:
    recipe = {"teacher": tiny_teacher().module, "methods": ["fcd"], "student_view": "mask"}
    with pytest.raises(
        KDHooksError, match="student_view must be a table or a module; found 'mask'"
    ):
        Recipe.read(recipe)


def test_viewed_refuses_other_objects_and_images_that_are_not_rgb() -> None:
    with pytest.raises(KDHooksError, match=r"student_view must be a module .*; found dict"):
        viewed({"mask": {}}, images(1))  # type: ignore[arg-type]
    for channels in (1, 4):
        given = torch.zeros(2, channels, 32, 32)
        with pytest.raises(KDHooksError, match=rf"needs RGB images .* \(2, {channels}, 32, 32\)"):
            viewed(StudentView(mask={}), given)
