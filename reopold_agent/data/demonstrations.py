"""An expert's recorded conversations, for supervised fine-tuning.

Rows (parquet, json, jsonl) hold ``messages``: objects with ``role`` (system or developer, user,
assistant, tool) and ``content``. The content is either a text in which each ``<image>`` stands for
the next of the row's pictures, and ``<video>`` for all frames (as in LLaMA-Factory and TRL), or a
list of parts ``{"text": ...}`` and ``{"image": ...}`` (as in Qwen and Pixel-Reasoner's SFT data,
whose column is ``message_list``).
An assistant's message may have ``tool_calls`` and ``weight`` as at OpenAI, and a row may have
``tools``. What training cannot render is refused by its name, because the student would learn
something other than what the expert did.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from reopold_agent.data.pictures import (
    PictureFolder,
    given_pictures,
    picture_of,
    unread_columns,
)
from reopold_agent.data.rows import download, find_row_files, read_rows
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.types import ImageSource, Role


@dataclass(frozen=True)
class RecordedCall:
    """A tool call of the expert, as data."""

    name: str
    arguments: Mapping[str, Any]


Parts: TypeAlias = "tuple[str | ImageSource | RecordedCall, ...]"

_SETTINGS = ("path", "split", "revision", "limit")

_ROLES: Final[Mapping[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
}
_MESSAGE = ("role", "content", "tool_calls", "weight", "name", "id", "tool_call_id")
"""Keys of a message. The last three name it; chat templates do not write them either."""

_FUNCTION = ("type", "id", "index", "function", "name", "arguments")
_PART = ("type", "text", "image", "image_url", "video", "detail", "cache_control")
_PART_TYPES = ("text", "image", "image_url", "video")


@dataclass(frozen=True)
class RecordedTurn:
    """One turn: what its message or messages say.

    Attributes:
        role: a tool's result is the user's turn, as in an environment.
        parts: texts and pictures in reading order; after them the calls, for an assistant.
        trained: whether an assistant's tokens are trained on.
    """

    role: Role
    parts: Parts
    trained: bool = True


@dataclass(frozen=True)
class Demonstration:
    """One conversation.

    Attributes:
        id: the row's id, or else its number.
        turns: user and assistant alternating, assistant last; before them there may be a system
            message.
        tools: descriptions of the tools, for the system message.
    """

    id: str
    turns: tuple[RecordedTurn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def load_demonstrations(spec: Mapping[str, Any]) -> list[Demonstration]:
    """Loads the conversations that a specification describes.

    Args:
        spec: ``path`` (file, folder, or hub id), and optionally ``split``, ``revision`` (hub) and
            ``limit`` (first rows only).

    Raises:
        ConfigError: a setting is unknown, or there is no path.
        DataError: a file or a row cannot be used; the message names it.
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
                found.append(_demonstration(row, number, pictures))
            except DataError as error:
                raise DataError(f"{file}, row {number}: {error}") from error
    if not found:
        raise DataError(f"no conversations in {path}")
    return found


def _demonstration(row: Mapping[str, Any], number: int, pictures: PictureFolder) -> Demonstration:
    messages = row.get("messages") or row.get("message_list")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("'messages' must be a list of turns")
    if row.get("functions"):
        raise DataError("'functions' cannot be rendered; give them as 'tools'")
    given = given_pictures(row)
    waiting = _Waiting(list(given.values), given.is_video, pictures)
    turns: list[RecordedTurn] = []
    roles: list[str] = []
    for position, message in enumerate(messages):
        try:
            turn = _turn(message, waiting)
        except DataError as error:
            raise DataError(f"message {position}: {error}") from error
        if message["role"] == "tool" and roles[-1:] == ["tool"]:
            # An environment answers a turn, whatever it called, with one turn.
            turns[-1] = replace(turn, parts=(*turns[-1].parts, "\n", *turn.parts))
        else:
            turns.append(turn)
            roles.append(message["role"])
    shown = any(not isinstance(p, (str, RecordedCall)) for turn in turns for p in turn.parts)
    # Where the messages hold their own pictures, the columns repeat some of them.
    if waiting.values and not (shown and len(waiting.values) == len(given.values)):
        raise DataError(f"the row has {len(waiting.values)} more images than <image> marks")
    if not shown and (unread := unread_columns(row)):
        raise DataError(f"'{unread[0]}' looks like pictures and is not read; name it 'images'")
    dialogue = roles[1:] if turns[0].role == "system" else roles
    answers, asked = dialogue[1::2], dialogue[::2]
    if (
        len(answers) != len(asked)
        or set(answers) != {"assistant"}
        or asked[0] != "user"
        or not {"user", "tool"}.issuperset(asked)
    ):
        raise DataError(f"user and assistant must take turns, got {', '.join(roles)}")
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise DataError("no message is trained on: each of the assistant's has weight 0")
    return Demonstration(str(row.get("id", row.get("qid", number))), tuple(turns), _tools(row))


