"""The tool ``crop_image``: shows a part of a picture at full size."""

from __future__ import annotations

from typing import Annotated

from reopold_agent.common.pixels import Shown
from reopold_agent.errors import ToolError
from reopold_agent.tools.base import EpisodeState, ToolResult, tool
from reopold_agent.types import IMAGE_MARK, Region

MIN_SIDE = 28
"""Each side of a crop must be longer, pixels: 28 x 28 are one token of Qwen2.5-VL."""

MAX_NORMALIZED = 2.0
"""A box whose numbers are all at most this, but not in [0, 1], was meant to be normalised."""

PADDING, PADDING_PIXELS = 0.1, 600
"""The box grows at each edge by this share of the picture's side, but at most so many pixels."""


@tool(
    "crop_image",
    description="Zoom in on the image based on the bounding box coordinates. It is useful when "
    "the object or text in the image is too small to be seen.",
    aliases=("crop_image_normalized", "zoom_in"),
    inline=True,
    original_words={
        "bbox_2d": "coordinates for bounding box of the area you want to zoom in: [x1, y1, x2, "
        "y2], normalized to the range 0 to 1, or in pixels of the image."
    },
)
def crop_image(
    state: EpisodeState,
    bbox_2d: Annotated[
        list[float],
        "coordinates for bounding box of the area you want to zoom in: [x1, y1, x2, y2], "
        "normalized to the range 0 to 1, or in pixels of the image at the size you see it.",
    ],
    target_image: Annotated[
        int,
        "The index of the image to crop, from 1 to the number of images so far. Choose 1 to "
        "operate on the original image.",
    ],
) -> ToolResult:
    """Cuts the padded box out of the picture at full size.

    Options (environment configuration, ``tool_options.crop_image``): ``padding`` (share of the
    side), ``min_side`` (pixels), ``sizes`` (``shown``: sizes, and boxes in pixels, are those of
    pictures as the model sees them; ``original``: those of the originals).
    """
    image = state.image(target_image)
    options = state.options.get("crop_image", {})
    original = options.get("sizes") == "original"
    min_side = int(options.get("min_side", MIN_SIDE))
    if min(image.size) <= min_side:
        raise ToolError(
            f"Image {target_image} cannot be enlarged: its full size is {image.width}x"
            f"{image.height}, and each side of a part must be larger than {min_side} pixels."
        )
    box = pixel_box(
        bbox_2d,
        image.width,
        image.height,
        padding=float(options.get("padding", PADDING)),
        min_side=min_side,
        shown=None if original else state.shown(target_image),
    )
    part = image.crop(box)
    size = Shown(*part.size) if original else state.shown_later(part.size)
    left, top, right, bottom = box
    shares = (
        left / image.width,
        top / image.height,
        right / image.width,
        bottom / image.height,
    )
    return ToolResult(
        f"Here is the cropped image (Image Size: {size}):\n{IMAGE_MARK}",
        (part,),
        (Region(target_image, shares),),
    )


def pixel_box(
    bbox: list[float],
    width: int,
    height: int,
    *,
    padding: float,
    min_side: int,
    shown: Shown | None = None,
) -> tuple[int, int, int, int]:
    """Returns the box (left, top, right, bottom) in whole pixels of the original.

    The box is padded and clipped. Coordinates are normalised if all four lie in [0, 1]. (Peers
    require ``< 1``, which turns the whole picture [0, 0, 1, 1] into its corner.) Otherwise they are
    pixels of the picture as ``shown``, by default at full size. (VerlTool takes them as pixels of
    the original file, whose size the model does not know.) Two cases are ambiguous. A box inside
    the first pixel counts as normalised, since as pixels it would be useless. A box slightly
    outside [0, 1], such as [0.5, 0.5, 1.02, 1], is refused: taken as pixels it would give a padded
    corner, which the model would mistake for the part it asked for. Padding is ``min(padding, 600 /
    side)`` of the side, as in Pixel-Reasoner.

    Raises:
        ToolError: the box is malformed, inside out, outside the picture, or too small.
    """
    if len(bbox) != 4:
        raise ToolError(f"'bbox_2d' must have 4 numbers [x1, y1, x2, y2], got {len(bbox)}.")
    shown = shown or Shown(width, height)
    x1, y1, x2, y2 = bbox
    if x2 <= x1 or y2 <= y1:
        raise ToolError(
            f"The box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] is empty: x2 must be greater than x1 and "
            "y2 greater than y1."
        )
    if all(0 <= value <= 1 for value in bbox):
        x1, x2, y1, y2 = x1 * width, x2 * width, y1 * height, y2 * height
    elif max(map(abs, bbox)) <= MAX_NORMALIZED:
        raise ToolError(
            f"The box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] is neither normalized (all four from "
            f"0 to 1) nor in pixels of the image, whose size is {shown}."
        )
    else:
        x1, x2 = x1 * shown.scale_x, x2 * shown.scale_x
        y1, y2 = y1 * shown.scale_y, y2 * shown.scale_y
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        raise ToolError(f"The box lies outside the image, whose size is {shown}.")
    pad_x = min(padding * width, PADDING_PIXELS)
    pad_y = min(padding * height, PADDING_PIXELS)
    left, top = max(0, round(x1 - pad_x)), max(0, round(y1 - pad_y))
    right, bottom = min(width, round(x2 + pad_x)), min(height, round(y2 + pad_y))
    if right - left <= min_side or bottom - top <= min_side:
        raise ToolError(
            f"The cropped image would be {right - left}x{bottom - top}; each side must be larger "
            f"than {min_side} pixels. Choose a larger box."
        )
    return left, top, right, bottom
