"""Gymnasium spaces for text in any script and pictures of any size.

Gymnasium's `Text` needs a character set and its `Box` a fixed shape; neither can describe a
conversation with crops.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from reopold_agent.envs.in_words import SMALLEST_PICTURE, count_values, in_words
from reopold_agent.errors import EnvironmentCodeError
from reopold_agent.tools.base import is_verdict
from reopold_agent.types import IMAGE_MARK, Observation, PixelArray

Part: TypeAlias = "str | PixelArray"

_MOST_VALUES = 4096
"""Most values of an observation that are put into words."""

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


def as_observation(value: Any) -> Observation:
    """Returns what any environment shows as this project's `Observation`.

    Args:
        value: an `Observation`, with or without ``images`` and marks for them, or what another
            Gymnasium environment shows: a text, a picture, or any other value, of which pictures
            are shown first and the rest is put into words.

    Raises:
        ValueError: nothing, more than can be said, a text or pictures that are none, or more marks
            than pictures.
    """
    if isinstance(value, Mapping) and "text" in value and {"text", "images"}.issuperset(value):
        text, images = value["text"], tuple(value.get("images", ()))
        if not isinstance(text, str) or not all(map(_is_picture, images)):
            raise ValueError(
                "an observation's text must be a string, and its images arrays of the shape "
                "(height, width, 3), uint8"
            )
        missing = len(images) - text.count(IMAGE_MARK)
        if missing < 0:
            raise ValueError(
                f"an observation has {len(images)} images but {len(images) - missing} image marks "
                "(U+FFFC) in its text"
            )
        return Observation(text=text + IMAGE_MARK * missing, images=images)
    if _is_picture(value):
        return Observation(text=IMAGE_MARK, images=(value,))
    if isinstance(value, str):
        return Observation(text=value.replace(IMAGE_MARK, " "), images=())
    pictures: list[PixelArray] = []
    rest = _without_pictures(value, pictures)
    if count_values(rest) > _MOST_VALUES:
        raise ValueError(f"an observation of more than {_MOST_VALUES} values is no picture or text")
    said = in_words(rest, _MOST_VALUES).replace(IMAGE_MARK, " ")
    if not pictures and not said:
        raise ValueError(f"an observation shows nothing: {value!r:.100}")
    marks = IMAGE_MARK * len(pictures)
    return Observation(text="\n".join(filter(None, (marks, said))), images=tuple(pictures))


def _without_pictures(value: Any, pictures: list[PixelArray]) -> Any:
    """Moves the pictures of an observation into a list; returns the rest."""
    if isinstance(value, Mapping):
        return {key: _without_pictures(each, pictures) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        rest = [_without_pictures(each, pictures) for each in value]
        return [each for each in rest if each is not None]
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim not in (2, 3):
        return value
    grey = value if value.ndim == 2 else value[..., 0] if value.shape[2] == 1 else None
    found = value if grey is None else np.stack([grey] * 3, axis=-1)
    if not _is_picture(found) or min(found.shape[:2]) < SMALLEST_PICTURE:
        return value
    pictures.append(found)
    return None


def parts_of(observation: Any) -> list[Part]:
    """Returns text and pictures of an observation, as `as_observation` takes it, in order."""
    shown = as_observation(observation)
    parts: list[Part] = []
    images = iter(shown["images"])
    for position, text in enumerate(shown["text"].split(IMAGE_MARK)):
        if position:
            parts.append(np.asarray(next(images)))
        if text:
            parts.append(text)
    return parts


def succeeded(info: Mapping[str, Any], total: float, *, least: float | None = None) -> bool:
    """Whether an episode succeeded.

    Args:
        info: of its last step. The environment's own word counts: ``success``, or else
            ``is_success`` as in Gymnasium-Robotics; None is no word.
        total: sum of its rewards.
        least: the sum from which it is a success without such a word; None for more than 0.

    Raises:
        EnvironmentCodeError: its word is neither true nor false.
    """
    for word in ("success", "is_success"):
        given = info.get(word)
        if given is None:
            continue
        with suppress(AttributeError, TypeError, ValueError, RuntimeError):
            given = given.item()  # of an array or tensor of one value
        if not is_verdict(given):
            shown = " ".join(repr(given).split())
            raise EnvironmentCodeError(
                f"the environment's info has {word}={shown:.80}, which is neither True nor "
                "False.\nPut True or False there, or leave it out: then the rewards' sum decides."
            )
        return bool(given)
    return total > 0 if least is None else total >= least


def _is_picture(value: Any) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and value.ndim == 3
        and value.shape[2] == 3
        and value.size > 0
    )
