"""The content of ``\\boxed{...}``: in responses, and in the solutions that data sets ship."""

from __future__ import annotations

import re

_BRACE = re.compile(r"[{}]")
_BOX = re.compile(r"\\f?boxed\s*$")


def boxes(text: str) -> list[tuple[int, int, str]]:
    """All complete ``\\boxed{...}`` as (start of the command, end, content), by opening brace."""
    # One pass: a student that repeats itself writes thousands of boxes that never close.
    opened: list[int] = []
    found: list[tuple[int, int, str]] = []
    for match in _BRACE.finditer(text):
        position = match.start()
        if match.group() == "{":
            opened.append(position)
        elif opened:
            start = opened.pop()
            command = _BOX.search(text, max(0, start - 12), start)
            if command is not None:
                found.append((command.start(), position + 1, text[start + 1 : position].strip()))
    return sorted(found)


def extract_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``, braces balanced; None if there is none."""
    found = boxes(text)
    return found[-1][2] if found else None
