"""The protocol between this process and a tool's: JSON and raw pixels of bounded size.

There is no pickle, because unpickling runs code of the sender. A frame is two lengths (32 and 64
bits, big-endian), a JSON object in UTF-8, and the pixels of the pictures: rows of RGB bytes, whose
sizes the JSON states. A picture is sent in bands of rows, so that neither side holds a second copy.
"""

from __future__ import annotations

import itertools
import json
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from reopold_agent.tools.base import MAX_PIXELS

HEADER = struct.Struct(">IQ")

MAX_JSON = 16 << 20
"""Most bytes of a frame's JSON."""

BAND_PIXELS = 1 << 21
"""Pixels of a band (6 MB)."""

Size = tuple[int, int]


class WireError(Exception):
    """The received bytes are not a frame, or the frame is too large."""


def frame(message: dict[str, Any], pictures: Sequence[Image.Image] = ()) -> Iterator[bytes]:
    """Yields the pieces of a frame; adds the pictures' ``sizes`` to the message.

    Raises:
        WireError: the message is longer than `MAX_JSON`.
    """
    sizes = [image.size for image in pictures]
    text = json.dumps({**message, "sizes": sizes}).encode()
    if len(text) > MAX_JSON:
        raise WireError(f"a message of {len(text)} bytes; the most is {MAX_JSON}")
    yield HEADER.pack(len(text), sum(3 * w * h for w, h in sizes)) + text
    for image in pictures:
        for top, bottom in _bands(image.size):
            whole = (top, bottom) == (0, image.height)
            part = image if whole else image.crop((0, top, image.width, bottom))
            yield part.tobytes()


def read_frame(
    read: Callable[[int], bytes | bytearray],
) -> tuple[dict[str, Any], tuple[Image.Image, ...]]:
    """Reads a frame from a stream.

    Args:
        read: returns exactly so many bytes, or raises.

    Returns:
        The message without ``sizes``, and the pictures, RGB.

    Raises:
        WireError: the bytes are not a frame.
    """
    length, pixels = HEADER.unpack(read(HEADER.size))
    if length > MAX_JSON or pixels > 3 * MAX_PIXELS:
        raise WireError(f"a frame of {length} and {pixels} bytes")
    try:
        message = json.loads(read(length))
    except (ValueError, RecursionError) as error:
        raise WireError(f"invalid JSON: {type(error).__name__}") from None
    if not isinstance(message, dict):
        raise WireError("not a JSON object")
    sizes = [_size(each) for each in as_list(message.pop("sizes", None))]
    if sum(3 * w * h for w, h in sizes) != pixels:
        raise WireError("pixels that do not fit the sizes")
    return message, tuple(_picture(size, read) for size in sizes)


def as_list(value: object) -> list[Any]:
    """Returns the value if it is a list.

    Raises:
        WireError: it is not a list.
    """
    if not isinstance(value, list):
        raise WireError("a list is missing")
    return value


def plain(value: object, where: str) -> Any:
    """Returns the value if JSON can hold it without a change.

    Raises:
        ValueError: it cannot; the message names the first such place.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(each, f"{where}['{key}']") for key, each in value.items()}
    kind = (
        "a dict with other keys than strings" if isinstance(value, dict) else type(value).__name__
    )
    raise ValueError(f"{where} is {kind}; use None, bool, int, float, str, list or dict")


class PictureKeys:
    """Unique numbers for picture objects; a number is never used again."""

    def __init__(self) -> None:
        self._next = itertools.count()
        self._known: dict[int, tuple[weakref.ref[Image.Image], int]] = {}
        self._lock = threading.RLock()  # a weak reference's callback may run while it is held

    def of(self, image: Image.Image) -> int:
        """Returns the picture's number."""
        place = id(image)
        with self._lock:
            found = self._known.get(place)
            if found is not None and found[0]() is image:
                return found[1]
            key = next(self._next)

            def forget(gone: weakref.ref[Image.Image]) -> None:
                with self._lock:
                    if self._known.get(place, (None,))[0] is gone:
                        del self._known[place]

            self._known[place] = (weakref.ref(image, forget), key)
            return key


def _bands(size: Size) -> Iterable[Size]:
    width, height = size
    step = max(1, BAND_PIXELS // width)
    return ((top, min(height, top + step)) for top in range(0, height, step))


def _size(value: object) -> Size:
    width, height = value if isinstance(value, list) and len(value) == 2 else (0, 0)
    for side in (width, height):
        if type(side) is not int or not 0 < side <= MAX_PIXELS:
            raise WireError("an invalid size of a picture")
    return width, height


def _picture(size: Size, read: Callable[[int], bytes | bytearray]) -> Image.Image:
    width, height = size
    image = None
    for top, bottom in _bands(size):
        band = Image.frombytes("RGB", (width, bottom - top), read(3 * width * (bottom - top)))
        if bottom - top == height:
            return band
        image = Image.new("RGB", size) if image is None else image
        image.paste(band, (0, top))
    assert image is not None, "a size has at least one row"
    return image
