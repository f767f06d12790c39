"""The tool block of the system message, in Qwen's function-call format (Nous style).

Qwen2.5-VL's own chat template ignores ``tools=``, so the block is written here, exactly as
Qwen2.5's text template writes it; a golden test holds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from reopold_agent.tools.base import Tool

BASE_PROMPT = "You are a helpful assistant."


def system_prompt(base: str, tools: Sequence[Tool]) -> str:
    """The system message: ``base``, then the tools' schemas, one JSON object per line."""
    if not tools:
        return base
    schemas = "\n".join(json.dumps(tool.schema(), ensure_ascii=False) for tool in tools)
    return (
        f"{base}\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{schemas}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
