"""Compares dates: "July 4, 1776" and "4th of July 1776", "Jan" and "January", "2015-16"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reopold_agent.judges.text import plain_text

_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september",
           "october", "november", "december")  # fmt: skip
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_NUMBERS = {
    **{name: number for number, month in enumerate(_MONTHS, 1) for name in (month, month[:3])},
    "sept": 9,
}
_WEEKDAYS = {
    **{name: number for number, day in enumerate(_DAYS) for name in (day, day[:3])},
    "tues": 1,
    "thur": 3,
    "thurs": 3,
}
_MONTH = rf"(?P<month>{'|'.join(sorted(_NUMBERS, key=len, reverse=True))})\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>[12]\d{3})"
_WEEKDAY = rf"(?P<weekday>{'|'.join(sorted(_WEEKDAYS, key=len, reverse=True))})\.?"
_FORMS = tuple(
    re.compile(rf"(?:on\s+|in\s+)?(?:the\s+)?{form}", re.IGNORECASE)
    for form in (
        rf"(?:{_WEEKDAY},?\s+)?{_MONTH}\s+(?:the\s+)?{_DAY}(?:(?:\s*,\s*|\s+){_YEAR})?",
        rf"(?:{_WEEKDAY},?\s+)?(?:the\s+)?{_DAY}\s*(?:of\s+|-)?{_MONTH}(?:\s*[-,]?\s*{_YEAR})?",
        rf"{_MONTH},?\s+(?:of\s+)?{_YEAR}",
        rf"{_YEAR}(?P<mark>[-/.])(?P<number>\d{{1,2}})(?P=mark){_DAY}",
        _MONTH,
        _WEEKDAY,
    )
)
_MAYBE = re.compile(
    rf"[12]\d{{3}}|{'|'.join(name for name in (*_NUMBERS, *_WEEKDAYS) if len(name) == 3)}",
    re.IGNORECASE,
)
_YEARS = re.compile(r"([12]\d)(\d\d)\s*(?:[-\N{EN DASH}\N{EM DASH}/]|to)\s*(?:([12]\d))?(\d\d)")


@dataclass(frozen=True)
class _Date:
    """What a date says; None where it says nothing."""

    year: int | None
    month: int | None
    day: int | None
    weekday: int | None


def same_date(answer: str, expected: str) -> bool | None:
    """Returns whether two dates, or two ranges of years, are the same.

    Args:
        answer, expected: the two.

    Returns:
        None if they are not both such, or one says less than the other ("July 4"); for two ranges
        of years that differ too.
    """
    if not (_MAYBE.search(expected) and _MAYBE.search(answer)):
        return None
    mine, wanted = _years(answer), _years(expected)
    if mine is not None and wanted is not None:
        return True if mine == wanted else None
    first, second = _read(answer), _read(expected)
    if first is None or second is None:
        return None
    said = [(getattr(first, name), getattr(second, name)) for name in ("year", "month", "day")]
    if any((one is None) != (other is None) for one, other in said):
        return None
    weekdays = {first.weekday, second.weekday} - {None}
    return all(one == other for one, other in said) and len(weekdays) <= 1


def _read(text: str) -> _Date | None:
    plain = " ".join(plain_text(text).split()).strip(" .,;$*\"'")
    found = next((match for form in _FORMS if (match := form.fullmatch(plain))), None)
    if found is None:
        return None
    parts = {name: part for name, part in found.groupdict().items() if part is not None}
    month = _NUMBERS[parts["month"].lower()] if "month" in parts else None
    if "number" in parts:
        month = int(parts["number"])
    day = int(parts["day"]) if "day" in parts else None
    if not 1 <= (month or 1) <= 12 or not 1 <= (day or 1) <= 31:
        return None
    weekday = _WEEKDAYS[parts["weekday"].lower()] if "weekday" in parts else None
    year = int(parts["year"]) if "year" in parts else None
    return _Date(year, month, day, weekday)


def _years(text: str) -> tuple[str, str] | None:
    """Returns first and last of a range of years: "2015-16" is 2015 to 2016."""
    found = _YEARS.fullmatch(plain_text(text).strip(" .$"))
    if found is None or (found[3] is None and found[4] <= found[2]):  # "2015-10" is a month
        return None
    return found[1] + found[2], (found[3] or found[1]) + found[4]
