"""The tool block of the system message, in Qwen's function-call format (Nous style).

Qwen2.5-VL's chat template ignores ``tools=``, so the block is written here exactly as Qwen2.5's
text template writes it; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reopold_agent.tools.base import Tool

BASE_PROMPT = "You are a helpful assistant."


def system_prompt(base: str, tools: Sequence[Tool]) -> str:
    """Returns the system message: ``base``, then the tools' schemas, one JSON object per line."""
    return with_tools(base, [tool.schema() for tool in tools])


def with_tools(base: str, schemas: Sequence[Mapping[str, Any]]) -> str:
    """Returns the system message for tools that are given by their schemas."""
    if not schemas:
        return base
    lines = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    return (
        f"{base}\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
