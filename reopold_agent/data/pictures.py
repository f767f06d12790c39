"""A row's pictures: under which names and in which forms they are given."""

from __future__ import annotations

import ast
import base64
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reopold_agent.data.checks import NO_PICTURE, RowError
from reopold_agent.data.images import BytesImage, FileImage, ZipImage, safe_join
from reopold_agent.data.urls import UrlRules, is_url, url_image
from reopold_agent.errors import DataError
from reopold_agent.types import ImageSource

IMAGE_COLUMNS = (
    "images", "decoded_image", "image", "image_path", "image_paths", "image_url", "image_urls",
    "img", "imgs", "picture", "pictures",
)  # fmt: skip
"""Names of the column with pictures; of a row's columns, the first of these that is not empty."""

VIDEO_COLUMNS = ("videos", "video", "frames")
"""Names of the column with the frames of a video."""

_PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
"""First bytes of JPEG, PNG, GIF, WebP, BMP and TIFF files."""


@dataclass
class PictureFolder:
    """A data folder with pictures, extracted or in its zip archives.

    Attributes:
        root: the folder.
        urls: limits on downloads where a row names a URL; None refuses URLs.
    """

    root: Path
    urls: UrlRules | None = None
    _members: dict[str, tuple[Path, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for archive in sorted(self.root.glob("*.zip")):
            try:
                with zipfile.ZipFile(archive) as opened:
                    for name in opened.namelist():
                        # The top folder of an archive may or may not be named like the archive.
                        for key in (name, name.removeprefix(f"{archive.stem}/")):
                            self._members.setdefault(key, (archive, name))
            except zipfile.BadZipFile as error:
                raise DataError(f"{archive} is not a zip archive: {error}") from error

    def find(self, relative: str) -> ImageSource:
        """Returns the picture at a path or URL.

        Raises:
            RowError: the picture is missing, its path leaves the folder, or URLs are not allowed.
        """
        if is_url(relative):
            return url_image(relative, self.urls)
        for name in (relative, f"images/{relative}", f"videos/{relative}"):
            try:
                path = safe_join(self.root, name)
            except DataError as error:
                raise RowError("path", str(error)) from error
            if path.is_file():
                return FileImage(path)
        keys = [relative.removeprefix("./"), relative.removeprefix("images/")]
        for key in (*keys, relative.removeprefix("videos/")):
            if key in self._members:
                return ZipImage(*self._members[key])
        raise RowError(
            NO_PICTURE,
            f"the picture '{relative}' is neither in {self.root} nor in its zip archives; "
            "download images.zip and videos.zip of the dataset beside its rows",
        )


def picture_of(value: Any, pictures: PictureFolder) -> ImageSource:
    """Returns the picture in a column: a path, a URL, bytes, base64, or an object with one of them.

    A path is relative to the data's folder, or absolute inside it.

    Raises:
        RowError: there is none, it is missing, or its path leaves the folder.
    """
    if isinstance(value, Mapping):
        stored = value.get("bytes")
        names = ("path", "image", "url")
        value = stored or next((value[each] for each in names if value.get(each)), None)
    if isinstance(value, bytes):
        return BytesImage(value)
    if not value:
        raise RowError(NO_PICTURE, "no picture")
    if not isinstance(value, str):
        kind = type(value).__name__
        raise RowError("wrong type", f"a picture must be a path or bytes, got {kind}")
    decoded = _base64_picture(value)
    if decoded is not None:
        return BytesImage(decoded)
    name = value.removeprefix("file://").removeprefix("./")
    absolute, root = Path(name), pictures.root.resolve()
    if absolute.is_absolute() and absolute.is_relative_to(root):
        name = str(absolute.relative_to(root))
    return pictures.find(name)


def _base64_picture(text: str) -> bytes | None:
    """Returns the bytes of a picture in base64, as in VLMEvalKit's tsv files; None for a path."""
    head, comma, rest = text.partition(";base64,")
    packed = rest if comma and head.startswith("data:") else text
    if not _base64_start(packed).startswith(_PICTURE_STARTS):
        return None
    try:
        return base64.b64decode("".join(packed.split()), validate=True)
    except ValueError as error:
        raise RowError("unreadable picture", f"a picture in base64 is damaged: {error}") from error


def _base64_start(text: str) -> bytes:
    try:
        return base64.b64decode(text[:16], validate=True)
    except ValueError:
        return b""


@dataclass(frozen=True)
class Given:
    """The pictures of a row, as its columns have them.

    Attributes:
        values: paths, bytes, or objects of these.
        is_video: whether they are the frames of a video.
    """

    values: tuple[Any, ...]
    is_video: bool


def given_pictures(*groups: Mapping[str, Any]) -> Given:
    """Returns the pictures of a row under whichever usual name they have.

    Args:
        *groups: the row, and objects in it that may hold them (verl's ``extra_info``). The first
            with pictures counts; ``is_video`` counts in any.

    Raises:
        RowError: it has both pictures and a video, several videos, a video file, or an
            ``is_video`` that is neither true nor false.
    """
    is_video = any(flag(group.get("is_video"), "is_video") for group in groups)
    for group in groups:
        images = next((found for n in IMAGE_COLUMNS if (found := _listed(group.get(n)))), [])
        films = next((found for n in VIDEO_COLUMNS if (found := _listed(group.get(n)))), [])
        if images and films:
            raise RowError("video", "both pictures and a video; give one of them")
        if films:
            return Given(tuple(video_frames(films)), True)
        if images:
            return Given(tuple(images), is_video)
    return Given((), False)


def unread_columns(row: Mapping[str, Any]) -> list[str]:
    """Returns the columns that look like pictures but have no name that is read."""
    known = (*IMAGE_COLUMNS, *VIDEO_COLUMNS)
    return [name for name, value in row.items() if name not in known and _looks_like(value)]


def flag(value: Any, name: str) -> bool:
    """Returns a yes or no that may be written as text, as in tsv files; empty is no.

    Raises:
        RowError: it is something else.
    """
    if is_empty(value):
        return False
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    found = words.get(str(value).strip().lower().removesuffix(".0"))
    if found is None:
        raise RowError("wrong type", f"'{name}' must be true or false, got '{str(value)[:40]}'")
    return found


def _listed(value: Any) -> list[Any]:
    """Returns a column's pictures as a list; empty for null, NaN, empty text, objects of nulls."""
    if is_empty(value):
        return []
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):  # in tsv files
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def is_empty(value: Any) -> bool:
    """Returns whether there is nothing: null, NaN, an empty text, or only such values inside."""
    if isinstance(value, Mapping):
        return all(is_empty(each) for each in value.values())
    if isinstance(value, (list, tuple)):
        return all(each != "" and is_empty(each) for each in value)  # "" in a list: one is missing
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "none", "null")
    return is_null(value)


