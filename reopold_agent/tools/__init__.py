"""Tools that a student may call, and the registry that other packages extend."""

from reopold_agent.tools.base import TOOLS, EpisodeState, Tool, ToolResult, tool
from reopold_agent.tools.crop import crop_image
from reopold_agent.tools.frames import select_frames
from reopold_agent.tools.isolation import Isolation
from reopold_agent.tools.parse import ParsedCall, find_tool_call
from reopold_agent.tools.prompt import BASE_PROMPT, system_prompt

__all__ = [
    "BASE_PROMPT",
    "TOOLS",
    "EpisodeState",
    "Isolation",
    "ParsedCall",
    "Tool",
    "ToolResult",
    "crop_image",
    "find_tool_call",
    "select_frames",
    "system_prompt",
    "tool",
]
