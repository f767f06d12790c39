"""Two tools: turn a picture, brighten a picture."""

from __future__ import annotations

from typing import Annotated, Literal

from PIL import ImageEnhance

from reopold_agent.errors import ToolError
from reopold_agent.tools import EpisodeState, ToolResult, tool
from reopold_agent.types import IMAGE_MARK

MAX_FACTOR = 10.0


@tool("rotate_image", timeout_s=5)
def rotate_image(
    state: EpisodeState,
    target_image: Annotated[int, "The index of the image, from 1."],
    degrees: Annotated[Literal[90, 180, 270], "How far to turn it, counter-clockwise."],
) -> ToolResult:
    """Turn an image that is not upright."""
    turned = state.image(target_image).rotate(degrees, expand=True)
    return ToolResult(f"Here is the rotated image:\n{IMAGE_MARK}", (turned,))


@tool("brighten_image", timeout_s=5)
def brighten_image(
    state: EpisodeState,
    target_image: Annotated[int, "The index of the image, from 1."],
    factor: Annotated[float, "How much brighter: 2 is twice as bright."] = 4.0,
) -> ToolResult:
    """Brighten an image that is too dark to read."""
    # The message says what is allowed: the model reads it and can try again.
    if not 0 < factor <= MAX_FACTOR:
        raise ToolError(f"'factor' must be above 0 and at most {MAX_FACTOR:g}, got {factor:g}.")
    brighter = ImageEnhance.Brightness(state.image(target_image)).enhance(factor)
    return ToolResult(f"Here is the brighter image:\n{IMAGE_MARK}", (brighter,))
