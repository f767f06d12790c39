"""Pictures that are opened when they are needed, safely.

Whatever the file's mode (palette with transparency, 16 bits, greyscale, CMYK) and orientation
tag, the rest of the program sees upright 8-bit RGB.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from reopold_agent.errors import DataError

MAX_PIXELS = 200_000_000
"""A larger picture is refused before it is decoded (decompression bombs)."""


@dataclass(frozen=True)
class FileImage:
    """A picture in a file."""

    path: Path

    def open(self) -> Image.Image:
        """See `ImageSource`."""
        if not self.path.is_file():
            raise DataError(f"the picture {self.path} does not exist")
        return _decode(self.path.read_bytes(), str(self.path))


@dataclass(frozen=True)
class ZipImage:
    """A picture in a zip archive."""

    archive: Path
    member: str

    def open(self) -> Image.Image:
        """See `ImageSource`."""
        # Opened per picture: a ZipFile must not be shared between threads.
        try:
            with zipfile.ZipFile(self.archive) as archive:
                data = archive.read(self.member)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot read {self.member} in {self.archive}: {error}") from error
        return _decode(data, f"{self.archive}:{self.member}")


@dataclass(frozen=True)
class BytesImage:
    """A picture that came inside a row."""

    data: bytes = field(repr=False)
    name: str = "picture in a row"

    def open(self) -> Image.Image:
        """See `ImageSource`."""
        return _decode(self.data, self.name)


def safe_join(root: Path, relative: str) -> Path:
    """A path inside ``root``.

    Raises:
        DataError: the path is absolute or climbs out.
    """
    pure = PurePosixPath(relative.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise DataError(f"the path '{relative}' leaves the data folder {root}")
    path = root.joinpath(*pure.parts)
    if path.is_symlink() or path.exists():
        resolved = path.resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise DataError(f"the path '{relative}' leaves the data folder {root} by a link")
    return path


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"{name} has {image.width}x{image.height} pixels; the limit is {MAX_PIXELS}"
            )
        image.seek(0)  # an animation's first frame
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} is not a readable picture: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large: {error}") from error
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency on white, 16-bit scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        values: Any = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")
