"""The content of ``\\boxed{...}``: in responses, and in the solutions that data sets ship."""

from __future__ import annotations

import re
from typing import NamedTuple

_BRACE = re.compile(r"[{}]")
_BOX = re.compile(r"\\f?boxed\s*$")


class Box(NamedTuple):
    """Where a box is in its text: its command from ``start`` to ``end``, its content from ``inner``
    to the last brace. The content is not kept: boxes in boxes would hold it many times."""

    start: int
    end: int
    inner: int

    def content(self, text: str) -> str:
        """What is in the box."""
        return text[self.inner : self.end - 1].strip()


def boxes(text: str) -> list[Box]:
    """All complete ``\\boxed{...}``, by opening brace."""
    # One pass: a student that repeats itself writes thousands of boxes that never close.
    opened: list[int] = []
    found: list[Box] = []
    for match in _BRACE.finditer(text):
        position = match.start()
        if match.group() == "{":
            opened.append(position)
        elif opened:
            start = opened.pop()
            command = _BOX.search(text, max(0, start - 12), start)
            if command is not None:
                found.append(Box(command.start(), position + 1, start + 1))
    return sorted(found)


def extract_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``, braces balanced; None if there is none."""
    found = boxes(text)
    return found[-1].content(text) if found else None
