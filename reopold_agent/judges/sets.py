"""Compares answers with several parts: lists, tuples, sets, intervals, matrices, equations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from reopold_agent.judges.text import latex_plain

Same = Callable[[str, str], bool]
"""``same(answer, expected)``."""

_MOST_PARTS = 64
_OPEN, _CLOSE = "([{", ")]}"
_AND = re.compile(r"(?<![A-Za-z\\])(?:and|or)(?![a-z])|\\l(?:and|or)(?![a-z])")
_ENVIRONMENT = re.compile(
    r"\\begin\s*\{([a-z]*matrix|array|cases|aligned|align\*?)\}(?:\s*\{[lcr|\s]*\})?(.*)\\end\s*\{\1\}",
    re.DOTALL,
)
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!=:\\])=(?!=)")
_APPROXIMATELY = re.compile(r"\\approx(?![a-z])|\\sim(?:eq)?(?![a-z])|≈|~=")
_SYMBOL = re.compile(
    r"\\?[A-Za-z]+(?:\s*_\s*(?:\{[^{}]*\}|\w))?(?:\s*\^\s*\{?[\\a-z*']+\}?)?'*"
    r"(?:\s*\(\s*[\w\s,\\]+\s*\))?"
)
_FUNCTION = re.compile(
    r"\\?(?:a(?:rc)?)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp|lim|sqrt|det|gcd|lcm)h?(?![a-z])"
)
_VARIABLE = re.compile(r"(?:[A-Za-z]|[A-Z]{2,3})(?:_\{?\w+\}?)?")
_MEMBER = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?)?(?:\s*\([a-z]\))?\s*\\in(?![a-z])\s*")
_GROUPED = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?$")
_TAIL = re.compile(r",?\s*\b(?:where|with|for (?:all|some|any)|when|if)\b.*$", re.DOTALL)


@dataclass(frozen=True)
class Parts:
    """An answer with several parts.

    Attributes:
        items: the parts as written.
        shape: ``list`` (no brackets), ``set`` (braces), ``tuple`` (round brackets),
            ``closed`` (square brackets), ``mixed`` (a half-open interval), ``grid`` (a matrix).
        opening: the opening bracket, or "".
        closing: the closing bracket, or "".
        row_length: of a ``grid``, else 0.
    """

    items: tuple[str, ...]
    shape: str
    opening: str = ""
    closing: str = ""
    row_length: int = 0


def read_parts(text: str) -> Parts | None:
    """Splits an answer at its outermost separators; returns None if it has only one part."""
    plain = latex_plain(text).strip().rstrip(".").strip()
    grid = _read_grid(plain)
    if grid is not None:
        return grid
    if _GROUPED.fullmatch(plain):
        return None
    plain = plain.replace("\\{", "{").replace("\\}", "}")
    plain = plain.replace("\\lbrace", "{").replace("\\rbrace", "}")
    items = split(plain)
    if not plain.startswith(("{", "[")):
        items = [signed for item in items for signed in _both_signs(item)]
    if len(items) > 1:
        return Parts(tuple(items), "list")
    if len(plain) < 2 or plain[0] not in _OPEN or plain[-1] not in _CLOSE:
        return None
    if _matching(plain) != len(plain) - 1:
        return None
    inner = split(plain[1:-1])
    around = plain[0] + plain[-1]
    if around == "{}" and inner and inner != [""]:
        return Parts(tuple(s for item in inner for s in _both_signs(item)), "set", *around)
    if len(inner) < 2:
        # ((1,2)) is (1,2), and ({matrix}) is the matrix.
        return read_parts(plain[1:-1]) if around in ("()", "{}") else None
    shape = {"()": "tuple", "[]": "closed"}.get(around, "mixed")
    return Parts(tuple(inner), shape, *around)


def _both_signs(item: str) -> list[str]:
    """Returns both values of what has "\\pm" in it, of which all have the same sign at a time."""
    if not _PLUS_MINUS.search(item):
        return [item]
    upper = _PLUS_MINUS.sub(lambda found: "+" if found[1] == "pm" else "-", item)
    lower = _PLUS_MINUS.sub(lambda found: "-" if found[1] == "pm" else "+", item)
    return [upper, lower]


def same_parts(mine: Parts, wanted: Parts, same: Same, *, ordered: bool | None = None) -> bool:
    """Returns whether two answers have the same parts.

    Unless ``ordered`` is given, the order matters if either side has round or square brackets, and
    does not matter for lists and sets.
    """
    if mine.shape == wanted.shape == "set":
        mine, wanted = _distinct(mine, same), _distinct(wanted, same)
    if len(mine.items) != len(wanted.items) or len(wanted.items) > _MOST_PARTS:
        return False
    shapes = {mine.shape, wanted.shape}
    if "mixed" in shapes and (mine.opening, mine.closing) != (wanted.opening, wanted.closing):
        return False
    if shapes == {"tuple", "closed"}:
        return False  # an open interval is not a closed one
    if "grid" in shapes:
        if shapes == {"grid"} and mine.row_length != wanted.row_length:
            return False
        if shapes - {"grid", "tuple", "closed"}:
            return False
        return all(map(same, mine.items, wanted.items))
    if ordered is None:
        ordered = bool(shapes & {"tuple", "closed", "mixed"})
        # "AB=4, CD=5" answered by "4, 5": without names, the order tells which is which.
        named = [any(_EQUALS.search(item) for item in each.items) for each in (mine, wanted)]
        ordered = ordered or (named[0] != named[1] and _distinct_names(mine, wanted))
    if ordered:
        return all(map(same, mine.items, wanted.items))
    return _match(list(mine.items), list(wanted.items), same)


def _distinct(parts: Parts, same: Same) -> Parts:
    """Returns a set without repeated items."""
    items: list[str] = []
    for item in parts.items[:_MOST_PARTS]:
        if not any(same(item, other) for other in items):
            items.append(item)
    return replace(parts, items=(*items, *parts.items[_MOST_PARTS:]))


def split(text: str) -> list[str]:
    """Splits at the outermost commas, semicolons, "and" and "or"; thousands stay together."""
    text = _AND.sub(";", text)
    if ";" in text:
        # "1,000; 2,000": commas between semicolons may only separate groups of digits.
        pieces = _split_at(text, ";")
        return [part for piece in pieces for part in _split_commas(piece)]
    return _split_commas(text)


def sides(text: str) -> list[str]:
    """Returns the sides of an equation or a chain of equations, without approximate last terms."""
    plain = latex_plain(text)
    exact = _APPROXIMATELY.split(plain)
    first = exact[0].strip()
    if len(exact) > 1:
        if first and not _SYMBOL.fullmatch(first):
            plain = first
        else:
            plain = f"{first}={exact[1]}" if first else exact[1]
    return [side.strip() for side in _EQUALS.split(plain)]


def without_name(text: str) -> str:
    """Returns the value of "x = 3", "f(x) = 3", "(p, q) = (3, 2)", "x \\in [0, 1]"; or the text."""
    plain = _TAIL.sub("", latex_plain(text)) if "=" in text else latex_plain(text)
    member = _MEMBER.match(plain)
    if member is not None:
        return plain[member.end() :].strip()
    found = sides(plain)
    if len(found) < 2 or not found[-1]:
        return found[0] if found and found[0] else text
    if any(len(split(side)) > 1 for side in found[1:-1]):
        return text  # several equations ("x = 1, y = 2") have several values
    return found[-1] if is_name(found[0]) else text


def names_differ(first: str, second: str) -> bool:
    """Returns whether two answers name different variables: "a = 1" and "b = 1"."""
    names = [sides(each)[0].strip() for each in (first, second) if _EQUALS.search(each)]
    if len(names) < 2 or not all(_VARIABLE.fullmatch(name) for name in names):
        return False
    return names[0].casefold() != names[1].casefold()


def is_name(text: str) -> bool:
    """Returns whether an equation's left side is only a name for its right side."""
    text = text.strip()
    if _FUNCTION.match(text):
        return False
    if _SYMBOL.fullmatch(text):
        return True
    if ":" in text:
        return all(_SYMBOL.fullmatch(each.strip()) for each in text.split(":"))
    if len(text) > 2 and text[0] == "(" and text[-1] == ")":
        return all(_SYMBOL.fullmatch(each.strip()) for each in text[1:-1].split(","))
    return False


