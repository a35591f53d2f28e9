"""Decodes pictures; those whose pixels would have to be clipped, dropped or guessed are refused."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdhooks.errors import KDHooksError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels: TypeAlias = NDArray[np.uint8]  # (h w 3) RGB

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # Pillow's conversion of these loses nothing
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_BITS, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274  # TIFF tags; photometric 1: 0 is black


class Unreadable(Exception):
    """The reason why a picture cannot be used, and the way out; callers put its name in front."""


def decode(content: bytes, turn: bool = True) -> Pixels:
    """Decode a file. turn: turn a picture upright that EXIF marks as rotated; else refuse it."""
    with _opened(io.BytesIO(content), turn) as image:
        from PIL import ImageOps

        return _as_rgb(ImageOps.exif_transpose(image))


def read_size(file: IO[bytes], turn: bool = True) -> tuple[int, int]:
    """Return the stored width and height, after checking everything that the header states."""
    with _opened(file, turn) as image:
        return image.size


def encode(pixels: Pixels) -> bytes:
    """Encode pixels as the content of a PNG file."""
    _check_pillow()
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def _check_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError as error:
        raise KDHooksError(
            "pictures can't be decoded or written without Pillow; pip install pillow"
        ) from error


@contextmanager
def _opened(file: IO[bytes], turn: bool) -> "Iterator[Image]":
    _check_pillow()
    from PIL import Image, UnidentifiedImageError

    if not file.read(1):
        raise Unreadable("is empty; fetch it again, or remove it")
    file.seek(0)
    try:
        with Image.open(file, formats=_FORMATS) as image:
            _check(image, Image.MAX_IMAGE_PIXELS)
            turned = image.getexif().get(_ORIENTATION, 1)
            if turned != 1 and not turn:
                raise Unreadable(
                    f"is stored rotated (EXIF orientation {turned}), and only some trainers undo "
                    "that; save it upright, as PIL.ImageOps.exif_transpose does"
                )
            yield image
    except UnidentifiedImageError as error:
        raise Unreadable(
            f"can't be read as an image of the formats {', '.join(_FORMATS)}; fetch it again, or "
            "remove it"
        ) from error
    except (Unreadable, KDHooksError):
        raise
    except Exception as error:  # each decoder has errors of its own
        raise Unreadable(
            f"can't be decoded ({type(error).__name__}: {error}); fetch it again, or remove it"
        ) from error


def _check(image: "Image", most: int | None) -> None:
    """Check everything that the header states."""
    width, height = image.size
    if most and width * height > most:
        raise Unreadable(f"has {width}x{height} pixels, more than Pillow decodes; make it smaller")
    # The other frames of an MPO are previews of the first.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise Unreadable("holds several frames or pages; save only the one to use")
    if image.mode not in (*_MODES, *_ALPHA) and not _has_16_bits(image):
        raise Unreadable(
            f"has pixels of Pillow's mode {image.mode}, whose range is not known; save it with 8 "
            "bits per channel"
        )


def _has_16_bits(image: "Image") -> bool:
    """Return whether a picture has one channel of 16 bits, in which 0 is black."""
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        plain = tags.get(_BITS) == (16,) and tags.get(_PHOTOMETRIC) == 1
        return plain and image.mode.startswith("I;16")
    return image.format in ("PNG", "PPM") and image.mode.split(";")[0] == "I"


def _as_rgb(image: "Image") -> Pixels:
    alpha = image.mode in _ALPHA or "transparency" in image.info
    if image.mode.startswith("I"):
        if alpha:
            raise Unreadable("has 16 bits and a transparent shade; save it without transparency")
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if alpha:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise Unreadable(
                "is transparent in places, and the colour behind it is not known; save it without "
                "transparency"
            )
    return np.array(image.convert("RGB"))
