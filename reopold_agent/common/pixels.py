"""Sizes of pictures: how large a model sees them, computed without the pictures themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from reopold_agent.errors import ConfigError

Size: TypeAlias = "tuple[int, int]"
"""Width and height in pixels."""

MAX_ASPECT = 190
"""A picture whose sides differ by a larger factor is padded first: Qwen's rule refuses 200."""


@dataclass(frozen=True)
class PixelLimits:
    """Bounds on height x width after the resize, in pixels.

    Qwen2.5-VL spends one token per 28 x 28 pixels, so ``tokens = pixels / 784`` (Qwen3-VL: 32 and
    1024). Sides are multiples of 28 and at least 28. So two kinds of pictures exceed
    ``max_pixels``: thin ones, if it is less than 190 tokens, and enlarged ones, if both limits are
    close together.
    """

    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ConfigError(
                f"pixel limits need 0 < min_pixels <= max_pixels, got {self.min_pixels} and "
                f"{self.max_pixels}"
            )

    def resized(self, size: Size, factor: int) -> Size:
        """Returns a picture's size after the resize: Qwen2-VL's ``smart_resize``.

        Args:
            size: of the picture after `padded`.
            factor: both sides become multiples of it (patch x merge).
        """
        width, height = size
        sides = [round(side / factor) * factor for side in size]
        if sides[0] * sides[1] > self.max_pixels:
            scale = math.sqrt((height * width) / self.max_pixels)
            sides = [max(factor, math.floor(side / scale / factor) * factor) for side in size]
        elif sides[0] * sides[1] < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            sides = [math.ceil(side * scale / factor) * factor for side in size]
        return sides[0], sides[1]


def padded(size: Size) -> Size:
    """Returns the size after padding at the right or at the bottom to `MAX_ASPECT`."""
    width, height = size
    return max(width, -(-height // MAX_ASPECT)), max(height, -(-width // MAX_ASPECT))


def smaller(size: Size, side: int | None) -> Size:
    """Returns the size after scaling down to a longer side of at most ``side``; None: no limit."""
    if side is None or max(size) <= side:
        return size
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@dataclass(frozen=True)
class Shown:
    """A picture as the model sees it.

    Attributes:
        width, height: of what the model sees, pixels.
        scale_x, scale_y: pixels of the original per pixel that the model sees.
    """

    width: int
    height: int
    scale_x: float = 1.0
    scale_y: float = 1.0

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def stated(pictures: Sequence[Shown]) -> str:
    """Returns the sizes as words for the model: one size if all are equal, else each in order."""
    sizes = [str(each) for each in pictures]
    return f"Size: {sizes[0]}" if len(set(sizes)) == 1 else f"Sizes: {', '.join(sizes)}"


@dataclass(frozen=True)
class ShownSizes:
    """The rule by which pictures are resized on their way to the model.

    Attributes:
        prompt: limits for the question's pictures; None: no resize.
        observation: likewise, for pictures that tools return.
        factor: patch x merge of the model.
    """

    prompt: PixelLimits | None = None
    observation: PixelLimits | None = None
    factor: int = 28

    def of(self, size: Size, *, prompt: bool, sides: tuple[int | None, ...] = ()) -> Shown:
        """Returns how large the model sees a picture.

        Args:
            size: of the original.
            prompt: whether it is one of the question's.
            sides: limits of the longer side that the environment scales it down to, in order.
        """
        given = size
        for side in sides:
            given = smaller(given, side)
        limits = self.prompt if prompt else self.observation
        if limits is None:
            return Shown(*given, size[0] / given[0], size[1] / given[1])
        whole = padded(given)
        width, height = limits.resized(whole, self.factor)
        return Shown(
            width,
            height,
            whole[0] / width * (size[0] / given[0]),
            whole[1] / height * (size[1] / given[1]),
        )
