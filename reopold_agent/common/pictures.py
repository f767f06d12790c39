"""Decodes pictures of unknown origin.

Whatever a file's mode (palette with transparency, 16 bits, greyscale, CMYK) and orientation tag,
the rest of the program gets upright 8-bit RGB.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from reopold_agent.errors import DataError

MAX_PIXELS = 200_000_000
"""Larger pictures are refused before they are decoded (decompression bombs)."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats that are opened. Pillow knows more, but some start other programs (EPS: Ghostscript)
and others are so rare that nobody looks for their vulnerabilities."""


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns a picture as RGB, upright and loaded; of an animation the first frame.

    Args:
        data: the file's content.
        name: for messages.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        DataError: it is too large, damaged or in no format of `FORMATS`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{name} has {image.width}x{image.height} pixels; the limit is {max_pixels}"
            )
        image.seek(0)  # an animation's first frame
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise DataError(f"{name} is not a readable picture: none of {known}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large: {error}") from error
    # A damaged file makes Pillow's readers raise nearly anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{name} is not a readable picture: {reason}") from error


def is_animation(data: bytes) -> bool:
    """Whether a file holds several frames, of which `decode` returns the first.

    A camera's MPO is none: its further pictures are views of the same moment.
    """
    try:
        image: Any = Image.open(io.BytesIO(data), formats=_formats())
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # as in `decode`, which says what is wrong
        return False


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that this build of Pillow supports."""
    Image.init()
    return tuple(each for each in FORMATS if each in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB: transparency becomes white; 16 bits, and floats to 1, are scaled.

    Returns:
        The same object if it is RGB without transparency.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values: Any = np.asarray(image).astype(np.float32)
        np.nan_to_num(values, copy=False)
        # Modes "I" and "F" do not say how many bits are used; "I;16" does.
        most = values.max(initial=0)
        deep = image.mode.startswith("I;16") or most > 255
        # Floats from 0 to 1 are shares of white, as scientific programs write them; resizing and
        # rounding may go a little beyond.
        share = image.mode == "F" and most <= 1.25 and values.min(initial=0) >= -0.25
        top = 65535.0 if deep else 1.0 if share else 255.0
        values = values.clip(0, top, out=values) * (255 / top)
        image = Image.fromarray(values.round(out=values).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")
