"""A hold-out of data that is released without a test split: a fixed part of the rows, by hash.

Pixel-Reasoner's released questions are all training rows. A row is held out if the hash of its
first picture, or of its question if it has none, falls into the first ``share`` of all hashes. The
picture's bytes are hashed if the row has them, or else its name. So questions about one picture are
on the same side, and neither the order of the rows nor other rows matter: training and evaluation
split the same way without knowing of each other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from reopold_agent.data.checks import RowError
from reopold_agent.data.pictures import INSIDE, as_list, given_pictures
from reopold_agent.errors import ConfigError

PARTS = ("train", "held_out")

HELD_OUT_SHARE = 0.02
"""Share of a data set's pictures that is held out unless the settings say otherwise."""

_USUAL = 0.2
"""Share that is proposed where one part has no rows, if both parts then have some."""

_SEED = "reopold-agent hold-out 0"


def check_part(part: str | None, share: float) -> None:
    """Checks the settings of a hold-out.

    Raises:
        ConfigError: there is no such part, or the share is not between 0 and 1.
    """
    if part is not None and part not in PARTS:
        raise ConfigError(f"part must be 'train', 'held_out' or null (all rows), got '{part}'")
    if not 0 < share < 1:
        raise ConfigError(f"held_out_share must be between 0 and 1, got {share}")


def in_part(row: Mapping[str, Any], part: str | None, share: float) -> bool:
    """Returns whether a row belongs to a part.

    Args:
        row: its columns.
        part: ``train``, ``held_out``, or None for all rows.
        share: share of the rows, more exactly of their pictures, that is held out.
    """
    return part is None or (part == "held_out") == (position(row) < share)


def position(row: Mapping[str, Any]) -> float:
    """Returns where the row's hash lies, from 0 to 1: it is held out below the share."""
    key = next(filter(None, map(_stored, _shown(row))), None)
    if key is None:
        words = row.get("question") or row.get("problem") or row.get("prompt")
        key = json.dumps(words, sort_keys=True, default=str).encode()
    digest = hashlib.sha256(_SEED.encode() + b"\0" + key).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def share_between(positions: Collection[float]) -> float | None:
    """Returns a share with rows on both sides; None if all rows are at one position."""
    places = sorted(set(positions))
    if len(places) < 2:
        return None
    low, high = places[:2] if places[0] >= _USUAL else places[-2:]
    shares = (math.floor(high * 10**digits) / 10**digits for digits in range(1, 18))
    return next((share for share in (_USUAL, *shares) if low < share <= high), high)


def _shown(row: Mapping[str, Any]) -> Iterator[Any]:
    """Yields a row's pictures under the names that the reader knows, the first one first.

    ``image`` and ``images`` come before the others, by which earlier versions split.
    """
    shown = row.get("image") or row.get("images")
    if isinstance(shown, Sequence) and not isinstance(shown, (str, bytes)):
        shown = shown[0] if shown else None
    yield shown
    yield from _given(row)
    for message in _objects(row.get("prompt")):
        yield from _given(message)
        for part in _objects(message.get("content")):
            yield from _given(part) or (part,)


def _given(group: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        return given_pictures(group).values
    except RowError:  # the reader refuses the row
        return ()


def _objects(value: Any) -> list[Mapping[str, Any]]:
    value = as_list(value)
    listed = value if isinstance(value, (list, tuple)) else ()
    return [each for each in listed if isinstance(each, Mapping)]


def _stored(picture: Any) -> bytes | None:
    """Returns a picture's bytes, or else its name; None if there is neither."""
    while isinstance(picture, Mapping):
        picture = next((picture[name] for name in INSIDE if picture.get(name)), None)
    if isinstance(picture, str):
        return picture.removeprefix("./").encode("utf-8", "replace")
    return picture if isinstance(picture, bytes) else None
