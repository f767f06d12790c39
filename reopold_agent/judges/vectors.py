"""Reads vectors that are written as sums of unit vectors: "3i - 2j + k"."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from reopold_agent.judges.text import latex_plain

_LONGEST = 200
_STYLE = (
    r"\\(?:hat|widehat|vec|overrightarrow|overline|bm|boldsymbol|bold|mathbf|textbf|mathit|bf)"
    r"(?![a-z])"
)
_NAME = r"(?:\\([ij])math(?![a-z])|([ijk\ue000-\ue002])(?![A-Za-z]))"
_MARKED = re.compile(
    rf"{_STYLE}\s*\{{\s*{_NAME}\s*\}}|{_STYLE}\s*{_NAME}|(?<![A-Za-z])([ijk])\u0302"
)
"""A unit vector in bold print, or with a hat or an arrow. An upright i is the imaginary unit."""

_UNIT_TEXT = re.compile(r"(?:\\[,;: ]|\s)*\\(?:text|mathrm)\s*\{[^{}]*\}\s*\$?\s*\Z")
_PLAIN = re.compile(r"(?<![A-Za-z\\{])([ijk])(?![A-Za-z])")
_UNITS = {"i": "\ue000", "j": "\ue001", "k": "\ue002"}
"""Characters for private use, which no answer has."""

_OVER = re.compile(r"([-+]?)\s*\\frac\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\s*\{([^{}]*)\}")
_TIMES = re.compile(r"([^()\ue000-\ue002]*?)(?:\\cdot|\*)?\s*\(([^()]*)\)")


def read_unit_vectors(text: str) -> Mapping[str, str] | None:
    """Returns the components by unit vector; None if the text is anything else.

    Unit vectors without a mark are read only if there are two of them, and every term has one:
    "3 - 2i" is a complex number.
    """
    if len(text) > _LONGEST or not re.search(r"[ijk]", text):
        return None
    text = _UNIT_TEXT.sub("", unicodedata.normalize("NFD", text).rpartition("=")[2])
    marked = _MARKED.sub(_unit, _MARKED.sub(_unit, text))  # twice for a bold letter with a hat
    if marked == text:
        marked = _PLAIN.sub(_unit, text)
        if len({unit for unit in _UNITS.values() if unit in marked}) < 2:
            return None
    return _components(latex_plain(marked).replace("$", "").strip(" ."))


def _unit(match: re.Match[str]) -> str:
    name = next(group for group in match.groups() if group)
    return _UNITS.get(name, name)


def _components(plain: str) -> dict[str, str] | None:
    over = _OVER.fullmatch(plain)
    if over is not None and any(unit in over[2] for unit in _UNITS.values()):
        inner = _components(over[2])
        return inner and {unit: f"{over[1]}\\frac{{{c}}}{{{over[3]}}}" for unit, c in inner.items()}
    if plain[:1] + plain[-1:] == "()" and "(" not in plain[1:-1]:
        return _components(plain[1:-1].strip())
    times = _TIMES.fullmatch(plain)
    if times is not None and times[1].strip():
        inner = _components(times[2])
        factor = "-1" if times[1].strip() == "-" else times[1].strip()
        return inner and {unit: f"{factor} \\cdot ({c})" for unit, c in inner.items()}
    found: dict[str, str] = {}
    for term in _terms(plain):
        units = [name for name, unit in _UNITS.items() if unit in term]
        if len(units) != 1 or units[0] in found or term.count(_UNITS[units[0]]) != 1:
            return None
        number = (
            term.replace(f"{{{_UNITS[units[0]]}}}", "{1}").replace(_UNITS[units[0]], "").strip()
        )
        number = re.sub(r"\s*(?:\\cdot|\*)\s*\Z", "", number).replace("+ ", "+").replace("- ", "-")
        if re.search(r"[\^_]\s*\Z|\A[\^_]", number):
            return None
        found[units[0]] = f"{number}1" if number in ("", "+", "-") else number.removeprefix("+")
    return found or None


def _terms(plain: str) -> list[str]:
    """Splits a sum at the signs outside brackets."""
    terms, depth, start = [], 0, 0
    for index, character in enumerate(plain):
        depth += (character in "({[") - (character in ")}]")
        if character in "+-" and depth == 0 and plain[start:index].strip():
            terms.append(plain[start:index].strip())
            start = index
    return [*terms, plain[start:].strip()]
