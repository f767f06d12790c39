"""Finding the tool call in what the model said.

The words of the model are never changed; a call that cannot be read becomes a message to it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from reopold_agent.errors import ToolError
from reopold_agent.tools.schema import shorten

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(
    re.escape(OPEN) + r"((?:(?!" + re.escape(OPEN) + r").)*?)" + re.escape(CLOSE), re.S
)

MAX_CALL_CHARACTERS = 20_000
"""A longer call is not parsed: no tool here needs one."""

MAX_DEPTH = 32
"""A call nested deeper is refused: what reads it later (messages, logs) recurses."""


@dataclass(frozen=True)
class ParsedCall:
    """A call as the model wrote it; ``arguments`` are not checked yet."""

    name: str
    arguments: Any


def find_tool_call(text: str, policy: Literal["first", "last"] = "first") -> ParsedCall | None:
    """The tool call in an assistant's turn.

    Args:
        text: the turn.
        policy: which of several calls counts. VerlTool runs the first, Pixel-Reasoner the last;
            the default is the first.

    Returns:
        The call, or None when the turn has no ``<tool_call>`` at all.

    Raises:
        ToolError: there is a call, but it cannot be read; says why.
    """
    bodies = [match.group(1) for match in _CALL.finditer(text)]
    if not bodies:
        if OPEN in text:
            raise ToolError(f"The tool call is not closed; end it with {CLOSE}.")
        return None
    return _read(bodies[0 if policy == "first" else -1])


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
        raise ToolError(
            f"The tool call is not valid JSON ({reason}). Write "
            '{"name": <function-name>, "arguments": <args-json-object>}.'
        ) from None
    if not isinstance(call, dict):
        raise ToolError(f"The tool call must be a JSON object, got {shorten(call)}.")
    name = call.get("name")
    if not isinstance(name, str) or not name:
        raise ToolError('The tool call has no "name".')
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
    """How many lists and objects are inside each other, 0 for a plain value."""
    level, depth = [value], 0
    while True:
        inner = [v for v in level if isinstance(v, (list, dict))]
        if not inner:
            return depth
        depth += 1
        level = [item for v in inner for item in (v.values() if isinstance(v, dict) else v)]


def _refuse(constant: str) -> NoReturn:
    raise ToolError(f"{constant} is not a number that a tool can use.")
