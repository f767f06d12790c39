"""An expert's recorded conversations, for supervised fine-tuning.

Rows (parquet, json, jsonl) hold ``messages``: objects with ``role`` (system or developer, user,
assistant, tool) and ``content``, a text with marks for the row's pictures (as in LLaMA-Factory) or
a list of parts (as in Qwen and Pixel-Reasoner's SFT data, whose column is ``message_list``), which
are read as those of training rows (`reopold_agent.data.turns`).
An assistant's message may have ``tool_calls`` and ``weight`` as at OpenAI, and a row may have
``tools``, ``system`` and ``weight``. Instead of ``messages`` a row may have ``prompt`` and
``completion``, both lists of messages, of which only the completion is trained on (as in TRL). What
training cannot render is refused by its name, because the student would learn something other than
what the expert did.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final, TypeAlias

from reopold_agent.config import DataChecks, build
from reopold_agent.data.checks import RowError
from reopold_agent.data.pictures import (
    Given,
    PictureFolder,
    flag,
    given_pictures,
    is_empty,
    is_picture_column,
    picture_of,
    refuse_animation,
    unread_columns,
)
from reopold_agent.data.rows import fills_with_nulls, find_row_files, local_or_downloaded, read_rows
from reopold_agent.data.turns import (
    Mark,
    Pieces,
    chosen_pictures,
    pieces_of,
    refuse_named_pictures,
    system_column,
)
from reopold_agent.data.urls import url_rules
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.types import ImageSource, Role


@dataclass(frozen=True)
class RecordedCall:
    """A tool call of the expert, as data."""

    name: str
    arguments: Mapping[str, Any]


Parts: TypeAlias = "tuple[str | ImageSource | RecordedCall, ...]"

_SETTINGS = ("path", "split", "revision", "limit")

_LOST: Final[Mapping[str, str]] = {
    "functions": "give them as 'tools'",
    "chosen": "name the conversation to imitate 'messages' or 'completion'",
    "rejected": "imitation learns from nothing that is rejected",
    "rejected_messages": "imitation learns from nothing that is rejected",
    "rejected_response": "imitation learns from nothing that is rejected",
    "history": "put the earlier turns into 'messages'",
    "conversations": "give the conversation once, as 'messages'",
    "chat_template": "the student's own template is used",
    "chat_template_kwargs": "write what the template would add into 'messages'",
    "loss_mask": "give the assistant's messages 'weight': 0 or 1",
    "assistant_masks": "give the assistant's messages 'weight': 0 or 1",
    "completion_mask": "give the assistant's messages 'weight': 0 or 1",
    **dict.fromkeys(
        ("train_mask", "mask", "weights", "labels"),
        "give the assistant's messages 'weight': 0 or 1, or rename the column if it says "
        "something else",
    ),
}
"""Columns with which other programs change what is taught, and what to do instead."""

_CONVERSATION = ("messages", "message_list", "prompt", "completion")

_UNDESIRED: Final[Mapping[str, bool]] = {
    "label": False,
    "kto_tag": False,
    "is_correct": False,
    "train": False,
    "negative": True,
}
"""Columns, and what they say where a conversation is not to be imitated (the first two: KTO)."""

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
        spec: ``path`` (file, folder, or hub id), and optionally ``split``, ``revision`` (hub),
            ``limit`` (first rows only) and ``checks``: settings of
            `reopold_agent.config.DataChecks`, of which those on URLs count.

    Raises:
        ConfigError: a setting is unknown, or there is no path.
        DataError: a file or a row cannot be used; the message names it.
    """
    spec = dict(spec)
    checks = build(DataChecks, spec.pop("checks", None) or {}, "data.checks.")
    unknown = [key for key in spec if key not in _SETTINGS]
    if unknown or not spec.get("path"):
        raise ConfigError(
            f"data.demonstrations takes {', '.join(_SETTINGS)}, and needs a path; got {spec}"
        )
    path = local_or_downloaded(str(spec["path"]), spec.get("revision"))
    pictures = PictureFolder(path if path.is_dir() else path.parent, url_rules(checks))
    limit = spec.get("limit")
    found: list[Demonstration] = []
    for file in find_row_files(path, spec.get("split")):
        for number, row in enumerate(read_rows(file)):
            if limit is not None and len(found) >= limit:
                return found
            if row.get("weight") == 0:
                continue
            try:
                if fills_with_nulls(file):
                    row = _without_nulls(row)
                found.append(_demonstration(row, number, pictures))
            except DataError as error:
                raise DataError(f"{file}, row {number}: {error}") from error
    if not found:
        raise DataError(f"no conversations in {path}")
    return found