def _distinct_names(mine: Parts, wanted: Parts) -> bool:
    for parts in (mine, wanted):
        names = [sides(item)[0].replace(" ", "") for item in parts.items if "=" in item]
        if names:
            bare = {re.sub(r"_\{?\d+\}?", "", name) for name in names}
            return len(bare) == len(names) and len(names) == len(parts.items)
    return False


def _match(mine: list[str], wanted: list[str], same: Same) -> bool:
    """Pairs the parts; taking the first match is enough, because equality is nearly transitive."""
    for each in wanted:
        found = next((index for index, part in enumerate(mine) if same(part, each)), None)
        if found is None:
            return False
        mine.pop(found)
    return not mine


def _matching(text: str) -> int:
    depth = 0
    for index, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0:
            return index
    return -1


def _split_at(text: str, separator: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if char == separator and depth <= 0:
            parts.append(text[start:index].strip())
            start = index + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part] or [""]


def _split_commas(text: str) -> list[str]:
    if _GROUPED.fullmatch(text.strip()):
        return [text.strip()]
    return _split_at(text, ",")


def _read_grid(plain: str) -> Parts | None:
    inner = plain
    while len(inner) > 2 and inner[0] in "([" and _matching(inner) == len(inner) - 1:
        inner = inner[1:-1].strip()
    match = _ENVIRONMENT.fullmatch(inner)
    if match is None:
        return None
    rows: Sequence[str] = [row.strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2])]
    cells = [[cell.strip() for cell in row.split("&")] for row in rows if row]
    lengths = {len(row) for row in cells}
    if len(lengths) != 1:
        return None
    items = tuple(cell for row in cells for cell in row)
    if match[1] == "cases" and lengths == {1}:
        return Parts(items, "list")  # a system of equations, in any order
    return Parts(items, "grid", row_length=lengths.pop())
