"""Compares sets of real numbers: inequalities, intervals, unions, set-builder notation."""
# ruff: noqa: RUF001  # signs and words of other scripts are meant

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from reopold_agent.judges.numbers import parse_quantity
from reopold_agent.judges.text import latex_plain

Same = Callable[[str, str], bool]
"""``same(answer, expected)``."""

_LONGEST = 300
_LIKELY = re.compile(
    r"[<>≤≥⩽⩾≠∪∖\]\[]|\\(?:[lg](?:eq?|eqslant|t)?|neq?|cup|setminus|backslash)(?![a-z])|∞|\\infty"
)
"""Signs without which a text is no such set, or reads like a pair of numbers."""

_SIGNS = (
    (re.compile(r"\\(?:leq?|leqq|leqslant)(?![a-z])|<=|=<|⩽"), "≤"),
    (re.compile(r"\\(?:geq?|geqq|geqslant)(?![a-z])|>=|⩾"), "≥"),
    (re.compile(r"\\neq?(?![a-z])|!=|\\not\s*="), "≠"),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (
        re.compile(
            r"\\(?:lor|vee)(?![a-z])|(?<![A-Za-z\\])(?:or|oder|ou)(?![A-Za-z])|或者?|または"
        ),
        "∨",
    ),
    (
        re.compile(
            r"\\(?:land|wedge)(?![a-z])|&|(?<![A-Za-z\\])(?:and|und|et)(?![A-Za-z])|[且和]|かつ"
        ),
        "∧",
    ),
    (re.compile(r"\\cup(?![a-z])"), "∪"),
    (re.compile(r"\\(?:setminus|backslash)(?![a-z])|(?<=R)\s*-\s*(?=\\\{)"), "∖"),
    (re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|ℝ|\\R(?![a-z])"), "ℝ"),
    (re.compile(r"\\in(?![a-z])"), "∈"),
    (re.compile(r"\\middle\s*\|?|\\(?:mid|[lr]?vert|colon)(?![a-z])"), "|"),
    (re.compile(r"\\lbrace(?![a-z])|\\\{"), "{"),
    (re.compile(r"\\rbrace(?![a-z])|\\\}"), "}"),
    (re.compile(r"\+?\s*\\infty"), "∞"),
)
_NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?")
_UNKNOWNS = ("x", "y", "z", "t")
_RELATION = re.compile(r"([<>≤≥≠]|(?<![<>=])=)")
_MEMBER = re.compile(rf"\s*({_NAME.pattern})\s*∈\s*(.*)", re.DOTALL)
_BUILDER = re.compile(rf"\{{\s*({_NAME.pattern})\s*(?:∈\s*(?:ℝ|R)\s*)?[|:]\s*(.*)\}}", re.DOTALL)
_INTERVAL = re.compile(
    r"([(\[\]])\s*([^,;()\[\]]+(?:\([^()]*\)[^,;()\[\]]*)?)\s*[,;]\s*(.+?)\s*([)\]\[])"
)
_BESIDE = re.compile(r"(?<=[)\]\[])\s*[,;∧]\s*(?=[(\[\]])")
""" "(-∞, 1) and (2, ∞)", which is meant as a union."""

_ALL = re.compile(r"\s*(?:for\s+)?all\s+(?:real\s+)?(?:numbers\s+|values\s+of\s+)?")
_TEXTS = re.compile(r"(\\(?:text|mbox|mathrm)\s*\{[^{}]*\})")
_SIZE = re.compile(r"\|\s*([^|]+?)\s*\|")
_TURNED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


@dataclass(frozen=True)
class End:
    """An end of a piece: the expression ("" for infinity), and whether it belongs to the piece."""

    text: str = ""
    closed: bool = False

    @property
    def value(self) -> Fraction | None:
        """The value of a plain number, else None."""
        quantity = parse_quantity(self.text) if self.text else None
        return quantity.value if quantity is not None and not quantity.unit else None


@dataclass(frozen=True)
class Piece:
    """The numbers between two ends."""

    low: End = End()
    high: End = End()


@dataclass(frozen=True)
class Region:
    """A set of real numbers.

    Attributes:
        pieces: their union is the set.
        name: the variable of the inequalities; "" if the set stands for itself.
        pair: written like a pair of numbers ("(1, 2)"), which it may be as well.
    """

    pieces: tuple[Piece, ...]
    name: str = ""
    pair: bool = False


def read_regions(answer: str, expected: str) -> tuple[Region, Region] | None:
    """Reads two sets; None if one is none, or both are written like pairs of numbers."""
    if not _LIKELY.search(answer) and not _LIKELY.search(expected):
        return None
    mine = read_region(answer)
    wanted = None if mine is None else read_region(expected)
    if mine is None or wanted is None or (mine.pair and wanted.pair):
        return None
    return mine, wanted


def read_region(text: str) -> Region | None:
    """Reads inequalities joined by words or signs, intervals, unions; None for anything else."""
    if len(text) > _LONGEST:
        return None
    plain = latex_plain(_TEXTS.sub(r" \1 ", text)).replace("$", " ")
    for pattern, sign in _SIGNS:
        plain = pattern.sub(sign, plain)
    return _read(_ALL.sub("", plain.strip(" .。"), count=1))


def unread(answer: str, expected: str) -> bool:
    """Returns whether an answer to a set is an inequality of a form that is not read."""
    told = any(pattern.search(answer) for pattern, sign in _SIGNS if sign in "≤≥≠<>")
    if not told and not re.search("[<>≤≥≠]", answer):
        return False
    return read_region(expected) is not None and read_region(answer) is None


def same_region(mine: Region, wanted: Region, same: Same, *, strict: bool = True) -> bool:
    """Returns whether two sets are equal; with ``strict`` two named variables must be the same."""
    if strict and mine.name and wanted.name and mine.name != wanted.name:
        return False
    left, right = list(_merged(mine.pieces)), _merged(wanted.pieces)
    for piece in right:
        found = next((each for each in left if _same_piece(each, piece, same)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _same_piece(mine: Piece, wanted: Piece, same: Same) -> bool:
    ends = ((mine.low, wanted.low), (mine.high, wanted.high))
    if any(a.closed != b.closed or bool(a.text) != bool(b.text) for a, b in ends):
        return False
    return all(a.text == b.text or same(a.text, b.text) for a, b in ends)


def _read(plain: str) -> Region | None:
    builder = _BUILDER.fullmatch(plain)
    if builder is not None:
        inner = _conditions(builder[2])
        bound = inner is not None and inner.name == builder[1]
        return Region(inner.pieces) if inner is not None and bound else None
    member = _MEMBER.fullmatch(plain)
    if member is not None and not _RELATION.search(member[2]):
        inner = _union(member[2])
        return None if inner is None else Region(inner.pieces, member[1])
    if plain[:1] + plain[-1:] == "{}":
        return _read(plain[1:-1]) if _RELATION.search(plain) else None
    return _conditions(plain) if _RELATION.search(plain) else _union(plain)


def _union(plain: str) -> Region | None:
    """Reads intervals and points joined by a union sign or "or", and the reals without points."""
    base, less, removed = plain.partition("∖")
    if less:
        points = re.fullmatch(r"\s*\{(.*)\}\s*", removed)
        if base.strip() not in ("ℝ", "R") or points is None:
            return None
        return _intersection([_without(point) for point in re.split("[,;]", points[1])])
    parts = [part.strip() for part in re.split("[∪∨]", plain)]
    if len(parts) == 1 and len(beside := _BESIDE.split(plain)) > 1:
        if "∞" not in plain:
            return None  # pairs of numbers
        parts = beside
    pieces: list[Piece] = []
    for part in parts:
        if part == "ℝ":
            pieces.append(Piece())
        elif len(parts) > 1 and (points := re.fullmatch(r"\{([^{}]+)\}", part)):
            ends = [End(point.strip(), closed=True) for point in re.split("[,;]", points[1])]
            pieces += [Piece(end, end) for end in ends]
        elif interval := _INTERVAL.fullmatch(part):
            low, high = (_end(interval[i]) for i in (2, 3))
            if low is None or high is None or low == "∞" or high == "-∞":
                return None
            low, high = ("" if "∞" in each else each for each in (low, high))
            pieces.append(
                Piece(
                    End(low, bool(low) and interval[1] == "["),
                    End(high, bool(high) and interval[4] == "]"),
                )
            )
        else:
            return None
    pair = len(parts) == 1 and plain[0] in "([" and plain[-1] in ")]"
    return Region(tuple(pieces), pair=pair)


def _end(text: str) -> str | None:
    text = re.sub(r"\s*∞\s*", "∞", text.strip())
    if (
        not text
        or re.search(r"[,;<>∪∨∧∈=]", text)
        or ("∞" in text and text not in ("∞", "-∞", "- ∞"))
    ):
        return None
    return text.replace(" ", "") if "∞" in text else text


def _conditions(plain: str) -> Region | None:
    """Reads inequalities joined by "or", "and" or commas."""
    alternatives = [_all_of(part) for part in plain.split("∨")]
    regions = [each for each in alternatives if each is not None]
    if len(regions) < len(alternatives) or len({each.name for each in regions}) != 1:
        return None
    return Region(tuple(p for each in regions for p in each.pieces), regions[0].name)


def _all_of(plain: str) -> Region | None:
    regions = []
    parts = re.split("∧|,(?![^()]*\\))|;", plain)
    for part in parts:
        if re.fullmatch(rf"\s*(?:{_NAME.pattern})\s*∈\s*ℝ\s*", part):
            continue
        name, unequal, value = part.rpartition("≠")
        both = value.partition("\\pm")[2]
        for each in (f"{name}≠{both}", f"{name}≠-{both}") if unequal and both else (part,):
            region = _chain(each)
            if region is None:
                return None
            regions.append(region)
    if not regions or len({each.name for each in regions}) != 1:
        return None
    both = _intersection(regions)
    if both is None or both.pieces or "∧" in plain:
        return both
    # "x < -2, x > 3" leaves nothing if the comma means "and".
    return Region(tuple(piece for each in regions for piece in each.pieces), regions[0].name)


def _chain(part: str) -> Region | None:
    """Reads one inequality: "x > 3", "-1 < x ≤ 2", "|x - 1| < 2", "x ≠ 2", "x = 2"."""
    sides = [side.strip() for side in _RELATION.split(part)]
    terms, signs = sides[::2], sides[1::2]
    if len(terms) not in (2, 3) or not all(terms):
        return None
    if "∞" in part:
        return _chain_to_infinity(terms, signs)
    at = _variable(terms)
    if at is None:
        return None
    name, centre, size = _named(terms[at])
    others = [term for index, term in enumerate(terms) if index != at]
    if any(_mentions(term, name) for term in others):
        return None
    if len(terms) == 3:
        if size or not any(set(signs) <= set(way) for way in ("<≤", ">≥")):
            return None
        upward = signs[0] in "<≤"
        low, high = (terms[0], terms[2]) if upward else (terms[2], terms[0])
        first, second = signs if upward else reversed(signs)
        ends = End(low, first in "≤≥"), End(high, second in "≤≥")
        return Region((Piece(*ends),), name)
    sign = signs[0] if at == 0 else _TURNED.get(signs[0], signs[0])
    return _around(name, centre, sign, others[0]) if size else _ray(name, sign, others[0])


def _chain_to_infinity(terms: list[str], signs: list[str]) -> Region | None:
    """Reads "-∞ < x < 3" as "x < 3"."""
    if len(terms) != 3 or set(signs) - set("<≤"):
        return None
    if re.fullmatch(r"-\s*∞", terms[0]):
        return _chain(f"{terms[1]} {signs[1]} {terms[2]}")
    return _chain(f"{terms[0]} {signs[0]} {terms[1]}") if terms[2] == "∞" else None


def _variable(terms: list[str]) -> int | None:
    """Returns which term of an inequality is the variable; None if it is not clear."""
    found = [index for index, term in enumerate(terms) if _named(term)[0]]
    if len(terms) == 3:
        return 1 if 1 in found else None
    if len(found) > 1:  # "x > a"
        found = [index for index in found if terms[index] in _UNKNOWNS]
    return found[0] if len(found) == 1 else None


def _named(term: str) -> tuple[str, str, bool]:
    """Returns the variable of "x", "|x|" or "|x - 1|", the centre, and whether it is a distance."""
    size = _SIZE.fullmatch(term)
    inner, _, centre = re.sub(r"\s", "", size[1] if size else term).partition("-")
    if size and "+" in inner:
        inner, _, centre = inner.partition("+")
        centre = f"-{centre}"
    known = _NAME.fullmatch(inner) and inner not in ("e", "\\pi", "i")
    if not known or (centre and not size):
        return "", "", False
    return inner, centre or "0", bool(size)


def _mentions(term: str, name: str) -> bool:
    return re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z])", term) is not None


def _ray(name: str, sign: str, end: str) -> Region:
    closed = End(end, closed=True)
    if sign == "≠":
        return Region((Piece(high=End(end)), Piece(low=End(end))), name)
    if sign == "=":
        return Region((Piece(closed, closed),), name)
    at = closed if sign in "≤≥" else End(end)
    return Region((Piece(high=at) if sign in "<≤" else Piece(low=at),), name)


def _around(name: str, centre: str, sign: str, size: str) -> Region | None:
    middle, radius = End(centre).value, End(size).value
    if middle is None or radius is None or radius <= 0 or sign in "=≠":
        return None
    low, high = (End(str(each), sign in "≤≥") for each in (middle - radius, middle + radius))
    return Region((Piece(low, high),) if sign in "<≤" else (Piece(high=low), Piece(low=high)), name)


def _without(point: str) -> Region:
    return _ray("", "≠", point.strip())


def _intersection(regions: Iterable[Region]) -> Region | None:
    """Returns what all sets have in common; None if their ends cannot be ordered."""
    first, *others = regions
    pieces = first.pieces
    for other in others:
        met = [_met(mine, wanted) for mine in pieces for wanted in other.pieces]
        if any(each is None for each in met):
            return None
        pieces = tuple(each for each in met if each is not None and each != _NOTHING)
    return Region(pieces, first.name)


_NOTHING = Piece(End("1"), End("0"))


def _met(first: Piece, second: Piece) -> Piece | None:
    """Returns the intersection of two pieces, `_NOTHING`, or None if it is not known."""
    lows = [each.low for each in (first, second) if each.low.text]
    highs = [each.high for each in (first, second) if each.high.text]
    ends = [*lows, *highs]
    compared = len(lows) > 1 or len(highs) > 1
    if compared and any(end.value is None for end in ends):
        return None
    low = max(lows, key=lambda end: (end.value or 0, not end.closed)) if lows else End()
    high = min(highs, key=lambda end: (end.value or 0, end.closed)) if highs else End()
    if low.value is not None and high.value is not None:
        both = low.closed and high.closed
        if low.value > high.value or (low.value == high.value and not both):
            return _NOTHING
    return Piece(low, high)


def _merged(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Joins pieces that overlap or touch, if all ends are plain numbers."""
    ends = [end for piece in pieces for end in (piece.low, piece.high) if end.text]
    if len(pieces) < 2 or any(end.value is None for end in ends):
        return pieces
    merged: list[Piece] = []
    for piece in sorted(
        pieces, key=lambda each: (each.low.text != "", each.low.value or 0, not each.low.closed)
    ):
        last = merged[-1] if merged else None
        if last is not None and _touch(last, piece):
            merged[-1] = Piece(last.low, _higher(last.high, piece.high))
        else:
            merged.append(piece)
    return tuple(merged)


def _touch(last: Piece, piece: Piece) -> bool:
    if last.high.value is None or piece.low.value is None:
        return True
    if last.high.value == piece.low.value:
        return last.high.closed or piece.low.closed
    return last.high.value > piece.low.value


def _higher(first: End, second: End) -> End:
    if first.value is None or second.value is None:
        return End()
    return max(first, second, key=lambda end: (end.value or 0, end.closed))
