"""A row's pictures: under which names and in which forms they are given."""

from __future__ import annotations

import ast
import base64
import itertools
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from reopold_agent.data.checks import NO_PICTURE, RowError
from reopold_agent.data.images import BytesImage, FileImage, ZipImage, is_animated, safe_join
from reopold_agent.data.urls import UrlRules, is_url, url_image
from reopold_agent.errors import DataError
from reopold_agent.types import ImageSource

_NUMBERED = r"(?:[_ -]?(?P<number>\d{1,3}))?"

_IMAGE_COLUMN = re.compile(
    r"(?P<base>(?:decoded_)?(?:image|img|picture)s?(?:_(?:path|file|url|bytes|base64)s?)?)"
    + _NUMBERED,
    re.IGNORECASE,
)
"""Names of columns with pictures, such as ``images``, ``img_path``, ``image_url``, ``image_2``."""

_VIDEO_COLUMN = re.compile(
    r"(?P<base>videos?(?:_(?:path|file|url|frame)s?)?|frames)" + _NUMBERED, re.IGNORECASE
)
"""Names of columns with the frames of a video."""

_SOUND_COLUMN = re.compile(r"audios?(?:_(?:path|file|url)s?)?", re.IGNORECASE)

NESTED = ("extra_info", "multi_modal_data")
"""Columns with an object in which pictures are looked for too, as in verl's rows."""

_UNREAD_NAME = re.compile(
    r"(?:image|img|picture|photo|screenshot)s?_?(?:id|name|file_?name|file|key|path|ur[il])s?"
    r"|photos?|screenshots?",
    re.IGNORECASE,
)
"""Names of columns that tell which picture belongs to a row, such as ``image_id``, ``imageId``."""

MESSAGES = ("prompt", "completion", "messages", "message_list")
"""Columns with messages, whose pictures the reader of messages finds."""

_PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
"""First bytes of JPEG, PNG, GIF, WebP, BMP and TIFF files."""

_VIDEO_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

_PICTURE_FILES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".heic", ".heif", ".avif", ".svg",
)  # fmt: skip


@dataclass
class PictureFolder:
    """A data folder with pictures, extracted or in its zip archives.

    Attributes:
        root: the folder.
        urls: limits on downloads where a row names a URL; None refuses URLs.
    """

    root: Path
    urls: UrlRules | None = None
    _members: dict[str, tuple[Path, str, tuple[int, int]]] = field(default_factory=dict)
    _others: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Members of later archives whose names are in `_members` too, with another content."""

    def __post_init__(self) -> None:
        contents: dict[str, tuple[int, int]] = {}
        for archive in sorted(self.root.glob("*.zip")):
            try:
                with zipfile.ZipFile(archive) as opened:
                    members = opened.infolist()
            except zipfile.BadZipFile as error:
                raise DataError(f"{archive} is not a zip archive: {error}") from error
            # The top folder of an archive may or may not be named like the archive.
            top = f"{archive.stem}/"
            own = {each.filename.removeprefix(top): each for each in members}
            for key, member in {**own, **{each.filename: each for each in members}}.items():
                content = (member.CRC, member.file_size)
                self._members.setdefault(key, (archive, member.filename, content))
                if contents.setdefault(key, content) != content:
                    self._others.setdefault(key, (archive, member.filename))

    def find(self, relative: str) -> ImageSource:
        """Returns the picture at a path or URL.

        Raises:
            RowError: the picture is missing, its path leaves the folder, several archives have
                different ones of its name, or URLs are not allowed.
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
            if key in self._others:
                found = (self._members[key][:2], self._others[key])
                one, other = (f"{archive.name}:{member}" for archive, member in found)
                raise RowError(
                    "ambiguous picture",
                    f"'{relative}' is {one} or {other}, which differ; unzip each into "
                    "a folder of its own, and name the folder in the row",
                )
            if key in self._members:
                return ZipImage(*self._members[key])
        raise RowError(
            NO_PICTURE,
            f"the picture '{relative}' is neither in {self.root} nor in its zip archives; "
            "download images.zip and videos.zip of the dataset beside its rows",
        )


def refuse_animation(frames: Sequence[ImageSource]) -> None:
    """Refuses an animation as the one picture of a video: only its first frame would be seen.

    Raises:
        RowError: it is one.
    """
    if len(frames) == 1 and is_animated(frames[0]):
        raise RowError(
            "video",
            "the video is an animation in one file; give its frames as pictures "
            "(PIL.ImageSequence.Iterator(PIL.Image.open(FILE)) yields them)",
        )


