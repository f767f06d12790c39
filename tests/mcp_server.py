"""An MCP server of the SDK for tests/test_mcp.py: ``python mcp_server.py [PORT]``."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import sys
from typing import Any

from mcp import types
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from PIL import Image as Picture

server = MCPServer("tests")


def png(side: int) -> bytes:
    file = io.BytesIO()
    Picture.new("RGB", (side, side), (250, 10, 10)).save(file, "PNG")
    return file.getvalue()


@server.tool()
def add(a: int, b: int) -> str:
    """Adds two numbers."""
    return str(a + b)


@server.tool()
def draw(side: int) -> Image:
    """Draws a red square."""
    return Image(data=png(side), format="png")


@server.tool()
def refuse() -> str:
    """Says what was wrong."""
    raise ToolError("there is no such shelf ￼")


@server.tool()
def pid() -> str:
    """Says which process this is."""
    return str(os.getpid())


@server.tool()
async def sleep(span: float) -> str:
    """Sleeps."""
    try:
        await asyncio.sleep(span)
    except asyncio.CancelledError:
        print("a call was cancelled", file=sys.stderr, flush=True)
        raise
    return f"slept {span}"


@server.tool()
def repeat(times: int) -> str:
    """Returns a long text."""
    return "x" * times


@server.tool(structured_output=False)
def blocks(kind: str) -> Any:
    """Returns the other kinds of content."""
    data = base64.b64encode(png(8)).decode()
    return {
        "resource": types.EmbeddedResource(
            resource=types.TextResourceContents(uri="file:///a", text="the text of a")
        ),
        "picture": types.EmbeddedResource(
            resource=types.BlobResourceContents(uri="file:///p", blob=data, mime_type="image/png")
        ),
        "data": types.EmbeddedResource(
            resource=types.BlobResourceContents(uri="file:///d", blob="AAAA", mime_type="a/b")
        ),
        "audio": types.AudioContent(data="AAAA", mime_type="audio/wav"),
        "link": types.ResourceLink(uri="https://example.org/x", name="x"),
        "broken": types.ImageContent(data="AAAA", mime_type="image/png"),
        "no base64": types.ImageContent(data="***", mime_type="image/png"),
        "many": types.CallToolResult(
            content=[types.ImageContent(data=data, mime_type="image/png") for _ in range(257)]
        ),
        "structured": types.CallToolResult(content=[], structured_content={"a": [1, "ü"]}),
        "nothing": types.CallToolResult(content=[]),
        "failed": types.CallToolResult(content=[], is_error=True),
        "mark": types.TextContent(text="a ￼ in a text"),
    }[kind]


@server.tool()
def header(context: Context, name: str) -> str:
    """Returns a header of the request."""
    return str((context.headers or {}).get(name))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
