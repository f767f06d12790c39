"""Recognises units after numbers, and their dimension."""

from __future__ import annotations

import re

_KNOWN = {
    "m": "m meter metre",
    "cm": "cm centimeter centimetre",
    "mm": "mm millimeter millimetre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "g": "g gram",
    "kg": "kg kilogram",
    "mg": "mg milligram",
    "lb": "lb pound",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "l": "l liter litre",
    "ml": "ml milliliter millilitre",
    "deg": "° deg degree",
    "rad": "rad radian",
    "cent": "cent",
    "dollar": "dollar buck usd",
    "n": "newton",
    "j": "j joule",
    "w": "watt",
    "mph": "mph",
}
_ALIASES = {alias: name for name, aliases in _KNOWN.items() for alias in aliases.split()}
_AREA = re.compile(r"\b(?:square|sq\.?)\s+([a-z]+)", re.IGNORECASE)
_VOLUME = re.compile(r"\b(?:cubic|cu\.?)\s+([a-z]+)", re.IGNORECASE)
_POWER = re.compile(r"([a-z°]+)\s*(?:\^\s*\{?\s*([23])\s*\}?)?", re.IGNORECASE)
_WORDS = re.compile(r"[a-zµμΩ]{2,}(?:[\s-][a-z]+){0,4}", re.IGNORECASE)
_COMPOUND = re.compile(
    r"[a-zµμΩ°]+\.?(?:\s*\^\s*\{?\s*-?\d\s*\}?|[23](?!\d))?"
    r"(?:(?:\s*(?:/|\\cdot|·|\*|\bper\b)\s*|\s+)[a-zµμΩ°]+\.?(?:\s*\^\s*\{?\s*-?\d\s*\}?)?){0,4}",
    re.IGNORECASE,
)
_NOT_UNITS = frozenset(
    {"and", "or", "to", "plus", "minus", "times", "pi", "is", "if", "not", "mod"}
)


def is_unit(text: str) -> bool:
    """Returns whether the text after a number can be a unit or a counted noun."""
    words = re.findall(r"[a-zµμΩ]+", text, re.IGNORECASE)
    if text.strip() == "°" or re.fullmatch(r"°\s*[CF]?", text.strip()):
        return True
    if not words or _NOT_UNITS & {word.lower() for word in words}:
        return False
    if _COMPOUND.fullmatch(text) is None and _WORDS.fullmatch(text) is None:
        return False
    if len(words) == 1 and len(words[0]) == 1:
        # "5 x" and "2 n" are products; "5 m" is a length.
        return words[0] in "mgshlLNJWVAKFC"
    return True


def dimension_of(unit: str) -> tuple[str, int] | None:
    """Returns name and power of a simple unit ("square inches": ("in", 2)); None if unknown."""
    text = _AREA.sub(r"\1^2", unit.strip())
    text = _VOLUME.sub(r"\1^3", text).strip(" .{}")
    match = _POWER.fullmatch(text)
    if match is None:
        return None
    word = match[1] if match[1] in _ALIASES else match[1].lower()
    name = _ALIASES.get(word) or _ALIASES.get(word.removesuffix("s"))
    return None if name is None else (name, int(match[2] or 1))