def picture_of(value: Any, pictures: PictureFolder) -> ImageSource:
    """Returns the picture in a column: a path, a URL, bytes, base64, or an object with one of them.

    A path is relative to the data's folder, or absolute inside it.

    Raises:
        RowError: there is none, it is missing, its path leaves the folder, or it is a video file.
    """
    content = _content(value)
    if isinstance(content, bytes):
        return BytesImage(content)
    if content is None:
        raise RowError(NO_PICTURE, "no picture")
    if _ends_in(content, _VIDEO_FILES):
        raise RowError(
            "video",
            f"'{content[-60:]}' is a video file; give its frames as pictures "
            "(ffmpeg -i FILE -vf fps=2 frames/%03d.jpg)",
        )
    absolute, root = Path(content), pictures.root.resolve()
    if absolute.is_absolute() and absolute.is_relative_to(root):
        content = str(absolute.relative_to(root))
    return pictures.find(content)


INSIDE = ("bytes", "path", "image", "url", "image_url", "source", "data", "base64")
"""Names of the picture in an object, as in parquet files, verl's rows, OpenAI's and Anthropic's
messages; bytes before the name that they had."""


def _content(value: Any) -> bytes | str | None:
    """Returns a picture's bytes, or else its path or URL; None if there is none.

    Raises:
        RowError: it is none of these, or its base64 is damaged.
    """
    while isinstance(value, Mapping):
        _refuse_two_names(value)
        found = next((name for name in INSIDE if not is_empty(value.get(name))), None)
        if found is None and not is_empty(value):
            raise RowError(
                "wrong type",
                f"a picture's object has {', '.join(map(str, value))[:80]}; it must have 'bytes', "
                "'path' or 'url'",
            )
        value = value[found] if found else None
    if isinstance(value, PathLike):
        value = fspath(value)
    if is_empty(value) or value == b"":
        return None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        kind = type(value).__name__
        raise RowError("wrong type", f"a picture must be a path or bytes, got {kind}")
    decoded = _base64_picture(value)
    return value.removeprefix("file://").removeprefix("./") if decoded is None else decoded


def _refuse_two_names(value: Mapping[str, Any]) -> None:
    """Refuses a picture's object with the names of two files; beside bytes, names say nothing."""
    named = {name: value[name] for name in INSIDE if isinstance(value.get(name), str)}
    files = [name for name, file in named.items() if _ends_in(file, _PICTURE_FILES)]
    if not is_empty(value.get("bytes")):
        return
    for one, other in itertools.combinations(files, 2):
        if is_url(named[one]) == is_url(named[other]) and not _same(named[one], named[other], None):
            raise _differ(one, other)


def _base64_picture(text: str) -> bytes | None:
    """Returns the bytes of a picture in base64, as in VLMEvalKit's tsv files; None for a path."""
    head, comma, rest = text.partition(";base64,")
    packed = rest if comma and head.startswith("data:") else text
    if not _starts_as_picture(_base64_start(packed)):
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


def _starts_as_picture(data: bytes) -> bool:
    return data.startswith(_PICTURE_STARTS) or data[4:8] == b"ftyp"  # AVIF, HEIC


def _ends_in(name: str, endings: tuple[str, ...]) -> bool:
    """Returns whether a path or URL is of a file with one of these endings."""
    return _without_query(name).lower().endswith(endings)


def target_is_picture(target: str) -> bool:
    """Returns whether a path or URL in a text is of a picture's file or holds the picture."""
    return target.startswith("data:image/") or _ends_in(target, _PICTURE_FILES)


def _without_query(name: str) -> str:
    return re.split("[?#]", name, maxsplit=1)[0] if is_url(name) else name


def same_pictures(
    some: Sequence[Any], others: Sequence[Any], pictures: PictureFolder | None
) -> bool:
    """Returns whether two lists hold the same pictures.

    Bytes are compared with bytes and paths with paths, of which one may name more folders than the
    other. Bytes are compared with the file at a path if there is one in ``pictures``; otherwise the
    path is their name, as hub parquet files keep it.
    """
    return len(some) == len(others) and repeats_pictures(some, others, pictures)


def repeats_pictures(
    some: Sequence[Any], others: Sequence[Any], pictures: PictureFolder | None
) -> bool:
    """Returns whether the second list has the pictures of the first, in their order, and more."""
    left = map(_content, others)
    return all(any(_same(one, other, pictures) for other in left) for one in map(_content, some))


