"""Pictures that are opened when they are needed, safely.

Whatever the file's mode (palette with transparency, 16 bits, greyscale, CMYK) and orientation
tag, the rest of the program sees upright 8-bit RGB.
"""

from __future__ import annotations

import functools
import io
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from reopold_agent.errors import DataError

MAX_PIXELS = 200_000_000
"""A larger picture is refused before it is decoded (decompression bombs)."""

MAX_BYTES = 500_000_000
"""A larger member of a zip archive is refused before it is unpacked."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is opened. Pillow knows more; some start other programs (EPS: Ghostscript), others are so
rare that nobody looks for holes in them."""

# RuntimeError: encrypted; NotImplementedError (a RuntimeError): unknown compression.
_ZIP_ERRORS = (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class FileImage:
    """A picture in a file."""

    path: Path

    def open(self) -> Image.Image:
        """See `ImageSource`."""
        if not self.path.is_file():
            raise DataError(f"the picture {self.path} does not exist")
        try:
            size = self.path.stat().st_size
            if size > MAX_BYTES:
                raise DataError(f"{self.path} has {size} bytes; the limit is {MAX_BYTES}")
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the picture {self.path}: {error}") from error
        return _decode(data, str(self.path))


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
                info = archive.getinfo(self.member)
                if info.file_size > MAX_BYTES:
                    raise DataError(
                        f"{self.member} in {self.archive} has {info.file_size} bytes; "
                        f"the limit is {MAX_BYTES}"
                    )
                # zipfile unpacks the others without a bound: a few bytes may become gigabytes.
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DataError(
                        f"cannot read {self.member} in {self.archive}: it is neither stored nor "
                        "deflated; pack the archive again (zip -r)"
                    )
                # Not archive.read: a member that states a small size unpacks as far as it goes.
                with archive.open(info) as file:
                    data = file.read(info.file_size + 1)
        except _ZIP_ERRORS as error:
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
    if "\0" in relative:
        raise DataError(f"the path {relative!r} cannot be used")
    path = root.joinpath(*pure.parts)
    try:
        path.exists()  # raises for a name that is too long; resolve does not
        resolved = path.resolve()
        homes = [root.resolve(), *_hub_blobs(root)]
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise DataError(f"the path '{relative[:200]}' cannot be used: {error}") from error
    if not any(resolved.is_relative_to(home) for home in homes):
        raise DataError(f"the path '{relative}' leaves the data folder {root} by a link")
    return path


def _hub_blobs(root: Path) -> list[Path]:
    """Where huggingface_hub keeps the files that a snapshot folder links to."""
    blobs = root.resolve().parent.parent / "blobs"
    return [blobs] if root.resolve().parent.name == "snapshots" and blobs.is_dir() else []


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"{name} has {image.width}x{image.height} pixels; the limit is {MAX_PIXELS}"
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


@functools.cache
def _formats() -> tuple[str, ...]:
    """Of `FORMATS`, those that this build of Pillow has."""
    Image.init()
    return tuple(each for each in FORMATS if each in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency on white, 16-bit scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        values: Any = np.asarray(image).astype(np.float32)
        np.nan_to_num(values, copy=False)
        # "I" and "F" do not say how many bits are used; "I;16" does.
        deep = image.mode.startswith("I;16") or values.max(initial=0) > 255
        top = 65535.0 if deep else 255.0
        values = values.clip(0, top, out=values) * (255 / top)
        image = Image.fromarray(values.round(out=values).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")