def is_null(value: Any) -> bool:
    """Returns whether a value is missing: pandas writes NaN where a row has none."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def video_frames(films: Sequence[Any]) -> list[Any]:
    """Returns the frames of the one video."""
    found = [film.get("video", film) if isinstance(film, Mapping) else film for film in films]
    lists = [film for film in found if isinstance(film, (list, tuple))]
    if len(lists) > 1 or (lists and len(found) > 1):
        raise RowError("video", f"{len(found)} videos in one row; one is possible")
    frames = list(lists[0]) if lists else found
    for frame in frames:
        if isinstance(frame, str) and frame.lower().endswith(_VIDEO_FILES):
            raise RowError(
                "video",
                f"'{frame[-60:]}' is a video file; give its frames as pictures "
                "(ffmpeg -i FILE -vf fps=2 frames/%03d.jpg)",
            )
    return frames


_VIDEO_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

_PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


_READ_INSIDE = ("images",)
"""Name that is read in ``extra_info`` too."""


def _looks_like(value: Any) -> bool:
    """Returns whether a value is a picture or a video, or a list or an object of one."""
    if isinstance(value, (list, tuple)):
        return bool(value) and _looks_like(value[0])
    if isinstance(value, Mapping):
        return any(_looks_like(each) for name, each in value.items() if name not in _READ_INSIDE)
    if isinstance(value, bytes):
        return value.startswith(_PICTURE_STARTS)
    if not isinstance(value, str):
        return False
    if value.startswith("data:image/") or value.lower().endswith((*_PICTURE_FILES, *_VIDEO_FILES)):
        return "\n" not in value
    return len(value) > 64 and _base64_start(value).startswith(_PICTURE_STARTS)
