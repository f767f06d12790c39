"""An expert's recorded conversations, for supervised fine-tuning.

Rows (parquet, json, jsonl) hold ``messages``: turns with ``role`` (system, user, assistant) and
``content``. Content is a text in which ``<image>`` stands for the next of the row's ``images``
(LLaMA-Factory's and TRL's form), or a list of parts ``{"text": ...}`` and ``{"image": ...}``
(Qwen's form, as in Pixel-Reasoner's SFT data, whose column is ``message_list``). Pictures are
paths below the file's folder, or bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from reopold_agent.data.formats import PictureFolder
from reopold_agent.data.images import BytesImage
from reopold_agent.data.rows import download, find_row_files, read_rows
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.types import ImageSource, Role

Parts: TypeAlias = "tuple[str | ImageSource, ...]"

_MARK = "<image>"
_SETTINGS = ("path", "split", "revision", "limit")


@dataclass(frozen=True)
class Demonstration:
    """One conversation: (role, parts) in order, user and assistant taking turns, the last turn
    the assistant's."""

    id: str
    turns: tuple[tuple[Role, Parts], ...]


def load_demonstrations(spec: Mapping[str, Any]) -> list[Demonstration]:
    """The conversations of a specification.

    Args:
        spec: ``path`` (file, folder, or hub id), and optionally ``split``, ``revision`` (hub) and
            ``limit`` (first rows only).

    Raises:
        ConfigError: an unknown setting, or no path.
        DataError: a file or a row cannot be used; names it.
    """
    unknown = [key for key in spec if key not in _SETTINGS]
    if unknown or not spec.get("path"):
        raise ConfigError(
            f"data.demonstrations takes {', '.join(_SETTINGS)}, and needs a path; got {dict(spec)}"
        )
    path = Path(str(spec["path"])).expanduser()
    if not path.exists():
        path = download(str(spec["path"]), spec.get("revision"))
    pictures = PictureFolder(path if path.is_dir() else path.parent)
    limit = spec.get("limit")
    found: list[Demonstration] = []
    for file in find_row_files(path, spec.get("split")):
        for number, row in enumerate(read_rows(file)):
            if limit is not None and len(found) >= limit:
                return found
            try:
                found.append(demonstration(row, number, pictures))
            except DataError as error:
                raise DataError(f"{file}, row {number}: {error}") from error
    if not found:
        raise DataError(f"no conversations in {path}")
    return found


def demonstration(row: Mapping[str, Any], number: int, pictures: PictureFolder) -> Demonstration:
    """One row.

    Raises:
        DataError: it is not a conversation that ends with the assistant, or a picture is missing.
    """
    messages = row.get("messages") or row.get("message_list")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("'messages' must be a list of turns")
    listed = row.get("images") or []
    waiting = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    turns: list[tuple[Role, Parts]] = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in (
            "system",
            "user",
            "assistant",
        ):
            raise DataError("a turn needs a role (system, user or assistant) and content")
        parts = _parts(message.get("content"), waiting, pictures)
        turns.append((cast(Role, message["role"]), parts))
    if waiting:
        raise DataError(f"{len(waiting)} images more than <image> marks")
    roles = [role for role, _ in turns]
    dialogue = roles[1:] if roles[0] == "system" else roles
    if dialogue != ["user", "assistant"] * (len(dialogue) // 2) or not dialogue:
        raise DataError(f"user and assistant must take turns, got {', '.join(roles)}")
    if any(not isinstance(part, str) for role, parts in turns if role != "user" for part in parts):
        raise DataError("only user turns may hold images")
    return Demonstration(str(row.get("id", row.get("qid", number))), tuple(turns))


def _parts(content: Any, waiting: list[Any], pictures: PictureFolder) -> Parts:
    if isinstance(content, str):
        parts: list[str | ImageSource] = []
        for position, text in enumerate(content.split(_MARK)):
            if position:
                if not waiting:
                    raise DataError("more <image> marks than images")
                parts.append(_picture(waiting.pop(0), pictures))
            if text:
                parts.append(text)
        return tuple(parts)
    if not isinstance(content, Sequence):
        raise DataError("a turn's content must be a text or a list of parts")
    found: list[str | ImageSource] = []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping):
            raise DataError("a part of a turn must be an object with 'text' or 'image'")
        if part.get("image") is not None and part.get("text"):
            raise DataError("a part of a turn has both 'text' and 'image'; which comes first?")
        if part.get("image") is not None or part.get("type") == "image":
            value = part.get("image")
            if value is None:  # the pictures stand in the row's own list
                if not waiting:
                    raise DataError("more image parts than images")
                value = waiting.pop(0)
            found.append(_picture(value, pictures))
        elif isinstance(part.get("video"), (list, tuple)):
            found += [_picture(frame, pictures) for frame in part["video"]]
        elif isinstance(part.get("text"), str):
            found.append(part["text"])
        else:
            raise DataError("a part of a turn must have 'text', 'image' or 'video' (frames)")
    return tuple(found)


def _picture(value: Any, pictures: PictureFolder) -> ImageSource:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return BytesImage(value)
    if not isinstance(value, str) or not value:
        raise DataError("an image must be a path or bytes")
    return pictures.find(value.removeprefix("file://"))
