"""Writing values as strict JSON, and files so that a kill never leaves half of one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np


def to_json(value: Any) -> Any:
    """Turns any value into one that strict JSON can hold. Never raises for odd values.

    NaN and the infinities become null: JSON has no word for them, and the non-standard ``NaN``
    that Python would write breaks JavaScript, jq, DuckDB and pandas' own fast reader. NumPy and
    torch scalars and arrays become numbers and lists, enums their value, dataclasses and mappings
    objects with string keys, sets sorted lists, and anything else its ``str``.
    """
    if isinstance(value, Enum):
        return to_json(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_json(item) for item in value), key=str)
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    # torch is not imported here; its tensors have NumPy's method.
    plain = getattr(value, "tolist", None)
    if callable(plain) and not isinstance(value, np.generic | type):
        return to_json(plain())
    return str(value)


def _key(key: Any) -> str:
    return str(key.value if isinstance(key, Enum) else key)


def dump_json(value: Any, *, indent: int | None = None) -> bytes:
    """Strict JSON as UTF-8, after `to_json`; without ``indent`` it has no line break."""
    plain = to_json(value)
    try:
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=indent)
        return text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair: legal in JSON only as an escape
        return json.dumps(plain, allow_nan=False, indent=indent).encode("ascii")


def write_bytes_atomic(path: Path, data: bytes, *, flush: bool = True) -> None:
    """Replaces the file at once: a reader or a kill sees the old content or the new.

    The temporary file lies beside it (a rename does not cross file systems). With ``flush`` it is
    flushed to disk before the rename, so that not even a power cut can leave an empty file under
    the name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            if flush:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """`write_bytes_atomic` for text, as UTF-8."""
    write_bytes_atomic(Path(path), text.encode("utf-8"))


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Writes an indented, strict JSON file at once (see `to_json` for odd values)."""
    write_bytes_atomic(Path(path), dump_json(value, indent=2) + b"\n")