def _demonstration(row: Mapping[str, Any], number: int, pictures: PictureFolder) -> Demonstration:
    _refuse_lost(row)
    read: list[_Read] = []
    pieces: list[Pieces] = []
    for where, message in _conversation(row):
        try:
            one, its_pieces = _read(where, message, pictures)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        read.append(one)
        pieces.append(its_pieces)
    read = _with_results(_with_pictures(read, pieces, given_pictures(row, pictures), pictures))
    turns = tuple(each.turn for each in read)
    if not _shown(read):
        if unread := unread_columns(row):
            raise DataError(f"'{unread[0]}' looks like pictures and is not read; name it 'images'")
        parts = (part for each in read if each.role == "user" for part in each.turn.parts)
        refuse_named_pictures([part for part in parts if isinstance(part, str)])
    roles = [each.role for each in read]
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
    tools = _tools(row)
    _check_names(read, tools)
    _check_answered(read)
    names = (row.get("id"), row.get("qid"), number)
    return Demonstration(str(next(name for name in names if name is not None)), turns, tools)


def _refuse_lost(row: Mapping[str, Any]) -> None:
    """Refuses columns that would change what is taught and cannot be rendered."""
    for name, advice in _LOST.items():
        if not _is_nothing(row.get(name)):
            raise DataError(f"'{name}' cannot be rendered, and would be lost; {advice}")
    for name, undesired in _UNDESIRED.items():
        if _says(row.get(name), undesired):
            raise DataError(
                f"'{name}' is {str(row[name]).lower()}: the row is not to be imitated; leave it "
                "out, or rename the column if it says something else"
            )
    _trained(row)


def _says(value: Any, wanted: bool) -> bool:
    """Returns whether a column says yes, or no, as a flag does; other labels say neither."""
    if value is not False and is_empty(value):
        return False
    try:
        return flag(value, "") is wanted
    except RowError:
        return False


