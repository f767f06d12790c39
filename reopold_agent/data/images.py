"""Pictures that are opened safely, and only when they are needed.

`reopold_agent.common.pictures` decodes them.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image
from typing_extensions import override

from reopold_agent.common.pictures import decode, is_animation
from reopold_agent.errors import DataError
from reopold_agent.types import ImageSource

MAX_BYTES = 500_000_000
"""Larger files and members of zip archives are refused before they are read."""

# RuntimeError: encrypted; NotImplementedError (a RuntimeError): unknown compression.
_ZIP_ERRORS = (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)

_END = 2**15
"""Bytes of a picture's file, at each end, by which it is known again."""


@dataclass(frozen=True)
class FileImage(ImageSource):
    """A picture in a file."""

    path: Path

    @override
    def open(self) -> Image.Image:
        return decode(self._read(), str(self.path))

    def content(self) -> tuple[int, int]:
        """Returns CRC-32 of both ends of the file, and its size.

        Only the ends: all pictures of a data set are read at the start, which may be gigabytes. Of
        a file of up to 64 KiB these are all bytes, so that it is known again in a zip archive.

        Raises:
            OSError: it cannot be read.
        """
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            ends = file.read(_END)
            file.seek(max(_END, size - _END))
            return zlib.crc32(ends + file.read(_END)), size

    def _read(self) -> bytes:
        if not self.path.is_file():
            raise DataError(f"the picture {self.path} does not exist")
        try:
            size = self.path.stat().st_size
            if size > MAX_BYTES:
                raise DataError(f"{self.path} has {size} bytes; the limit is {MAX_BYTES}")
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the picture {self.path}: {error}") from error


@dataclass(frozen=True)
class ZipImage(ImageSource):
    """A picture in a zip archive; ``listed`` is its content, if the archive was read before."""

    archive: Path
    member: str
    listed: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    @override
    def open(self) -> Image.Image:
        return decode(self._read(), f"{self.archive}:{self.member}")

    def content(self) -> tuple[int, int]:
        """Returns CRC-32 and size of the bytes, as the archive lists them; raises as `open`."""
        return self.listed or content_of(self._read())

    def _read(self) -> bytes:
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
                    return file.read(info.file_size + 1)
        except _ZIP_ERRORS as error:
            raise DataError(f"cannot read {self.member} in {self.archive}: {error}") from error


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
        return decode(self.data, self.name)

    def content(self) -> tuple[int, int]:
        """Returns CRC-32 and size of the bytes."""
        return content_of(self.data)


def is_animated(source: ImageSource) -> bool:
    """Whether a picture in a file, an archive or a row is an animation (a GIF, WebP or APNG)."""
    try:
        if isinstance(source, (FileImage, ZipImage)):
            return is_animation(source._read())
        return isinstance(source, BytesImage) and is_animation(source.data)
    except DataError:  # `open` says it
        return False


def content_of(data: bytes) -> tuple[int, int]:
    """Returns CRC-32 and size of a picture's bytes, as zip archives list them."""
    return zlib.crc32(data), len(data)


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
        home = root.resolve()
        homes = [home, *_hub_blobs(home)]
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise DataError(f"the path '{relative[:200]}' cannot be used: {error}") from error
    if not any(resolved.is_relative_to(home) for home in homes):
        raise DataError(f"the path '{relative}' leaves the data folder {root} by a link")
    return path


def _hub_blobs(root: Path) -> list[Path]:
    """Returns the folder of files that a snapshot folder of huggingface_hub links to.

    Args:
        root: the snapshot folder, resolved.
    """
    blobs = root.parent.parent / "blobs"
    return [blobs] if root.parent.name == "snapshots" and blobs.is_dir() else []