@dataclass
class _Waiting:
    """The pictures of the row's columns that no mark has taken yet."""

    values: list[Any]
    is_video: bool
    folder: PictureFolder

    def take(self, *, video: bool = False) -> list[ImageSource]:
        """Returns the pictures for the next mark."""
        if not self.values:
            raise DataError("more <image> marks than images")
        count = len(self.values) if video else 1
        taken, self.values = self.values[:count], self.values[count:]
        return [picture_of(value, self.folder) for value in taken]


def _turn(message: Any, waiting: _Waiting) -> RecordedTurn:
    if not isinstance(message, Mapping):
        raise DataError("it must be an object with role and content")
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise DataError(f"the role must be one of {', '.join(_ROLES)}, got {message.get('role')!r}")
    _refuse_unknown(message, _MESSAGE)
    content, calls, weight = (message.get(key) for key in ("content", "tool_calls", "weight"))
    if role != "assistant" and (calls or weight):
        raise DataError("only an assistant's message can have 'tool_calls', or a 'weight' above 0")
    if weight not in (None, 0, 1):
        raise DataError(f"'weight' must be 0 or 1, got {weight!r}")
    parts = () if content is None and calls else _parts(content, waiting)
    if role in ("system", "assistant") and not all(isinstance(part, str) for part in parts):
        raise DataError("only user and tool messages may hold images")
    return RecordedTurn(role, (*parts, *_calls(calls)), weight != 0)


def _parts(content: Any, waiting: _Waiting) -> Parts:
    if isinstance(content, str):
        parts: list[str | ImageSource] = []
        # "<video>" is a word where the row has none.
        for piece in re.split("(<image>|<video>)" if waiting.is_video else "(<image>)", content):
            if piece in ("<image>", "<video>"):
                parts += waiting.take(video=piece == "<video>")
            elif piece:
                parts.append(piece)
        return tuple(parts)
    if not isinstance(content, Sequence):
        raise DataError("the content must be a text or a list of parts")
    found: list[str | ImageSource] = []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping):
            raise DataError("a part of a message must be an object with 'text' or 'image'")
        found += _part(part, waiting)
    return tuple(found)


def _part(part: Mapping[str, Any], waiting: _Waiting) -> Sequence[str | ImageSource]:
    kind = part.get("type")
    if kind not in (None, *_PART_TYPES):
        raise DataError(f"a part of the type {kind!r} cannot be rendered")
    _refuse_unknown(part, _PART)
    given = [key for key in _PART_TYPES if part.get(key) not in (None, "")]
    if len(given) > 1:
        raise DataError(f"a part has both {' and '.join(map(repr, given))}; which comes first?")
    if kind and given and given != [kind]:
        raise DataError(f"a part of the type '{kind}' has '{given[0]}'")
    kind = given[0] if given else kind or ("text" if part.get("text") == "" else None)
    value = part.get(kind) if kind else None
    if kind in ("image", "image_url", "video") and value is None:  # it is in the row's columns
        return waiting.take(video=kind == "video")
    if kind in ("image", "image_url"):
        return [picture_of(value, waiting.folder)]
    if kind == "video" and isinstance(value, (list, tuple)) and value:
        return [picture_of(frame, waiting.folder) for frame in value]
    if kind == "text" and isinstance(value, str):
        return [value]
    raise DataError("a part of a message must have 'text', 'image' or 'video' (frames)")


def _calls(calls: Any) -> list[RecordedCall]:
    if calls and not isinstance(calls, (list, tuple)):
        raise DataError("'tool_calls' must be a list")
    return [_call(call) for call in calls or ()]


def _call(call: Any) -> RecordedCall:
    """Reads a call in OpenAI's or Hugging Face's form, with ``function`` around it or without."""
    if not isinstance(call, Mapping) or call.get("type") not in (None, "function"):
        kind = call.get("type") if isinstance(call, Mapping) else type(call).__name__
        raise DataError(f"a tool call of the type {kind!r} cannot be rendered, only 'function'")
    _refuse_unknown(call, _FUNCTION)
    function = call.get("function") or call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("a tool call has no name")
    _refuse_unknown(function, _FUNCTION)
    arguments = function.get("arguments")
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        else:
            arguments = {} if arguments is None else _without_nulls(arguments)
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the arguments of '{function['name']}' are no JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of '{function['name']}' must be a JSON object")
    return RecordedCall(function["name"], arguments)


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Returns the descriptions of a row's tools: a list of objects, or its JSON text."""
    given = row.get("tools") or []
    try:
        given = _without_nulls(json.loads(given) if isinstance(given, str) else given)
        json.dumps(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"'tools' are no JSON: {error}") from error
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise DataError("'tools' must be a list of objects")
    return tuple(given)


def _without_nulls(value: Any) -> Any:
    """Removes the nulls that parquet writes where one row has a key and another has not."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, (list, tuple)) else value


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    for key, value in given.items():
        if key not in known and value not in (None, "", [], {}):
            raise DataError(
                f"'{key}' cannot be rendered, and would be lost; what is read is {', '.join(known)}"
            )
