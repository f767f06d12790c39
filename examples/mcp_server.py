"""An MCP server with two tools, for docs/tools.md: ``python examples/mcp_server.py [PORT]``."""

import io
import sys

from mcp.server.mcpserver import Image, MCPServer
from PIL import Image as Picture
from PIL import ImageDraw

server = MCPServer("charts")


@server.tool()
def multiply(first: float, second: float) -> str:
    """Multiplies two numbers."""
    return str(first * second)


@server.tool()
def draw_bars(values: list[float]) -> Image:
    """Draws a bar chart of up to 20 values from 0 to 100."""
    if not 1 <= len(values) <= 20:
        raise ValueError("give 1 to 20 values")
    chart = Picture.new("RGB", (24 * len(values), 112), "white")
    pen = ImageDraw.Draw(chart)
    for place, value in enumerate(values):
        pen.rectangle((24 * place + 4, 106 - value, 24 * place + 20, 106), fill="navy")
    file = io.BytesIO()
    chart.save(file, "PNG")
    return Image(data=file.getvalue(), format="png")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