def _same(
    one: bytes | str | None, other: bytes | str | None, pictures: PictureFolder | None
) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        short, long = sorted((_without_query(one), _without_query(other)), key=len)
        return f"/{long}".endswith(f"/{short}")
    if isinstance(one, str) and isinstance(other, bytes):
        one, other = other, one
    if not (isinstance(one, bytes) and isinstance(other, str)):
        return one == other
    if pictures is None or is_url(other):
        return True
    try:
        file = pictures.find(other)
        if isinstance(file, FileImage) and file.path.read_bytes() == one:
            return True
        return np.array_equal(np.asarray(file.open()), np.asarray(BytesImage(one).open()))
    except (DataError, OSError):  # no such file
        return True


@dataclass(frozen=True)
class Given:
    """The pictures of a row, a message or a part of one, as its columns have them.

    Attributes:
        values: paths, bytes, or objects of these.
        is_video: whether they are the frames of a video.
    """

    values: tuple[Any, ...]
    is_video: bool


def given_pictures(row: Mapping[str, Any], pictures: PictureFolder | None = None) -> Given:
    """Returns the pictures of a row, a message or a part of one, under whichever usual names.

    Columns that are numbered, as ``image`` and ``image_2``, are read in the order of their numbers;
    one without a number is the first. Other columns must repeat the same pictures, also those in
    ``extra_info`` and ``multi_modal_data``.

    Args:
        row: the object.
        pictures: where files are that are compared with bytes in another column; None takes the
            paths for the names of the bytes.

    Raises:
        RowError: two columns hold different pictures, or there are both pictures and a video,
            several videos, sound, a list of nulls alone, or an ``is_video`` that is neither true
            nor false.
    """
    groups = [("", row)]
    for name in NESTED:
        inside = [(f"{where}{name}.", group.get(name)) for where, group in groups]
        groups += [(where, group) for where, group in inside if isinstance(group, Mapping)]
    is_video = any(flag(group.get("is_video"), "is_video") for _, group in groups)
    images, films = dict[str, list[Any]](), dict[str, list[Any]]()
    for where, group in groups:
        _refuse_sound(group, where)
        for name, series in _columns(group, _IMAGE_COLUMN, pictures):
            images[where + name] = [value for values in series for value in values]
        for name, series in _columns(group, _VIDEO_COLUMN, pictures):
            films[where + name] = _frames(series[0] if len(series) == 1 else series)
    if images and is_video and all(map(_is_file, films.values())):
        films = {}  # the file whose frames the row has
    if images and films:
        both = f"in '{next(iter(images))}' and '{next(iter(films))}'"
        raise RowError("video", f"both pictures and a video, {both}; give one of them")
    if not images and not films:
        for where, group in groups:
            _refuse_nulls(group, where)
    return Given(_agreed(images or films, pictures), is_video or bool(films))


def _refuse_nulls(group: Mapping[str, Any], where: str) -> None:
    """Refuses a list with nothing but nulls: one entry for each picture, and all of them gone.

    No picture at all is a null or an empty list, in parquet an object of nulls.
    """
    for name, value in group.items():
        value = as_list(value)
        if (
            is_picture_column(name)
            and isinstance(value, (list, tuple))
            and any(not isinstance(each, (list, tuple)) for each in value)
            and is_empty(value)
        ):
            raise RowError(
                NO_PICTURE,
                f"'{where}{name}' is a list of nulls; give the pictures, or an empty list if there "
                "is none",
            )


def _refuse_sound(group: Mapping[str, Any], where: str) -> None:
    for name, value in group.items():
        if _SOUND_COLUMN.fullmatch(str(name)) and not is_empty(value):
            raise RowError(
                "sound", f"'{where}{name}' would be lost: no model here hears; leave the row out"
            )


def _columns(
    group: Mapping[str, Any], names: re.Pattern[str], pictures: PictureFolder | None
) -> Iterator[tuple[str, list[list[Any]]]]:
    """Yields the pictures of an object by name of the column, in the order of their numbers.

    Raises:
        RowError: two columns have the same number and different pictures.
    """
    found: dict[str, dict[int, list[Any]]] = {}
    for name, value in group.items():
        if (match := names.fullmatch(str(name))) and (values := _listed(value)):
            base, number = match["base"].lower(), int(match["number"] or 1)
            first = found.setdefault(base, {}).setdefault(number, values)
            if first is not values and not same_pictures(first, values, pictures):
                raise _differ(base, name)
    for base, series in found.items():
        yield base, [series[number] for number in sorted(series)]


def _agreed(
    columns: Mapping[str, Sequence[Any]], pictures: PictureFolder | None
) -> tuple[Any, ...]:
    """Returns the pictures of columns that must all hold the same ones.

    Raises:
        RowError: they do not.
    """
    if len(columns) < 2:
        return tuple(next(iter(columns.values()), ()))
    chosen = max(columns, key=lambda name: _nearness(_content(columns[name][0])))
    for name, values in columns.items():
        if not same_pictures(columns[chosen], values, pictures):
            raise _differ(chosen, name)
    return tuple(columns[chosen])