def _conversation(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns a row's messages with their names; those of a ``prompt`` have the weight 0."""
    given = {name: row[name] for name in _CONVERSATION if not _is_nothing(row.get(name))}
    prompt, completion = given.pop("prompt", None), given.pop("completion", None)
    if completion is not None:
        if given:
            raise DataError(
                f"both '{next(iter(given))}' and 'completion' hold a conversation; leave one out"
            )
        asked, answered = _listed(prompt, "prompt"), _listed(completion, "completion")
        found = [(where, _context(each, where)) for where, each in _named("prompt message", asked)]
        found += _named("completion message", answered)
    else:
        if len(given) > 1 and given["messages"] != given["message_list"]:
            raise DataError("'messages' and 'message_list' differ; leave one out")
        messages = _listed(next(iter(given.values()), None), "messages")
        if prompt is not None and not _repeats(prompt, messages):
            raise DataError(
                "'prompt' beside 'messages' would be lost: put it into 'messages', or give "
                "'prompt' and 'completion' as lists of messages, of which the completion is "
                "trained on"
            )
        found = _named("message", messages)
    system = system_column(row, [message for _, message in found])
    return [*(("the system message", message) for message in system), *found]


def _listed(messages: Any, name: str) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise DataError(f"'{name}' must be a list of turns, objects with 'role' and 'content'")
    return messages


def _named(name: str, messages: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(f"{name} {number}", message) for number, message in enumerate(messages)]


def _context(message: Any, where: str) -> Any:
    """Returns a message of a ``prompt``, which is not trained on."""
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return message
    if message.get("weight"):
        raise DataError(f"{where}: a prompt is not trained on; leave its 'weight' out, or move the "
                        "message into 'completion'")  # fmt: skip
    return {**message, "weight": 0}


def _repeats(prompt: Any, messages: Sequence[Any]) -> bool:
    """Returns whether a ``prompt`` is the text of the first question, as in UltraChat's rows."""
    asked = (each for each in messages if isinstance(each, Mapping) and each.get("role") == "user")
    return isinstance(prompt, str) and prompt == next(asked, {}).get("content")


@dataclass(frozen=True)
class _Read:
    """A message that has been read.

    Attributes:
        where: its name, for errors.
        role: as the row has it.
        turn: what it says.
        calls: ids of its calls; None for a call without one.
        answers: id of the call whose result it is.
        weighed: whether it has a ``weight`` of its own.
    """

    where: str
    role: str
    turn: RecordedTurn
    calls: tuple[str | None, ...] = ()
    answers: str | None = None
    weighed: bool = False


def _with_pictures(
    read: Sequence[_Read], pieces: Sequence[Pieces], given: Given, folder: PictureFolder
) -> list[_Read]:
    """Returns the messages with their texts and pictures before their calls."""
    marks = [piece for each in pieces for piece in each if isinstance(piece, Mark)]
    if given.values and not marks:
        raise DataError(
            f"the row has {len(given.values)} pictures, but the messages have no marks; write "
            "<image> where each stands"
        )
    chosen = iter(chosen_pictures(marks, given, folder))
    found: list[_Read] = []
    for each, its_pieces in zip(read, pieces, strict=True):
        parts: list[str | ImageSource] = []
        for piece in its_pieces:
            if isinstance(piece, Mark):
                parts += _opened(next(chosen), folder, each.where, video=piece.video)
            elif piece:
                parts.append(piece)
        turn = replace(each.turn, parts=(*parts, *each.turn.parts))
        found.append(replace(each, turn=turn))
    return found


def _shown(read: Sequence[_Read]) -> list[ImageSource]:
    parts = (part for each in read for part in each.turn.parts)
    return [part for part in parts if not isinstance(part, (str, RecordedCall))]


def _opened(
    values: Sequence[Any], folder: PictureFolder, where: str, *, video: bool
) -> list[ImageSource]:
    try:
        opened = [picture_of(value, folder) for value in values]
        if video:
            refuse_animation(opened)
        return opened
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _with_results(read: Sequence[_Read]) -> list[_Read]:
    """Returns the messages with one for all results of a turn, in the order of its calls.

    An environment answers a turn, whatever it called, with one turn.
    """
    found: list[_Read] = []
    for role, group in groupby(read, key=lambda each: each.role):
        each = list(group)
        if role != "tool":
            found += each
            continue
        results = _in_order(found[-1], each) if found else each
        parts = [part for result in results for part in ("\n", *result.turn.parts)]
        found.append(replace(each[0], turn=replace(each[0].turn, parts=tuple(parts[1:]))))
    return found


def _in_order(turn: _Read, results: Sequence[_Read]) -> Sequence[_Read]:
    """Returns the results of a turn's calls in the order of the calls, as far as ids tell it.

    Raises:
        DataError: a result answers no call of the turn, or a call has no result or two.
    """
    ids = [result.answers for result in results]
    written = any("<tool_call>" in part for part in turn.turn.parts if isinstance(part, str))
    if None not in turn.calls and any(ids) and (turn.calls or not written):
        by_id: dict[str | None, _Read] = {}
        for result in results:
            if result.answers not in turn.calls:
                raise DataError(
                    f"{result.where}: its 'tool_call_id' {_quoted(result.answers)} answers no call "
                    f"of {turn.where} ({', '.join(map(_quoted, turn.calls)) or 'there is none'}); "
                    "correct it, or leave all ids out"
                )
            if by_id.setdefault(result.answers, result) is not result:
                raise DataError(
                    f"{result.where}: the call {_quoted(result.answers)} has two "
                    "results; join them in one message"
                )
        if len(set(turn.calls)) < len(turn.calls):
            raise DataError(f"{turn.where}: two calls have one id; give each its own")
        results = [by_id[each] for each in turn.calls if each in by_id]
    if len(results) < len(turn.calls):
        unanswered = [_quoted(each) for each in turn.calls if each not in ids]
        raise DataError(
            f"{turn.where}: only {len(results)} of its {len(turn.calls)} calls have a result"
            + f" (none: {', '.join(unanswered)})" * any(ids)
            + "; add the 'tool' messages that are missing, or leave the calls out"
        )
    return results


def _quoted(name: str | None) -> str:
    return "null" if name is None else f"'{name[:40]}'"


def _check_names(read: Sequence[_Read], tools: Sequence[Mapping[str, Any]]) -> None:
    """Refuses trained calls of tools that the row's ``tools`` do not describe."""
    names = tool_names(tools)
    for each in read:
        for part in each.turn.parts if names and each.turn.trained else ():
            if isinstance(part, RecordedCall) and part.name not in names:
                raise DataError(f"{each.where}: {unknown_tool(part.name, names)}")


def _check_answered(read: Sequence[_Read]) -> None:
    """Refuses calls without a result.

    A last call may have none where its message's weight is given: 0, or 1 for a call that ends the
    episode. Where no message has the role tool, the results are the user's messages.
    """
    results = any(each.role == "tool" for each in read)
    for each, after in zip(read, [*read[1:], None], strict=True):
        if after is None and each.calls and not each.weighed:
            raise DataError(
                f"{each.where}: its calls have no result, and the conversation ends; add the "
                "result and the answer, or give the message 'weight': 1 if a call ends the "
                "episode, or 0"
            )
        if after is not None and each.calls and results and after.role != "tool":
            raise DataError(
                f"{each.where}: its calls have no result, but {after.where} of the role "
                f"{after.role} follows; add the 'tool' messages that are missing, or leave the "
                "calls out"
            )


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of tools that are given by their schemas.

    Raises:
        DataError: one has none.
    """
    names = []
    for tool in tools:
        function = tool.get("function") or tool
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise DataError("a description in 'tools' has no name")
        names.append(name)
    return names


def unknown_tool(name: str, names: Sequence[str]) -> str:
    """Returns the message about a call of a tool that is not described."""
    return (
        f"it calls '{name}', which is not in the row's 'tools' ({', '.join(names)}); describe it "
        "there, or give the message 'weight': 0 if the call is a mistake"
    )


def _read(where: str, message: Any, folder: PictureFolder) -> tuple[_Read, Pieces]:
    """Reads a message; its texts and pictures, which are the second value, are not yet its own."""
    if not isinstance(message, Mapping):
        raise DataError("it must be an object with role and content")
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise DataError(f"the role must be one of {', '.join(_ROLES)}, got {message.get('role')!r}")
    _refuse_unknown({k: v for k, v in message.items() if not is_picture_column(k)}, _MESSAGE)
    content, calls, weight = (message.get(key) for key in ("content", "tool_calls", "weight"))
    if role != "assistant" and (calls or weight):
        raise DataError("only an assistant's message can have 'tool_calls', or a 'weight' above 0")
    trained = _trained(message)
    called = _calls(calls)
    if content is None and calls:
        message = {**message, "content": ""}
    pieces = pieces_of(message, folder, shows_pictures=role == "user")
    if role == "assistant" and trained and not calls and not "".join(map(str, pieces)).strip():
        raise DataError(
            "it is empty, and the student would learn to stop at once; give it 'weight': 0, or "
            "leave the row out"
        )
    turn = RecordedTurn(role, tuple(call for _, call in called), trained)
    ids = tuple(name for name, _ in called)
    answers = _id(message.get("tool_call_id"))
    return _Read(where, message["role"], turn, ids, answers, weight is not None), pieces


def _id(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _trained(given: Mapping[str, Any]) -> bool:
    """Returns whether the ``weight`` of a row or message lets it be trained on."""
    weight = given.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"'weight' must be 0 or 1, got {weight!r}")
    return weight != 0


def _calls(calls: Any) -> list[tuple[str | None, RecordedCall]]:
    if calls and not isinstance(calls, (list, tuple)):
        raise DataError("'tool_calls' must be a list")
    return [_call(call) for call in calls or ()]


def _call(call: Any) -> tuple[str | None, RecordedCall]:
    """Reads a call and its id in OpenAI's or Hugging Face's form, with ``function`` or without."""
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
            arguments = {} if arguments is None else arguments
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the arguments of '{function['name']}' are no JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of '{function['name']}' must be a JSON object")
    return _id(call.get("id") or function.get("id")), RecordedCall(function["name"], arguments)


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Returns the descriptions of a row's tools: a list of objects, or its JSON text."""
    given = row.get("tools") or []
    try:
        given = json.loads(given) if isinstance(given, str) else given
        json.dumps(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"'tools' are no JSON: {error}") from error
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise DataError("'tools' must be a list of objects")
    return tuple(given)


def _without_nulls(value: Any) -> Any:
    """Removes the nulls of objects, which mean nothing where a file's format adds them."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, (list, tuple)) else value


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    for key, value in given.items():
        if key not in known and not _is_nothing(value):
            raise DataError(
                f"'{key}' cannot be rendered, and would be lost; leave it out, or say it with what "
                f"is read: {', '.join(known)}"
            )


def _is_nothing(value: Any) -> bool:
    return value in (None, "", [], {})
