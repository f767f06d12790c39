"""Pictures that are opened safely, and only when they are needed.

Whatever a file's mode (palette with transparency, 16 bits, greyscale, CMYK) and orientation tag,
the rest of the program gets upright 8-bit RGB.
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
from typing_extensions import override

from reopold_agent.errors import DataError
from reopold_agent.types import ImageSource

MAX_PIXELS = 200_000_000
"""Larger pictures are refused before they are decoded (decompression bombs)."""

MAX_BYTES = 500_000_000
"""Larger files and members of zip archives are refused before they are read."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats that are opened. Pillow knows more, but some start other programs (EPS: Ghostscript)
and others are so rare that nobody looks for their vulnerabilities."""

# RuntimeError: encrypted; NotImplementedError (a RuntimeError): unknown compression.
_ZIP_ERRORS = (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class FileImage(ImageSource):
    """A picture in a file."""

    path: Path

    @override
    def open(self) -> Image.Image:
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
class ZipImage(ImageSource):
    """A picture in a zip archive."""

    archive: Path
    member: str

    @override
    def open(self) -> Image.Image:
        # Opened per picture: a ZipFile must not be shared between threads.
        try:
            with zipfile.ZipFile(self.archive) as archive:
                info = archive.getinfo(self.member)
                if info.file_size > MAX_BYTES:
                    raise DataError(
                        f"{self.member} in {self.archive} has {info.file_size} bytes; "
                        f"the limit is {MAX_BYTES}"
                    )
                check_packing(info, self.archive)
                # Not archive.read, which unpacks a member beyond the size that it states.
                with archive.open(info) as file:
                    data = file.read(info.file_size + 1)
        except _ZIP_ERRORS as error:
            raise DataError(f"cannot read {self.member} in {self.archive}: {error}") from error
        return _decode(data, f"{self.archive}:{self.member}")


def check_packing(info: zipfile.ZipInfo, archive: Path) -> None:
    """Checks that a member of an archive can be unpacked within bounds.

    Raises:
        DataError: it is packed in another way than usual, which zipfile unpacks without a bound: a
            few bytes may become gigabytes.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"cannot read {info.filename} in {archive}: it is neither stored nor deflated; pack "
            "the archive again (zip -r)"
        )


@dataclass(frozen=True)
class BytesImage(ImageSource):
    """A picture whose bytes are in a row."""

    data: bytes = field(repr=False)
    name: str = "picture in a row"

    @override
    def open(self) -> Image.Image:
        return _decode(self.data, self.name)


def safe_join(root: Path, relative: str) -> Path:
    """Joins ``root`` and a path that must stay inside it.

    Raises:
        DataError: the path is absolute, leaves ``root`` or cannot be used.
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
    """Returns the folder of files that a snapshot folder of huggingface_hub links to."""
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
    """Returns those of `FORMATS` that this build of Pillow supports."""
    Image.init()
    return tuple(each for each in FORMATS if each in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB: transparency becomes white, 16 bits are scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        values: Any = np.asarray(image).astype(np.float32)
        np.nan_to_num(values, copy=False)
        # Modes "I" and "F" do not say how many bits are used; "I;16" does.
        deep = image.mode.startswith("I;16") or values.max(initial=0) > 255
        top = 65535.0 if deep else 255.0
        values = values.clip(0, top, out=values) * (255 / top)
        image = Image.fromarray(values.round(out=values).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")
