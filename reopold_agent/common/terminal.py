"""Text for terminals, files and pipes."""

from __future__ import annotations

import math
from typing import IO, Any

from rich.console import Console


def is_terminal(console: Console) -> bool:
    """Whether the console writes to a terminal that can move its cursor."""
    try:
        return console.file.isatty() and not console.is_dumb_terminal
    except ValueError:  # a closed stream
        return False


def write_plain(stream: IO[str], line: str) -> None:
    """Writes a line; characters that the stream cannot encode become "?"."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()


def visible(text: str) -> str:
    """Replaces control characters except line breaks by spaces.

    Text of a model, a tool or a question must not control the terminal.
    """
    text = text.expandtabs(4).replace("\r\n", "\n")
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def duration(value: Any) -> str:
    """Formats seconds as "0:07", "12:30" or "3:05:00", and anything else as "-"."""
    seconds = finite_number(value)
    if seconds is None or seconds < 0:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def finite_number(value: Any) -> float | None:
    """Returns the value as a float, or None if it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
