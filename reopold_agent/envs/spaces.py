"""Gymnasium spaces for text in any script and pictures of any size.

Gymnasium's `Text` needs a character set and its `Box` a fixed shape; neither can describe a
conversation with crops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from reopold_agent.types import IMAGE_MARK, PixelArray

Part: TypeAlias = "str | PixelArray"

_SAMPLE_CHARACTERS = "abcdefghij 0123456789.,?\né漢"


class UnicodeText(spaces.Space[str]):
    """Strings of 0 to ``max_length`` characters, without surrogates."""

    def __init__(self, max_length: int, *, seed: int | np.random.Generator | None = None) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        super().__init__(dtype=str, seed=seed)

    def sample(self, mask: None = None, probability: None = None) -> str:
        """Returns a short random string."""
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText samples without mask or probability")
        length = int(self.np_random.integers(0, min(self.max_length, 40) + 1))
        letters = self.np_random.integers(len(_SAMPLE_CHARACTERS), size=length)
        return "".join(_SAMPLE_CHARACTERS[i] for i in letters)

    def contains(self, x: object) -> bool:
        """Whether ``x`` is such a string."""
        if not isinstance(x, str) or len(x) > self.max_length:
            return False
        return not any("\ud800" <= c <= "\udfff" for c in x)

    @property
    def is_np_flattenable(self) -> bool:
        """False: texts differ in length."""
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnicodeText) and self.max_length == other.max_length

    def __hash__(self) -> int:
        return hash(("UnicodeText", self.max_length))

    def __repr__(self) -> str:
        return f"UnicodeText({self.max_length})"


class Pictures(spaces.Space[tuple[PixelArray, ...]]):
    """Tuples of 0 to ``max_count`` pictures: (height, width, 3) uint8, sides 1 to ``max_side``."""

    def __init__(
        self, max_count: int, max_side: int, *, seed: int | np.random.Generator | None = None
    ) -> None:
        if max_count < 1 or max_side < 1:
            raise ValueError(f"need at least one picture of one pixel: {max_count}, {max_side}")
        self.max_count, self.max_side = max_count, max_side
        super().__init__(seed=seed)

    def sample(self, mask: None = None, probability: None = None) -> tuple[PixelArray, ...]:
        """Returns up to three small random pictures."""
        if mask is not None or probability is not None:
            raise ValueError("Pictures samples without mask or probability")
        most = min(self.max_side, 64)
        count = int(self.np_random.integers(0, min(self.max_count, 3) + 1))
        sizes = self.np_random.integers(1, most + 1, size=(count, 2))
        pictures: list[npt.NDArray[np.uint8]] = [
            self.np_random.integers(0, 256, size=(int(h), int(w), 3), dtype=np.uint8)
            for h, w in sizes
        ]
        return tuple(pictures)

    def contains(self, x: object) -> bool:
        """Whether ``x`` is such a tuple."""
        return (
            isinstance(x, tuple)
            and len(x) <= self.max_count
            and all(self._is_picture(picture) for picture in x)
        )

    def _is_picture(self, x: Any) -> bool:
        return (
            isinstance(x, np.ndarray)
            and x.dtype == np.uint8
            and x.ndim == 3
            and x.shape[2] == 3
            and all(1 <= side <= self.max_side for side in x.shape[:2])
        )

    @property
    def is_np_flattenable(self) -> bool:
        """False: pictures differ in size."""
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pictures) and (self.max_count, self.max_side) == (
            other.max_count,
            other.max_side,
        )

    def __hash__(self) -> int:
        return hash(("Pictures", self.max_count, self.max_side))

    def __repr__(self) -> str:
        return f"Pictures({self.max_count}, max_side={self.max_side})"


def parts_of(observation: Any) -> list[Part]:
    """Returns text and pictures of an observation in reading order.

    Args:
        observation: a `reopold_agent.types.Observation`, or that of another Gymnasium environment:
            a text, a picture, or any other value, which is shown as its ``repr``.
    """
    if isinstance(observation, Mapping) and isinstance(observation.get("text"), str):
        images = [np.asarray(image) for image in observation.get("images", ())]
        parts: list[Part] = []
        for position, text in enumerate(observation["text"].split(IMAGE_MARK)):
            if position and images:
                parts.append(images.pop(0))
            if text:
                parts.append(text)
        return [*parts, *images]  # pictures without a mark come last
    if isinstance(observation, str):
        return [observation] if observation else []
    if _is_picture(observation):
        return [observation]
    return [repr(observation)]


def _is_picture(value: Any) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and value.ndim == 3
        and value.shape[2] == 3
        and value.size > 0
    )
