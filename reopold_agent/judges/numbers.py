"""Reads and compares numbers: separators, percent, currency, units, words, powers of ten."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Literal, TypeAlias

from reopold_agent.judges.cues import REFUSED
from reopold_agent.judges.text import latex_plain, trim, undelimited
from reopold_agent.judges.units import dimension_of, is_unit, same_unit

_MOST_DIGITS = 200
_MOST_EXPONENT = 400
_SIGNIFICANT = 4
"""A rounded decimal counts as the exact value if it has at least this many significant digits."""

_FLOAT_DIGITS = 10**14
"""A decimal of at least 15 digits is taken for the print of a binary float."""

_CURRENCY = r"(?:(?:us\s?)?\$|[€£¥₹₽₩]|(?:us|usd|eur|gbp|rs|inr)\b\.?)"
_DIGITS = (
    r"(?:[1-9]\d{0,2}(?:,\s?\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:[.,]\d+)?"
    r"|\d+,\d{2}(?!\d)|\d+,\d{4,}|\d+(?:\.\d*)?|\.\d+)"
)
Precision: TypeAlias = 'int | Literal["whole"]'
"""Decimals to round to; ``whole`` cuts them off."""

_POWER = (
    r"(?:e([-+]?\d{1,4})(?![\d.])"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d{1,4})\s*\}|([-+]?\d{1,4})))"
)
_NUMBER = re.compile(rf"([-+]?)\s*({_CURRENCY})?\s*([-+]?)\s*({_DIGITS}){_POWER}?", re.IGNORECASE)
_POINTS = re.compile(
    r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+(?=,)|\d{1,3}(?:\.\d{3}){2,})((?:,\d+)?)(?![\d.,])"
)
"""Points between thousands, where they cannot be decimals: "1.000,99" and "1.000.000"."""

_WITH_COMMA = re.compile(
    r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+|\d+)(?:\{?,\}?(\d+))?(?![.,]?\d)(?!\{?,\}?\d)"
)
"""A number with a decimal comma, or with points between thousands."""

_CHINESE = re.compile(r"[零一二两三四五六七八九十百千万亿]+(?=$|分之|[个只匹头条张名人位元岁年米])")
_ABOUT = re.compile("十?(?:一二|一两|两三|二三|三四|四五|五六|六七|七八|八九)[十百千万]?")
""" "三四个" are three or four."""

_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_PARTS_OF = re.compile(r"(\d+)\s*分之\s*(\d+)")
"""The Chinese fraction: "5分之3" is three fifths."""

_REPEATING = re.compile(
    r"([-+]?)(\d*)\.(\d*)(?:\\(?:overline|bar|overset\{\.\})|\\dot)\s*\{?(\d{1,20})\}?"
)
_DOTTED = re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
"""Dots over the first and the last digit that repeat."""

_ORDINAL = re.compile(r"(?<=\d)\s*\^\s*\{?\s*(?:\\(?:mathrm|text)\s*\{)?(?:st|nd|rd|th)\}{0,2}\Z")
_BRACKETED = re.compile(r"(?<=\d)\.(\d*)\((\d{1,20})\)(?!\d)")
_ELLIPSIS = re.compile(r"(?<=\d)(?:\.{3,}|…|\s*\\[lc]?dots\b)")
_CONTINUED = re.compile(r"([-+]?)(\d*)\.(\d+)\\dots(?!\s*[\d+*])")
_REPEATS = re.compile(r"(\d*?)(\d+?)\2+\Z")
_TEN = re.compile(r"([-+]?)10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|(\d{1,2}))")
_PART = r"(?:\{\s*([-+]?\d+(?:\.\d+)?)\s*\}|(\d))"
_FRACTION = re.compile(rf"([-+]?)\s*(\d+\s*|\d+\s+)?\\frac\s*{_PART}\s*{_PART}")
_SLASH = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?([-+]?\d+(?:\.\d*)?)\s*/\s*(\d+(?:\.\d*)?)(?![\d.])")
_PERCENT = re.compile(r"\s*(?:%|percent(?:age)?s?\b|pct\b|per cent\b)", re.IGNORECASE)
_UNIT = re.compile(r"[a-zµμΩ°'\"][\w\s.,/^{}°µμΩ·*()$-]*", re.IGNORECASE)
_ABBREVIATION = re.compile(r"\b([a-z])\.([a-z])\b\.?", re.IGNORECASE)
_TIME = re.compile(
    r"(\d{1,2})(?::|\.(?=\d\d\s*[ap]\.?\s*m))(\d{2})(?::(\d{2}))?"
    r"\s*(?:([ap])\s*\.?\s*m\b\.?)?",
    re.IGNORECASE,
)

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
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}

SCALE_WORD = rf"(?:{'|'.join(_SCALES)})s?"
"""Pattern of a word for a scale: "hundred", "dozens"."""

_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_NUMERALS = {*_WORDS, *_SCALES}
_LETTERS = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion"}
_SCALE_LETTER = re.compile(r"\s*([kt]|[mbt]n?)\b", re.IGNORECASE)
_WITH_LETTER = re.compile(r"(\W*\d[\d.,]*)\s*(k|K|M|mn|Mn|B|bn|Bn)")


@dataclass(frozen=True)
class Quantity:
    """A number as written.

    Attributes:
        value: the exact value as written; a percentage is not divided by 100.
        inexact: written as a decimal or with a power of ten, so it may be rounded.
        step: value of one unit in the last digit.
        percent: whether a percent sign or word follows.
        unit: currency and normalised text after the number; may be empty.
        glued: letters follow without a space ("10m"), which in mathematics is a product.
    """

    value: Fraction
    inexact: bool = False
    step: Fraction = Fraction(1)
    percent: bool = False
    unit: str = ""
    glued: bool = False


@lru_cache(maxsize=1024)  # one comparison reads the same text several times
def parse_quantity(text: str) -> Quantity | None:
    """Reads a number with currency, percent or unit; None if the text is anything else."""
    if len(text) > _MOST_DIGITS:
        return None
    text = _CHINESE.sub(_chinese_digits, text)
    text = _PARTS_OF.sub(r"\2/\1", text)
    text = _DOTTED.sub(r"\\overline{\1\2\3}", _ORDINAL.sub("", undelimited(text)))
    text = marked_ellipsis(_BRACKETED.sub(r".\1\\overline{\2}", text))
    texts = "text" in text or "mbox" in text or "mathrm" in text or "rm" in text
    plain = trim(latex_plain(_spaced_units(text))).replace("~", "")
    if not plain or not any(c.isdigit() for c in plain):
        return _spelled(plain)
    plain = _POINTS.sub(lambda match: match[1].replace(".", "") + match[2].replace(",", "."), plain)
    for reader in (
        _read_repeating,
        _read_continued,
        _read_fraction,
        _read_slash,
        _read_ten,
        _read_number,
    ):
        found = reader(plain)
        if found is None:
            continue
        quantity, rest = found
        return _with_unit(quantity, rest, texts)
    return None


def marked_ellipsis(text: str) -> str:
    """Writes the points after digits that go on as a command, which is not punctuation."""
    return _ELLIPSIS.sub(r"\\dots", text)


def with_decimal_points(text: str) -> str | None:
    """Returns a text with "3,5" as "3.5" and "1.234" as "1234"; None if it has no such number.

    A comma in brackets stands between two numbers, unless semicolons do.
    """
    if re.search(r"[()\[\]]|\\[{l]", text) and ";" not in text:
        return None

    def read(match: re.Match[str]) -> str:
        return match[1].replace(".", "") + (f".{match[2]}" if match[2] else "")

    changed = _WITH_COMMA.sub(read, text)
    return None if changed == text else changed


def _chinese_digits(match: re.Match[str]) -> str:
    if _ABOUT.fullmatch(match.group()):
        return match.group()
    total = part = digit = 0
    for character in match.group():
        if character in "万亿":
            total, part, digit = (total + part + digit) * _CHINESE_UNITS[character], 0, 0
        elif character in _CHINESE_UNITS:
            part, digit = part + max(1, digit) * _CHINESE_UNITS[character], 0
        else:
            digit = 10 * digit + "零一二三四五六七八九".find(character.replace("两", "二"))
    return str(total + part + digit)


def with_scale_word(text: str) -> str:
    """Returns a text with "5M" as "5 million"; other texts as they are."""
    scale = _WITH_LETTER.fullmatch(text)
    return f"{scale[1]} {_LETTERS[scale[2][0].lower()]}" if scale else text


def number_word(text: str) -> str | None:
    """Returns the only number word in a sentence, else None ("one" may be a pronoun)."""
    words = [w for w in re.findall(r"[a-z]+", text.lower()) if w.removesuffix("s") in _NUMERALS]
    return words[0] if len(words) == 1 and words[0] in _WORDS and words[0] != "one" else None


def parse_time(text: str) -> tuple[int, bool] | None:
    """Reads a time of day: seconds since midnight, and whether AM or PM is given."""
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


def same_time(mine: tuple[int, bool], wanted: tuple[int, bool]) -> bool:
    """Returns whether two times of `parse_time` are equal: 4:30 also 4:30 PM, but not 16:30."""
    half = 12 * 3600
    one_is_said = mine[1] != wanted[1]
    plain = wanted[0] if mine[1] else mine[0]
    if one_is_said and 3600 <= plain < half + 3600:  # as a clock shows it, from 1 to 12
        return (mine[0] - wanted[0]) % half == 0
    return mine[0] == wanted[0]


def same_quantity(
    mine: Quantity,
    wanted: Quantity,
    *,
    tolerance: float | None = None,
    precision: Precision | None = None,
    count: bool = False,
) -> bool:
    """Returns whether two numbers are the same answer.

    A percentage equals both its fraction (10% = 0.1) and the bare number (10% = 10, the answer to
    "by how many percent"). Words or signs of both sides must mean the same (see `same_unit`).

    Args:
        mine: the response's number.
        wanted: the reference's number.
        tolerance: allowed relative error, if the benchmark defines one.
        precision: decimals to round to before comparing, if the benchmark defines them, or
            ``whole`` (`rounded`).
        count: compare exactly.
    """
    if not _units_agree(mine, wanted):
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
        if _noise(a, mine.step * left, b) or _noise(b, wanted.step * right, a):
            return True
        if tolerance is not None and abs(a - b) <= Fraction(tolerance) * abs(b):
            return True
        if precision is not None and (mine.inexact or wanted.inexact):
            if rounded(a, precision) == rounded(b, precision):
                return True
        elif _rounds_to(a, mine, left, b, wanted, right):
            return True
    return False


def rounded(value: Fraction, precision: Precision) -> Fraction:
    """Rounds a number as Python rounds floats: 1.25 is 1.2, and 2.675, a little less, 2.67.

    Benchmarks' scripts do so. ``whole`` cuts decimals off, as ``int(float(...))`` does.
    """
    if precision == "whole":
        return Fraction(int(value))
    try:
        return Fraction(str(round(float(value), precision)))
    except OverflowError:
        return value


def significant_match(exact: Fraction, written: Fraction, step: Fraction) -> bool:
    """Returns whether ``written`` is ``exact`` rounded to ``step``, with enough digits to tell."""
    if step <= 0 or abs(exact - written) * 2 > step:
        return False
    return bool(abs(written) >= step * 10 ** (_SIGNIFICANT - 1))


def _noise(written: Fraction, step: Fraction, value: Fraction) -> bool:
    """Returns whether a decimal is another value with a binary float's noise: 0.1 + 0.2 is 0.3.

    It must have decimals, and digits as nobody writes them; 1e-14 is the noise of some operations.
    """
    digits = abs(written) / step if 0 < step < 1 else 0
    return digits >= _FLOAT_DIGITS and abs(written - value) < abs(value) * Fraction(1, 10**14)


def _rounds_to(
    a: Fraction, mine: Quantity, left: Fraction, b: Fraction, wanted: Quantity, right: Fraction
) -> bool:
    # Of two decimals, the shorter one may be the longer one rounded; an exact value may be rounded
    # on either side. Two exact values must be equal.
    a_step, b_step = mine.step * left, wanted.step * right
    if mine.inexact and (not wanted.inexact or b_step < a_step):
        return not _whole(wanted) and significant_match(b, a, a_step)
    if wanted.inexact and (not mine.inexact or a_step < b_step):
        return not _whole(mine) and significant_match(a, b, b_step)
    return False


def _whole(quantity: Quantity) -> bool:
    return not quantity.inexact and quantity.value.denominator == 1


def same_but_for_words(mine: Quantity, wanted: Quantity, *, tolerance: float | None = None) -> bool:
    """Returns whether only words or signs differ, which may mean the same: "5 h", "5 Std."."""
    bare, other = (replace(each, unit="") for each in (mine, wanted))
    return _units_agree(mine, wanted) is None and same_quantity(bare, other, tolerance=tolerance)


def _units_agree(mine: Quantity, wanted: Quantity) -> bool | None:
    first, second = ("%" * each.percent + " " + each.unit for each in (mine, wanted))
    return same_unit(first.strip(), second.strip())


def _spaced_units(text: str) -> str:
    """Separates text commands from the number before them: "10\\text{cm}" has a unit."""
    return re.sub(r"(?<=[\d}])\s*(?=\\(?:text|mbox|mathrm|rm|operatorname))", " ", text)


def _decimal(digits: str) -> tuple[Fraction, bool, Fraction] | None:
    digits = digits.replace(" ", "")
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", digits):
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
    unit = (match[2] or "").lower().strip(".")
    unit = "dollar" if "$" in unit else unit
    return Quantity(sign * value * scale, inexact or scientific, step * scale, unit=unit), rest


def _read_repeating(plain: str) -> tuple[Quantity, str] | None:
    match = _REPEATING.match(plain)
    if match is None:
        return None
    whole, fixed, repeated = match[2] or "0", match[3], match[4]
    value = int(whole) + Fraction(int(fixed or 0), 10 ** len(fixed))
    value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return Quantity(-value if match[1] == "-" else value), plain[match.end() :]


def _read_continued(plain: str) -> tuple[Quantity, str] | None:
    """Reads digits that go on: 0.333... is a third, 3.1415... is only cut off."""
    match = _CONTINUED.match(plain)
    if match is None:
        return None
    sign, whole, digits = match[1], match[2] or "0", match[3]
    rest = plain[match.end() :]
    repeats = _REPEATS.fullmatch(digits)
    if repeats is not None and len(digits) - len(repeats[1]) >= 3:
        return _read_repeating(f"{sign}{whole}.{repeats[1]}\\overline{{{repeats[2]}}}{rest}")
    value = Fraction(f"{whole}.{digits}")
    # Cut off, not rounded: the exact value is up to one unit of the last digit away.
    step = Fraction(2, 10 ** len(digits))
    return Quantity(-value if sign == "-" else value, True, step), rest


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
    """Returns the quantity with the unit or percent sign that follows; None for any other text."""
    value, inexact, step = quantity.value, quantity.inexact, quantity.step
    percent = False
    if quantity.value.denominator == 1:
        rest = re.sub(r"^(?:st|nd|rd|th)\b", "", rest)
    scale = _SCALE_LETTER.match(rest) if quantity.unit else None
    while scale := scale or _SCALE.match(rest):
        word = scale[1].lower()
        factor = _SCALES[_LETTERS.get(word[0], "") if len(word) < 3 else word]
        value, step, rest, scale = value * factor, step * factor, rest[scale.end() :], None
    mark = _PERCENT.match(rest)
    if mark is not None:
        percent, rest = True, rest[mark.end() :]
    currency = quantity.unit
    after = re.match(r"\s*([$€£¥₹₽₩¢])", rest)
    if after is not None:
        currency, rest = currency or after[1].replace("$", "dollar"), rest[after.end() :]
    unit = _ABBREVIATION.sub(r"\1\2", rest.strip(" .$€£¥₹"))
    if not unit:
        return Quantity(value, inexact, step, percent, currency)
    if not _UNIT.fullmatch(unit):
        return None
    # "10m" is a product; "10weeks" must be a word, and "10 m" or "10\text{m}" has a unit.
    glued = not rest[0].isspace() and not texts and unit[0].isalpha()
    area = re.match(r"([a-z]{1,2})\^?[23]\b", unit)
    known = area is not None and dimension_of(area[1]) is not None
    if glued and (known or re.match(r"[A-Za-z]{4}", unit) or _long_unit(unit)):
        glued = False  # a word, "m2", or "cm": nobody writes them for a product
    if not is_unit(unit):
        return None
    return Quantity(value, inexact, step, percent, f"{currency} {unit}".strip(), glued)


def _long_unit(unit: str) -> bool:
    return len(unit) > 1 and dimension_of(unit) is not None


def _spelled(plain: str) -> Quantity | None:
    """Reads a number in words, also with a noun: "twenty-three", "three red apples", "none"."""
    words = re.findall(r"[a-z]+", plain.lower())
    if not words or len(words) > 12 or re.search(r"[\\^_=<>]", plain) or REFUSED.search(plain):
        return None
    sign = 1
    if words[0] in ("minus", "negative"):
        sign, words = -1, words[1:]
    if words[:1] in (["a"], ["an"]) and words[1:2] and words[1] in _SCALES:
        words[0] = "one"
    if words == ["none"] or (words[:1] == ["no"] and len(words) == 2) or words == ["nothing"]:
        return Quantity(Fraction(0), unit=" ".join(words[1:]))
    total = current = 0
    used = 0
    for before, word in zip(["", *words], words, strict=False):
        if word in _WORDS:
            if before in _WORDS and not (before in _TENS and 0 < _WORDS[word] < 10):
                return None  # "two three"
            current += _WORDS[word]
        elif word == "hundred" and used:
            current = max(1, current) * 100
        elif word in _SCALES and used:
            total, current = total + max(1, current) * _SCALES[word], 0
        elif word == "and" and used and words[used - 1] in _SCALES:
            pass
        else:
            break
        used += 1
    rest = words[used:]
    if not used or len(rest) > 3 or {"or", "and", "to", "times"} & set(rest):
        return None
    return Quantity(Fraction(sign * (total + current)), unit=" ".join(rest))