def _nearness(content: bytes | str | None) -> int:
    """Returns a higher number for what needs no file, and a lower one for what needs a network."""
    return 2 if isinstance(content, bytes) else 0 if is_url(content or "") else 1


def _differ(one: str, other: str) -> RowError:
    return RowError(
        "pictures differ",
        f"'{one}' and '{other}' hold different pictures; put all of them into one column 'images'",
    )


def _is_file(films: Sequence[Any]) -> bool:
    contents = map(_content, films)
    return all(isinstance(each, str) and _ends_in(each, _VIDEO_FILES) for each in contents)


def _frames(films: Sequence[Any]) -> list[Any]:
    """Returns the frames of the one video."""
    found = [_listed(f["video"]) if isinstance(f, Mapping) and "video" in f else f for f in films]
    found = [as_list(film) for film in found]
    lists = [film for film in found if isinstance(film, (list, tuple))]
    if len(lists) > 1 or (lists and len(found) > 1):
        raise RowError("video", f"{len(found)} videos in one row; one is possible")
    return list(lists[0]) if lists else found


def unread_columns(row: Mapping[str, Any], *, by_name: bool = False) -> list[str]:
    """Returns the columns that look like pictures but have no name that is read.

    Args:
        row: the row.
        by_name: whether a name such as ``image_id`` is enough, whatever the column holds; for rows
            that have no picture.
    """
    found = []
    for name, value in row.items():
        if name in MESSAGES or is_picture_column(name):
            continue
        if name in NESTED and isinstance(value, Mapping):
            found += [f"{name}.{each}" for each in unread_columns(value, by_name=by_name)]
        elif looks_like_picture(value) or (by_name and _names_picture(name, value)):
            found.append(name)
    return found


def _names_picture(name: Any, value: Any) -> bool:
    named = _UNREAD_NAME.fullmatch(str(name)) is not None
    return named and not isinstance(value, (bool, np.bool_)) and not is_empty(value)


def is_picture_column(name: Any) -> bool:
    """Returns whether `given_pictures` reads the column."""
    return any(names.fullmatch(str(name)) for names in (_IMAGE_COLUMN, _VIDEO_COLUMN))


def picture_columns(row: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the columns that `given_pictures` reads, and whether there is anything in them.

    An empty list is left out: it says that there is no picture, while a null may be a lost one.
    """
    found: dict[str, bool] = {}
    for name, value in row.items():
        if name in NESTED and isinstance(value, Mapping):
            found |= {f"{name}.{key}": full for key, full in picture_columns(value).items()}
        elif is_picture_column(name):
            value = as_list(value)
            if not isinstance(value, (list, tuple)) or value:
                found[str(name)] = not is_empty(value)
    return found


def looks_like_picture(value: Any, depth: int = 8) -> bool:
    """Returns whether a value is a picture or a video, or holds one within so many levels."""
    value = as_list(value)
    if isinstance(value, (list, tuple, Mapping)):
        # The others may be a long list of numbers.
        inside = [*(value.values() if isinstance(value, Mapping) else value[:8])]
        return depth > 0 and any(looks_like_picture(each, depth - 1) for each in inside)
    if isinstance(value, bytes):
        return _starts_as_picture(value)
    if isinstance(value, PathLike):
        value = fspath(value)
    if not isinstance(value, str):
        return False
    if value.startswith("data:image/") or _ends_in(value, (*_PICTURE_FILES, *_VIDEO_FILES)):
        return "\n" not in value
    return len(value) > 64 and _starts_as_picture(_base64_start(value))


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
    value = as_list(value)
    if is_empty(value):
        return []
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):  # in tsv files
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def as_list(value: Any) -> Any:
    """Returns an array, as pandas reads lists in parquet files, as a list; else the value."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def is_empty(value: Any, depth: int = 8) -> bool:
    """Returns whether there is nothing: null, NaN, false, "", or only such values inside.

    What is nested in more than ``depth`` levels counts as something.
    """
    value = as_list(value)
    if isinstance(value, Mapping):
        return depth > 0 and all(is_empty(each, depth - 1) for each in value.values())
    if isinstance(value, (list, tuple)):  # in a list, "" says that one is missing
        return depth > 0 and not any(
            isinstance(each, str) or not is_empty(each, depth - 1) for each in value
        )
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "none", "null")
    return value is False or is_null(value)


def is_null(value: Any) -> bool:
    """Returns whether a value is missing: pandas writes NaN where a row has none."""
    return value is None or (isinstance(value, float) and math.isnan(value))
