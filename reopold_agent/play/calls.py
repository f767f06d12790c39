"""Makes the JSON of a tool call from a few words, such as ``crop_image 0.1 0.1 0.5 0.5 1``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from reopold_agent.tools.parse import CLOSE, OPEN


class BadWordsError(ValueError):
    """The words are not a call; the message is for the player."""


def call_text(schema: Mapping[str, Any], words: str) -> str:
    """Returns the turn that calls a tool.

    Values are assigned to the arguments in order; an argument that is a list takes all values that
    the others leave. ``name=value`` assigns by name. ``{...}`` is used as the whole JSON object and
    not checked, since a model may write it wrong too.

    Args:
        schema: of the tool, as `reopold_agent.tools.Tool.schema` returns it.
        words: the text after the tool's name.

    Raises:
        BadWordsError: a value is missing, superfluous or of the wrong type.
    """
    name = str(schema["function"]["name"])
    if words.lstrip().startswith("{"):
        return _tagged(f'{{"name": {json.dumps(name)}, "arguments": {words.strip()}}}')
    parameters = schema["function"]["parameters"]
    try:
        split = shlex.split(words)
    except ValueError as error:
        raise BadWordsError(f"{error}; close the quotation marks") from error
    arguments = _arguments(parameters, split, usage(schema))
    return _tagged(json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False))


def usage(schema: Mapping[str, Any]) -> str:
    """Returns how to call a tool: ``/call crop_image BBOX_2D... TARGET_IMAGE``."""
    parameters = schema["function"]["parameters"]
    shown = [f"/call {schema['function']['name']}"]
    for name, each in parameters.get("properties", {}).items():
        word = name.upper() + ("..." if each.get("type") == "array" else "")
        shown.append(word if name in parameters.get("required", ()) else f"[{name}=]")
    return " ".join(shown)


def _tagged(call: str) -> str:
    return f"{OPEN}\n{call}\n{CLOSE}"


def _arguments(parameters: Mapping[str, Any], words: Sequence[str], how: str) -> dict[str, Any]:
    properties: Mapping[str, Mapping[str, Any]] = parameters.get("properties", {})
    required = parameters.get("required", ())
    given: dict[str, Any] = {}
    values = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in properties:
            given[name] = _converted(value, properties[name], name)
        else:
            values.append(word)
    open_names = [name for name in properties if name not in given]
    lists = [name for name in open_names if properties[name].get("type") == "array"]
    if len(lists) > 1 and values:
        raise BadWordsError(f"several arguments are lists: name them, as in {lists[0]}=1,2")
    if lists:  # its length is known only if optional arguments are given by name
        open_names = [name for name in open_names if name in required or name in lists]
    rest = len(values) - (len(open_names) - 1)
    for name in open_names:
        taken = [values.pop(0) for _ in range(rest if name in lists else 1) if values]
        if taken and name in lists:
            given[name] = _converted(",".join(taken), properties[name], name)
        elif taken:
            given[name] = _converted(taken[0], properties[name], name)
    if values:
        raise BadWordsError(f"'{values[0]}' is one value too many. {how}")
    missing = [name for name in required if name not in given]
    if missing:
        raise BadWordsError(f"no value is left for {', '.join(missing)}. {how}")
    return {name: given[name] for name in properties if name in given}


def _converted(word: str, schema: Mapping[str, Any], name: str) -> Any:
    kind = schema.get("type")
    if kind == "string":
        return word
    if kind == "array":
        inside = word.removeprefix("[").removesuffix("]")
        items = schema.get("items", {})
        return [_converted(each.strip(), items, name) for each in inside.split(",") if each.strip()]
    try:
        value = json.loads(word)
    except ValueError:
        value = word
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "integer": number and isinstance(value, int),
        "number": number,
        "boolean": isinstance(value, bool),
    }
    if not fits.get(str(kind), True):
        raise BadWordsError(f"{name} must be of type {kind}, got '{word}'")
    return value
