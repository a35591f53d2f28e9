"""A picture is decoded to the pixels that it shows, or refused."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from kdhooks.pictures import Unreadable, decode, read_size

SHADES = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOURS = np.random.default_rng(0).integers(0, 256, (3, 4, 3)).astype(np.uint8)


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(alpha: int) -> Any:
    image = Image.fromarray(COLOURS).convert("RGBA")
    image.putpixel((0, 0), (1, 2, 3, alpha))
    return image


def grey_as_rgb(shades: np.ndarray) -> np.ndarray:
    return np.repeat(shades[:, :, None], 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_colours_are_the_pictures(kind: str) -> None:
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(COLOURS), kind)), COLOURS)


def test_grey_pictures_have_three_equal_channels() -> None:
    found = decode(encoded(Image.fromarray(SHADES)))
    np.testing.assert_array_equal(found, grey_as_rgb(SHADES))
    black_and_white = Image.fromarray(SHADES > 100)
    np.testing.assert_array_equal(
        decode(encoded(black_and_white)), grey_as_rgb((SHADES > 100) * np.uint8(255))
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped_to_white(kind: str) -> None:
    deep = SHADES.astype(np.uint16) * 257
    deep[0, :2] = 65535, 300
    found = decode(encoded(Image.fromarray(deep), kind))
    expected = SHADES.copy()
    expected[0, :2] = 255, 1
    np.testing.assert_array_equal(found, grey_as_rgb(expected))


def test_a_palette_is_looked_up() -> None:
    image = Image.fromarray(COLOURS).quantize(12)
    np.testing.assert_array_equal(decode(encoded(image)), np.array(image.convert("RGB")))


def test_cmyk_is_converted_as_pillow_does() -> None:
    image = Image.fromarray(COLOURS).convert("CMYK")
    np.testing.assert_array_equal(decode(encoded(image, "TIFF")), np.array(image.convert("RGB")))


def test_a_turned_picture_is_turned_upright_or_refused() -> None:
    exif = Image.Exif()
    exif[274] = 6  # the orientation of a camera that was rotated by 90 degrees
    content = encoded(Image.fromarray(COLOURS), exif=exif)
    np.testing.assert_array_equal(decode(content), np.rot90(COLOURS, -1))
    for read in (
        lambda: decode(content, turn=False),
        lambda: read_size(io.BytesIO(content), False),
    ):
        with pytest.raises(
            Unreadable, match=r"stored rotated \(EXIF orientation 6\).*save it upri"
        ):
            read()


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    assert decode(encoded(with_alpha(255)))[1:].tolist() == COLOURS[1:].tolist()
    grey = Image.fromarray(SHADES).convert("LA")
    np.testing.assert_array_equal(decode(encoded(grey)), grey_as_rgb(SHADES))


def a_transparent_shade(bits: int) -> bytes:
    dtype = np.uint8 if bits == 8 else np.uint16
    return encoded(Image.fromarray(SHADES.astype(dtype)), transparency=40)


def see_through_palette() -> bytes:
    return encoded(Image.fromarray(COLOURS).quantize(12), transparency=bytes([0] * 12))


@pytest.mark.parametrize(
    "content",
    [
        encoded(with_alpha(254)),
        encoded(with_alpha(0), "WEBP", lossless=True),
        encoded(
            Image.fromarray(SHADES).convert("LA").point([shade // 2 for shade in range(256)] * 2)
        ),
        a_transparent_shade(8),
        a_transparent_shade(16),
        see_through_palette(),
    ],
    ids=["rgba", "webp", "la", "shade", "deep shade", "palette"],
)
def test_transparency_is_not_dropped(content: bytes) -> None:
    with pytest.raises(Unreadable, match=r"transparent.*save it without transparency"):
        decode(content)


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png_of_size(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


OTHER = Image.new("RGB", (4, 3))
FLOATS = np.full((3, 4), 0.5, np.float32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; fetch it again"),
        (b"no picture at all", "can't be read as an image of the formats BMP, .*WEBP; fetch it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "can't be read as an image of the"),
        (encoded(Image.fromarray(COLOURS))[:60], "can't be decoded .*; fetch it again, or remove"),
        (encoded(Image.fromarray(FLOATS), "TIFF"), "mode F, whose range is not known; save it"),
        (encoded(Image.fromarray(FLOATS * np.nan), "TIFF"), "mode F, whose range is not known"),
        (encoded(Image.fromarray(SHADES.astype(np.int32)), "TIFF"), "mode I, whose range is not"),
        (
            encoded(Image.fromarray(COLOURS), save_all=True, append_images=[OTHER]),
            "holds several frames or pages; save only the one to use",
        ),
        (
            encoded(Image.fromarray(COLOURS), "TIFF", save_all=True, append_images=[OTHER]),
            "holds several frames or pages",
        ),
        (b"P5 0 0 255\n", "can't be read as an image of the"),
        (png_of_size(10**5, 10**5), "DecompressionBomb|more than Pillow decodes"),
        (png_of_size(10_000, 9_000), "DecompressionBomb|more than Pillow decodes"),
    ],
    ids=[
        "empty", "text", "eps", "truncated", "float", "nan", "int32", "apng", "pages", "no pixels",
        "bomb", "small bomb",
    ],
)  # fmt: skip
def test_content_that_is_no_supported_picture_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        decode(content)


def test_a_jpeg_cut_short_is_found_by_decoding() -> None:
    content = encoded(Image.fromarray(np.kron(COLOURS, np.ones((30, 30, 1), np.uint8))), "JPEG")
    cut = content[: len(content) // 2]
    assert read_size(io.BytesIO(cut)) == (120, 90)
    with pytest.raises(Unreadable, match=r"can't be decoded \(OSError: image file is truncated"):
        decode(cut)


def test_a_16_bit_tiff_of_another_scale_is_refused() -> None:
    """White is 0 in this file, and Pillow's mode does not show it."""
    deep = Image.fromarray(SHADES.astype(np.uint16))
    with pytest.raises(Unreadable, match="mode I;16, whose range is not known"):
        decode(encoded(deep, "TIFF", tiffinfo={262: 0}))
