"""Numbers as people write them: separators, percent, currency, units, words, powers of ten."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from reopold_agent.judges.text import latex_plain, trim
from reopold_agent.judges.units import dimension_of, is_unit

_MOST_DIGITS = 200
_MOST_EXPONENT = 400
_SIGNIFICANT = 4
"""A decimal that an exact value rounds to counts as that value from so many digits on."""

_CURRENCY = r"(?:[$€£¥₹₽₩]|(?:us|usd|eur|gbp|rs|inr)\b\.?)"
_DIGITS = (
    r"(?:\d{1,3}(?:,\s?\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:[.,]\d+)?"
    r"|\d+,\d{2}(?!\d)|\d+,\d{4,}|\d+(?:\.\d*)?|\.\d+)"
)
_POWER = (
    r"(?:e([-+]?\d{1,4})(?![\d.])"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d{1,4})\s*\}|([-+]?\d{1,4})))"
)
_NUMBER = re.compile(rf"([-+]?)\s*({_CURRENCY})?\s*([-+]?)\s*({_DIGITS}){_POWER}?", re.IGNORECASE)
_TEN = re.compile(r"([-+]?)10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|(\d{1,2}))")
_PART = r"(?:\{\s*([-+]?\d+(?:\.\d+)?)\s*\}|(\d))"
_FRACTION = re.compile(rf"([-+]?)\s*(\d+\s*|\d+\s+)?\\frac\s*{_PART}\s*{_PART}")
_SLASH = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?([-+]?\d+(?:\.\d*)?)\s*/\s*(\d+(?:\.\d*)?)(?![\d.])")
_PERCENT = re.compile(r"\s*(?:%|percent(?:age)?s?\b|pct\b|per cent\b)", re.IGNORECASE)
_UNIT = re.compile(r"[a-zµμΩ°'\"][\w\s.,/^{}°µμΩ·*()$-]*", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:([ap])\s*\.?\s*m\b\.?)?", re.IGNORECASE)

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * value for value, word in enumerate(_TENS, 2)
}
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


@dataclass(frozen=True)
class Quantity:
    """A number as written.

    Attributes:
        value: exact value of what is written; a percentage is not yet divided by 100.
        inexact: written as a decimal or with a power of ten, so it may be rounded.
        step: value of one unit of its last digit.
        percent: whether a percent sign or word follows.
        unit: what follows the number, normalised; empty if nothing does.
        glued: letters follow without a space ("10m"), which in mathematics is a product.
    """

    value: Fraction
    inexact: bool = False
    step: Fraction = Fraction(1)
    percent: bool = False
    unit: str = ""
    glued: bool = False


def parse_quantity(text: str) -> Quantity | None:
    """Reads a number with what may stand around it; None if the text is more than a number."""
    if len(text) > _MOST_DIGITS:
        return None
    texts = "text" in text or "mbox" in text or "mathrm" in text or "rm" in text
    plain = trim(latex_plain(_spaced_units(text))).replace("~", "")
    if not plain or not any(c.isdigit() for c in plain):
        return _spelled(plain)
    for reader in (_read_fraction, _read_slash, _read_ten, _read_number):
        found = reader(plain)
        if found is None:
            continue
        quantity, rest = found
        return _with_unit(quantity, rest, texts)
    return None


def number_word(text: str) -> str | None:
    """The number that a sentence gives in words, if it gives just one ("one" may be a pronoun)."""
    words = [word for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS]
    return words[0] if len(words) == 1 and words[0] != "one" else None


def parse_time(text: str) -> tuple[int, bool] | None:
    """A time of day in seconds, and whether AM or PM is said."""
    match = _TIME.fullmatch(trim(latex_plain(text)).strip() + ("." if text.endswith(".") else ""))
    match = match or _TIME.fullmatch(trim(latex_plain(text)))
    if match is None:
        return None
    hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
    if minute > 59 or second > 59 or hour > 24 or (match[4] and not 1 <= hour <= 12):
        return None
    if match[4]:
        hour = hour % 12 + (12 if match[4].lower() == "p" else 0)
    return hour * 3600 + minute * 60 + second, bool(match[4])


def same_quantity(
    mine: Quantity,
    wanted: Quantity,
    *,
    tolerance: float | None = None,
    precision: int | None = None,
    count: bool = False,
) -> bool:
    """Whether two numbers are the same answer.

    A percentage equals both its fraction (10% = 0.1) and the bare number (10% = 10, which is what
    "by how many percent" asks for). Units are compared only where both are known and differ.

    Args:
        mine: the response's.
        wanted: the reference's.
        tolerance: relative error that still counts, where a benchmark gives one.
        precision: decimals to round to before comparing, where a benchmark gives them.
        count: exact comparison only.
    """
    if not _units_agree(mine.unit, wanted.unit):
        return False
    scales = [(Fraction(1), Fraction(1))]
    if mine.percent != wanted.percent:
        hundredth = Fraction(1, 100)
        scales.append((hundredth, Fraction(1)) if mine.percent else (Fraction(1), hundredth))
    for left, right in scales:
        a, b = mine.value * left, wanted.value * right
        if a == b:
            return True
        if count:
            continue
        if tolerance is not None and abs(a - b) <= Fraction(tolerance) * abs(b):
            return True
        if precision is not None and (mine.inexact or wanted.inexact):
            if rounded(a, precision) == rounded(b, precision):
                return True
        elif _rounds_to(a, mine, left, b, wanted, right):
            return True
    return False


def rounded(value: Fraction, decimals: int) -> Fraction:
    """Half away from zero, as people round."""
    factor = Fraction(10) ** decimals
    scaled = abs(value) * factor
    whole = (2 * scaled + 1) // 2
    return Fraction(whole if value >= 0 else -whole) / factor


def significant_match(exact: Fraction, written: Fraction, step: Fraction) -> bool:
    """Whether ``written``, given to ``step``, is ``exact`` rounded, with digits enough to tell."""
    if step <= 0 or abs(exact - written) * 2 > step:
        return False
    return bool(abs(written) >= step * 10 ** (_SIGNIFICANT - 1))


def _rounds_to(
    a: Fraction, mine: Quantity, left: Fraction, b: Fraction, wanted: Quantity, right: Fraction
) -> bool:
    # Between two decimals the shorter one may be the longer one rounded; an exact value may be
    # rounded by either side. Two exact values are equal or not.
    a_step, b_step = mine.step * left, wanted.step * right
    if mine.inexact and (not wanted.inexact or b_step < a_step):
        return not _whole(wanted) and significant_match(b, a, a_step)
    if wanted.inexact and (not mine.inexact or a_step < b_step):
        return not _whole(mine) and significant_match(a, b, b_step)
    return False


def _whole(quantity: Quantity) -> bool:
    return not quantity.inexact and quantity.value.denominator == 1


def _units_agree(mine: str, wanted: str) -> bool:
    first, second = dimension_of(mine), dimension_of(wanted)
    return first is None or second is None or first == second


def _spaced_units(text: str) -> str:
    """Sets a text command off from the number before it: "10\\text{cm}" has a unit, not a c."""
    return re.sub(r"(?<=[\d}])\s*(?=\\(?:text|mbox|mathrm|rm|operatorname))", " ", text)


def _decimal(digits: str) -> tuple[Fraction, bool, Fraction] | None:
    digits = digits.replace(" ", "")
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
        digits = digits.replace(",", "")
    elif digits.count(",") == 1 and "." not in digits:
        digits = digits.replace(",", ".")
    if "," in digits:
        return None
    decimals = len(digits.partition(".")[2])
    value = Fraction(Decimal(digits if digits != "." else "0"))
    return value, bool(decimals), Fraction(1, 10**decimals)


def _read_number(plain: str) -> tuple[Quantity, str] | None:
    match = _NUMBER.match(plain)
    if match is None or (match[1] and match[3]):
        return None
    read = _decimal(match[4])
    if read is None:
        return None
    value, inexact, step = read
    exponent = int(match[5] or match[6] or match[7] or 0)
    if abs(exponent) > _MOST_EXPONENT:
        return None
    scale = Fraction(10) ** exponent
    sign = -1 if "-" in (match[1] + match[3]) else 1
    scientific = match[5] is not None or match[6] is not None or match[7] is not None
    rest = plain[match.end() :]
    return Quantity(sign * value * scale, inexact or scientific, step * scale), rest


def _read_ten(plain: str) -> tuple[Quantity, str] | None:
    match = _TEN.match(plain)
    if match is None:
        return None
    value = Fraction(10) ** int(match[2] or match[3])
    return Quantity(-value if match[1] == "-" else value), plain[match.end() :]


def _read_fraction(plain: str) -> tuple[Quantity, str] | None:
    match = _FRACTION.match(plain)
    if match is None:
        return None
    over, under = Fraction(match[3] or match[4]), Fraction(match[5] or match[6])
    return _ratio(match[1], match[2], over, under, plain[match.end() :])


def _read_slash(plain: str) -> tuple[Quantity, str] | None:
    match = _SLASH.match(plain)
    if match is None:
        return None
    over, under = Fraction(match[3].rstrip(".")), Fraction(match[4].rstrip("."))
    return _ratio(match[1], match[2], over, under, plain[match.end() :])


def _ratio(
    sign: str, whole: str | None, over: Fraction, under: Fraction, rest: str
) -> tuple[Quantity, str] | None:
    if under == 0 or (whole and over < 0):
        return None
    value = Fraction(int(whole or 0)) + over / under
    return Quantity(-value if sign == "-" else value), rest


def _with_unit(quantity: Quantity, rest: str, texts: bool) -> Quantity | None:
    """The quantity with what follows it, or None if that makes it more than a quantity."""
    value, inexact, step = quantity.value, quantity.inexact, quantity.step
    percent = False
    if quantity.value.denominator == 1:
        rest = re.sub(r"^(?:st|nd|rd|th)\b", "", rest)
    scale = re.match(r"\s*(hundred|thousand|million|billion|trillion)\b", rest, re.IGNORECASE)
    if scale is not None:
        factor = _SCALES[scale[1].lower()]
        value, step, rest = value * factor, step * factor, rest[scale.end() :]
    mark = _PERCENT.match(rest)
    if mark is not None:
        percent, rest = True, rest[mark.end() :]
    unit = rest.strip(" .$€£¥₹")
    if not unit:
        return Quantity(value, inexact, step, percent)
    if not _UNIT.fullmatch(unit):
        return None
    # "10m" is 10 times m; "10weeks" can only be a word, and "10 m" or "10\text{m}" is a unit.
    glued = not rest[0].isspace() and not texts and unit[0].isalpha()
    if glued and re.match(r"[A-Za-z]{4}|[a-z]{1,2}[23]\b", unit):
        glued = False  # a word, or "m2", which is no way to write a product
    if not is_unit(unit):
        return None
    return Quantity(value, inexact, step, percent, unit, glued)


def _spelled(plain: str) -> Quantity | None:
    """A number in words, perhaps with a noun: "twenty-three", "three red apples", "none"."""
    words = re.findall(r"[a-z]+", plain.lower())
    if not words or len(words) > 12 or re.search(r"[\\^_=<>]", plain):
        return None
    sign = 1
    if words[0] in ("minus", "negative"):
        sign, words = -1, words[1:]
    if words == ["none"] or (words[:1] == ["no"] and len(words) == 2) or words == ["nothing"]:
        return Quantity(Fraction(0), unit=" ".join(words[1:]))
    total = current = 0
    used = 0
    for word in words:
        if word in _WORDS:
            current += _WORDS[word]
        elif word == "hundred" and used:
            current = max(1, current) * 100
        elif word in _SCALES and used:
            total, current = total + max(1, current) * _SCALES[word], 0
        elif word == "and" and used:
            pass
        else:
            break
        used += 1
    if not used or len(words) - used > 3:
        return None
    return Quantity(Fraction(sign * (total + current)), unit=" ".join(words[used:]))
