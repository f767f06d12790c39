"""Finds ``\\boxed{...}`` in responses and in the solutions of data sets."""

from __future__ import annotations

import re
from typing import NamedTuple

_BRACE = re.compile(r"[{}]")
_BOX = re.compile(r"\\(?:f?boxed|f(?:rame)?box)\s*$")
_BARE_BOX = re.compile(r"(\\f?boxed)(?:\s+|(?=\d))([-+]?\d[\d.,/]*(?<=\d)|[A-Za-z])(?![\w{])")
_PLACEHOLDER = re.compile(
    r"\W*(?:(?:text|mathrm)\W*)?(?:(?:your|the|final|my)\s+)*(?:answer|result)(?:\s+here)?\W*|\W*",
    re.IGNORECASE,
)
"""The content of a box that a response copied from its prompt, or an empty box."""

_BETWEEN_BOXES = re.compile(
    r"(?:(?!\n\s*\n)[^\w\\{}]|\\[()\[\],;!: ]|\\q?quad"
    r"|\\(?:text|mbox)\s*\{[^{}\n]{0,40}\b(?:and|or)\s*\}|\band\b|\bor\b"
    r"|(?:\b(?:for\s+)?parts?\s*)?\(?\b[a-z1-9]\)"
    r"|(?:\band\b|,)[\s$]*(?:\\\(\s*)?[A-Za-z](?:_\{?\w\}?)?\s*=){0,40}"
)
"""Only separators, no empty line: "\\boxed{1} and \\boxed{2}" is one answer of two parts."""


class Box(NamedTuple):
    """The positions of a box in its text.

    The command reaches from ``start`` to ``end``, the content from ``inner`` to the last brace. The
    content itself is not stored: nested boxes would store it many times.
    """

    start: int
    end: int
    inner: int

    def content(self, text: str) -> str:
        """Returns the content of the box."""
        return text[self.inner : self.end - 1].strip()


def boxes(text: str) -> list[Box]:
    """Returns all complete ``\\boxed{...}``, in order of their start."""
    # In one pass: a student that repeats itself writes thousands of boxes that never close.
    opened: list[int] = []
    found: list[Box] = []
    for match in _BRACE.finditer(text):
        position = match.start()
        if match.group() == "{":
            opened.append(position)
        elif opened:
            start = opened.pop()
            command = _BOX.search(text, max(0, start - 14), start)
            if command is not None:
                found.append(Box(command.start(), position + 1, start + 1))
    return sorted(found)


def extract_boxed(text: str) -> str | None:
    """Returns the content of the last complete ``\\boxed{...}``, or None if there is none."""
    text = _BARE_BOX.sub(r"\1{\2}", text)
    found = boxes(text)
    return found[-1].content(text) if found else None


def boxed_answer(text: str) -> str | None:
    """Returns the last box, joined with preceding ones separated only by commas, "and" or "or"."""
    text = _BARE_BOX.sub(r"\1{\2}", text)
    found = boxes(text)
    if not found:
        return None
    found = [box for box in found if not _PLACEHOLDER.fullmatch(box.content(text))] or found[-1:]
    start = found[-1].start
    parts = [found[-1].content(text)]
    for box in reversed(found[:-1]):
        if box.end > start or not _BETWEEN_BOXES.fullmatch(text, box.end, start):
            break
        start, content = box.start, box.content(text)
        if content != parts[0]:
            parts.insert(0, content)
    return ", ".join(parts)


def open_box(text: str) -> str | None:
    """Returns the content of a last box without a closing brace; for reference answers only.

    In a response such a box was cut off: ``\\boxed{12`` may be the beginning of 123.
    """
    opened = [match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]
    return text[opened[-1] :].strip().rstrip("$").strip() or None if opened else None
