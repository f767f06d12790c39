"""Grading by rule: the last ``\\boxed{}`` against the acceptable answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_BRACE = re.compile(r"[{}]")
_OPTION = re.compile(r"\(?([a-z])\)?[.:)]?$")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?$")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")


_MAX_NESTING = 8
"""``\\text{}`` in ``\\text{}``: deeper than this is noise, and each level costs a pass."""


@dataclass(frozen=True)
class Verdict:
    """Whether a response is right, and what was taken for its answer (None: no box)."""

    correct: bool
    answer: str | None


def grade(response: str, answers: Sequence[str]) -> Verdict:
    """Grades a response by its last box.

    Args:
        response: the final turn.
        answers: acceptable answers; one match is enough.
    """
    answer = extract_boxed(response)
    if answer is None:
        return Verdict(False, None)
    return Verdict(any(equivalent(answer, each) for each in answers), answer)


def extract_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``, braces balanced; None if there is none."""
    # One pass: a student that repeats itself writes thousands of boxes that never close.
    opened: list[int] = []
    best = (-1, -1)
    for match in _BRACE.finditer(text):
        position = match.start()
        if match.group() == "{":
            opened.append(position)
        elif opened:
            start = opened.pop()
            if start > best[0] and text.endswith("\\boxed", 0, start):
                best = (start, position)
    return None if best[0] < 0 else text[best[0] + 1 : best[1]].strip()


def equivalent(answer: str, expected: str) -> bool:
    """Whether two short answers say the same.

    Case, surrounding punctuation, dollar signs and ``\\text{}`` do not matter; numbers are
    compared by value (7 = 7.0 = 7.00, 1,000 = 1000, 12% = 12 %); an option's letter may carry
    brackets or its text ("B", "(b)", "B. a red car").
    """
    mine, wanted = _normal(answer), _normal(expected)
    if mine == wanted:
        return bool(mine)
    first, second = _value(mine), _value(wanted)
    if first is not None and second is not None:
        return first == second
    option = _OPTION.fullmatch(wanted)
    if option is not None:
        letter = re.match(r"\(?([a-z])(?:[.:)]|\)\s|$)", mine)
        return letter is not None and letter.group(1) == option.group(1)
    return False


def _normal(text: str) -> str:
    for _ in range(_MAX_NESTING):
        previous, text = text, _TEXT_COMMAND.sub(r"\1", text)
        if previous == text:
            break
    text = text.replace("\\%", "%").replace("\\$", "").replace("$", "")
    text = " ".join(text.split()).casefold()
    text = text.strip(" ,;:\"'`").rstrip(" .,;:\"'`")
    # The point of ".5" and the sign of "5!" (120) belong to the number.
    text = text if re.match(r"\.\d", text) else text.lstrip(" .,;:!\"'`")
    return text if re.search(r"\d!$", text) else text.rstrip(" .,;:!\"'`")


def _value(text: str) -> tuple[Decimal, str] | None:
    """A number and its unit sign ("%" or nothing)."""
    unit = "%" if text.endswith("%") else ""
    digits = text.removesuffix("%").strip()
    if _GROUPED.fullmatch(digits):
        digits = digits.replace(",", "")
    if not _NUMBER.fullmatch(digits) or len(digits) > 200:
        return None
    try:
        return Decimal(digits), unit
    except InvalidOperation:
        return None
