"""Observations of Gymnasium environments in words, and pictures in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from gymnasium import spaces

SMALLEST_PICTURE = 32
"""Arrays with a shorter side (MiniGrid's 7 x 7 x 3) encode something else than a picture."""

_COLOURS = ("grey", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
"""In the order of a terminal's codes: red is 1, green 2, blue 4, and the others their sums."""

_ESCAPE = re.compile(r"\x1b\[([0-9;:]*)m")
_OTHER_ESCAPES = re.compile(
    r"\x1b(?:\[(?![0-9;:]*m)[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]+[0-~])"
)
"""Of the cursor, links and titles, character sets."""

_OPERANDS = {"5": 1, "2": 3}
"""Numbers that describe a colour after 38, 48 or 58: one of a table, or red, green and blue."""


def in_words(value: Any, most: int, names: Sequence[str] = ()) -> str:
    """Returns an observation as text; empty if there is nothing to say.

    Args:
        value: the observation.
        most: parts (entries of a dictionary, or the whole) of more values are left out.
        names: of the entries of a vector or tuple.
    """
    if value is None or (count_values(value) > most and not isinstance(value, Mapping)):
        return ""
    if isinstance(value, Mapping):
        parts = {key: in_words(each, most) for key, each in value.items()}
        return "\n".join(f"{key}: {_indented(text)}" for key, text in parts.items() if text)
    if names and len(names) == len(value):
        return "\n".join(f"{name}: {_plain(each)}" for name, each in zip(names, value, strict=True))
    return _plain(value)


def can_say(space: spaces.Space[Any], most: int) -> bool:
    """Whether `in_words` says something of an observation of this space."""
    if isinstance(space, spaces.Dict):
        return any(can_say(each, most) for each in space.values())
    if isinstance(space, spaces.Tuple):
        return all(can_say(each, most) for each in space.spaces)
    if isinstance(space, spaces.OneOf):
        return any(can_say(each, most) for each in space.spaces)
    if isinstance(space, (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)):
        return 0 < int(np.prod(space.shape)) <= most
    if space.dtype is not None and space.dtype.kind == "U":  # a text space of somebody's own
        return True
    return isinstance(space, (spaces.Discrete, spaces.Text, spaces.Sequence))


def find_picture(space: spaces.Space[Any]) -> tuple[str, ...] | None:
    """Returns where an observation holds a picture, as keys of dictionaries; None for nowhere."""
    if isinstance(space, spaces.Dict):
        for key, each in space.items():
            inner = find_picture(each)
            if inner is not None:
                return (key, *inner)
    if isinstance(space, spaces.Box) and space.dtype == np.uint8:
        *sides, last = (*space.shape, 1) if len(space.shape) == 2 else space.shape or (0,)
        if len(sides) == 2 and last in (1, 3) and min(sides) >= SMALLEST_PICTURE:
            return ()
    return None


def coloured_in_words(text: str) -> str:
    """Replaces the colours of a terminal's text by words: ``[red S]FFF``.

    Environments that are drawn as text mark by colour alone where the player is.
    """
    said: list[str] = []
    colours: dict[int, str] = {}
    parts = _ESCAPE.split(_OTHER_ESCAPES.sub("", text))
    for position, part in enumerate(parts):
        if position % 2:
            _set_colours(part, colours)
        elif part and colours:
            said.append(f"[{f'{[*colours.values()][-1]} {part}'.strip()}]")
        else:
            said.append(part)
    return "".join(said).strip("\n")


def _set_colours(codes: str, colours: dict[int, str]) -> None:
    """Sets the colours of the text (3) and behind it (4), the last one last, as an escape does."""
    left = iter(codes.split(";"))
    for code in left:
        first, *operands = code.split(":")
        if first in ("38", "48", "58") and not operands:
            operands = [next(left, "")]
            operands += islice(left, _OPERANDS.get(operands[0], 0))
        tens, last = divmod(int(first or 0), 10)
        if tens == last == 0:
            colours.clear()
        elif tens in (3, 4, 9, 10):  # 90 to 107 are the bright ones
            colours.pop(tens % 6, None)
            name = _COLOURS[last] if last < 8 else _nearest(operands) if last == 8 else ""
            if name:
                colours[tens % 6] = name


def _nearest(operands: Sequence[str]) -> str:
    """Returns the name for a colour of the table (5) or of three values (2); empty for neither."""
    kind, *values = [int(each or 0) for each in operands or ("",)]
    if kind == 5 and values and values[0] < 16:
        return _COLOURS[values[0] % 8]
    if kind == 5 and values and values[0] < 232:
        cube = (values[0] - 16) // 36, (values[0] - 16) // 6 % 6, (values[0] - 16) % 6
        values = [55 + 40 * each if each else 0 for each in cube]
    elif kind == 5 and values:
        values = [8 + 10 * (values[0] - 232)] * 3
    elif kind == 2 and len(values) >= 3:
        values = values[len(values) > 3 :][:3]  # with colons, a colour space may come first
    else:
        return ""
    low, high = min(values), max(values)
    if high - low < 50:
        return "white" if high >= 170 else "grey"
    return _COLOURS[sum(1 << bit for bit, each in enumerate(values) if 2 * each > low + high)]


def count_values(value: Any) -> int:
    """Returns the number of values in an observation."""
    if isinstance(value, Mapping):
        return sum(map(count_values, value.values()))
    if isinstance(value, (tuple, list)):
        return sum(map(count_values, value))
    return int(value.size) if isinstance(value, np.ndarray) else 1


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) + "}"
    if isinstance(value, np.ndarray):
        value = list(value) if value.ndim else value[()]
    if isinstance(value, np.floating):
        value = float(str(value))  # 0.1, not the float32's 0.10000000149
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if not isinstance(value, float):
        return str(value)
    if abs(value) < 1:
        return f"{value:.4g}"
    if abs(value) < 1e11:  # prices, coordinates, counters
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return repr(value).removesuffix(".0")


def _indented(text: str) -> str:
    return "\n" + "\n".join(f"  {line}" for line in text.split("\n")) if "\n" in text else text
