"""A hold-out of data that is released without a test split: a fixed part of the rows, by hash.

Pixel-Reasoner's released questions are all training rows. A row is held out if the hash of its
first picture, or of its question if it has none, falls into the first ``share`` of all hashes. So
questions about one picture are on the same side, and neither the order of the rows nor other rows
matter: training and evaluation split the same way without knowing of each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from reopold_agent.errors import ConfigError

PARTS = ("train", "held_out")

HELD_OUT_SHARE = 0.02
"""Share of a data set's pictures that is held out unless the settings say otherwise."""

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
        row: columns ``image`` or ``images`` (paths, bytes, or objects of these), and ``question``,
            ``problem`` or ``prompt``.
        part: ``train``, ``held_out``, or None for all rows.
        share: share of the rows, more exactly of their pictures, that is held out.
    """
    return part is None or (part == "held_out") == (_position(row) < share)


def _position(row: Mapping[str, Any]) -> float:
    """Returns where the row's hash lies, from 0 to 1."""
    shown = row.get("image") or row.get("images")
    if isinstance(shown, Sequence) and not isinstance(shown, (str, bytes)):
        shown = shown[0] if shown else None
    if isinstance(shown, Mapping):
        shown = shown.get("path") or shown.get("image") or shown.get("bytes")
    if isinstance(shown, bytes):
        key = shown
    elif isinstance(shown, str) and shown:
        key = shown.removeprefix("./").encode()
    else:
        words = row.get("question") or row.get("problem") or row.get("prompt")
        key = json.dumps(words, sort_keys=True, default=str).encode()
    digest = hashlib.sha256(_SEED.encode() + b"\0" + key).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
