"""The tool ``select_frames``: shows some frames of a video at full size."""

from __future__ import annotations

from typing import Annotated

from reopold_agent.common.pixels import Shown, stated
from reopold_agent.errors import ToolError
from reopold_agent.tools.base import EpisodeState, ToolResult, tool
from reopold_agent.tools.schema import shorten
from reopold_agent.types import IMAGE_MARK, Region

MAX_SELECTED = 8


@tool(
    "select_frames",
    description="Select frames from a video, to look at them closely.",
    inline=True,
    original_words={},
)
def select_frames(
    state: EpisodeState,
    target_frames: Annotated[
        list[int],
        "List of frame indices to select from the video, counted from 1 (no more than 8 frames "
        "in total).",
    ],
) -> ToolResult:
    """Shows the frames again at full size, in the requested order.

    Frames are not cropped (VerlTool crops each with the box of another tool), and too many are an
    error (Pixel-Reasoner rewrites the student's text instead). Option ``sizes``: as `crop_image`'s.
    """
    if not state.frames:
        raise ToolError("This question has no video; use crop_image to look closer at an image.")
    if not target_frames:
        raise ToolError("'target_frames' is empty; name at least one frame.")
    if len(target_frames) > MAX_SELECTED:
        raise ToolError(
            f"You asked for {len(target_frames)} frames; select at most {MAX_SELECTED}."
        )
    for number in target_frames:
        if not 1 <= number <= state.frames:
            raise ToolError(
                f"There is no frame {shorten(number, 24)}; the frames are numbered 1 to "
                f"{state.frames}."
            )
    if len(set(target_frames)) != len(target_frames):
        raise ToolError("A frame is named twice in 'target_frames'.")
    frames = tuple(state.images[number - 1] for number in target_frames)
    first = len(state.images) + 1
    original = state.options.get("select_frames", {}).get("sizes") == "original"
    shown = [Shown(*each.size) if original else state.shown_later(each.size) for each in frames]
    return ToolResult(
        f"Here are the selected frames (Frame {stated(shown)}, Numbered {first} to "
        f"{first + len(frames) - 1}):\n" + IMAGE_MARK * len(frames),
        frames,
        tuple(Region(number, (0.0, 0.0, 1.0, 1.0)) for number in target_frames),
    )
