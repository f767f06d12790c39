"""Finds the tool call in a turn of the model, and writes calls as the model has to.

The model's text is never changed. A call that cannot be parsed becomes an error message for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from reopold_agent.errors import ToolError
from reopold_agent.tools.schema import as_json, shorten

FORM = '{"name": <function-name>, "arguments": <args-json-object>}'

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(
    re.escape(OPEN) + r"((?:(?!" + re.escape(OPEN) + r").)*?)" + re.escape(CLOSE), re.S
)

MAX_CALL_CHARACTERS = 20_000
"""A longer call is refused: no tool needs one."""

MAX_DEPTH = 32
"""A call that is nested deeper is refused: code that reads it later recurses."""


@dataclass(frozen=True)
class ParsedCall:
    """A call as the model wrote it; its ``arguments`` are unchecked."""

    name: str
    arguments: Any


def find_tool_call(text: str, policy: Literal["first", "last"] = "first") -> ParsedCall | None:
    """Returns the tool call in an assistant's turn.

    Args:
        text: the turn.
        policy: which of several calls to return. VerlTool runs the first, Pixel-Reasoner the last.

    Returns:
        The call, or None if the turn has no ``<tool_call>``.

    Raises:
        ToolError: the call cannot be parsed; the message says why.
    """
    bodies = [match.group(1) for match in _CALL.finditer(text)]
    if not bodies:
        if OPEN in text:
            raise ToolError(f"The tool call is not closed; end it with {CLOSE}.")
        return None
    return _read(bodies[0 if policy == "first" else -1])


def write_tool_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Returns the text with which a model calls a tool, as the tools' prompt asks for it.

    Raises:
        ToolError: `find_tool_call` could not read the call.
    """
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    mark = next((each for each in (OPEN, CLOSE) if each in call), None)
    if mark is not None:
        raise ToolError(f"The arguments of '{shorten(name)}' contain {mark}.")
    text = f"{OPEN}\n{call}\n{CLOSE}"
    if find_tool_call(text) != ParsedCall(name, arguments):
        raise ToolError(f"The arguments of '{shorten(name)}' are none that JSON can hold.")
    return text


def _read(body: str) -> ParsedCall:
    if len(body) > MAX_CALL_CHARACTERS:
        raise ToolError(f"The tool call is too long ({len(body)} characters).")
    try:
        call = json.loads(body.strip(), parse_constant=_refuse)
    except ToolError:
        raise
    except RecursionError:
        raise ToolError("The tool call is nested too deeply.") from None
    except ValueError as error:
        reason = getattr(error, "msg", "a number is too long")
        raise ToolError(f"The tool call is not valid JSON ({reason}). Write {FORM}.") from None
    if not isinstance(call, dict):
        raise ToolError(f"The tool call must be a JSON object, got {as_json(call)}.")
    name = call.get("name")
    if not isinstance(name, str) or not name:
        raise ToolError(f'The tool call has no "name". Write {FORM}.')
    others = [key for key in call if key != "name"]
    if others and "arguments" not in call:
        given = shorten(", ".join(map(as_json, others)))
        raise ToolError(f'The tool call has no "arguments", but {given}. Write {FORM}.')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's form: the arguments as a JSON string
        try:
            arguments = json.loads(arguments, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise ToolError('The "arguments" must be a JSON object.') from None
    if _depth(arguments) > MAX_DEPTH:
        raise ToolError("The tool call is nested too deeply.")
    return ParsedCall(name, arguments)


def _depth(value: Any) -> int:
    """Returns how deep lists and objects are nested; 0 for a plain value."""
    level, depth = [value], 0
    while True:
        inner = [v for v in level if isinstance(v, (list, dict))]
        if not inner:
            return depth
        depth += 1
        level = [item for v in inner for item in (v.values() if isinstance(v, dict) else v)]


def _refuse(constant: str) -> NoReturn:
    raise ToolError(f"{constant} is not a number that a tool can use.")
