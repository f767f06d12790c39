"""Grading by rule: the response's answer against the acceptable ones.

The order of the rules, for each acceptable answer: the same words; an option; yes or no; a number;
a time; several parts, each by these rules; and last, for mathematics, math-verify. Which of them
apply depends on the kind; for ``auto`` on what the acceptable answer looks like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reopold_agent.errors import ConfigError
from reopold_agent.judges import extract, math, numbers, sets, text
from reopold_agent.judges.extract import Found, extract_boxed
from reopold_agent.judges.verdict import Verdict

__all__ = ["KINDS", "Verdict", "equivalent", "extract_boxed", "grade", "grade_boxed"]

KINDS = ("auto", "option", "yes_no", "count", "number", "text", "math", "list", "ordered")
"""Kinds of answers: ``list`` is several parts in any order, ``ordered`` in the order given."""

_VALUES = frozenset({"option", "yes_no", "count", "number"})
"""Kinds whose answers are never sentences."""

_LONGEST = 4000
"""Characters of an answer; more is repetition, and is compared with nothing."""

_DEPTH = 3
"""Lists of tuples of numbers; deeper nesting is left to math-verify."""

_MATHEMATICAL = re.compile(
    r"\\[a-zA-Z]|[\d^_=<>+*/|≤≥∞√π°]|^\W*[a-zA-Z]\W*$|[a-zA-Z]\s*\(|^\W*-"
    r"|(?<![a-zA-Z])[a-zA-Z]\s*-\s*[a-zA-Z](?![a-zA-Z])"
)


@dataclass(frozen=True)
class Rules:
    """How answers are compared.

    Attributes:
        kind: one of `KINDS`.
        tolerance: relative error of numbers that still counts.
        options: texts of a question's options by letter.
        math: see `reopold_agent.judges.math.MathOptions`.
    """

    kind: str = "auto"
    tolerance: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    math: math.MathOptions = field(default_factory=math.MathOptions)


def grade(
    response: str,
    answer: str | Sequence[str],
    kind: str = "auto",
    *,
    tolerance: float | None = None,
    options: Sequence[str] | Mapping[str, str] | None = None,
    precision: int | None = None,
    strict: bool = True,
    set_relation: bool = False,
) -> Verdict:
    """Grades a response.

    Args:
        response: the final turn.
        answer: the right answer or several acceptable ones, plain or LaTeX, boxed or not.
        kind: one of `KINDS`; ``auto`` goes by what the answer looks like.
        tolerance: relative error of numbers that still counts, where the benchmark gives one.
        options: the texts of the question's options, from A; then an option's text counts as its
            letter and the other way round.
        precision: decimals to which numbers are rounded before they are compared.
        strict: names of variables matter, and sets are not tuples.
        set_relation: an inequality may answer where an interval is expected; the reverse may.

    Raises:
        ConfigError: no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"the kind of an answer is one of {', '.join(KINDS)}, got '{kind}'")
    rules = Rules(
        kind,
        tolerance,
        text.options_by_letter(options),
        math.MathOptions(precision, strict, set_relation),
    )
    expected = [reference(each) for each in _as_list(answer)]
    found = extract.find_answer(response)
    if found is None:
        found = _led(response, kind, expected)
    if found is None or len(found.text) > _LONGEST:
        return Verdict(False, None if found is None else found.text, "undecided", found is None)
    for each in expected:
        how = compare(found.text, each, rules)
        if how is not None:
            return Verdict(True, found.text, f"{found.where}:{how}")
    kinds = [_kind(each, rules) for each in expected]
    if found.prose or not found.text or (_VALUES & set(kinds) and extract.is_prose(found.text)):
        value = extract.value_in(found.text) if _VALUES & set(kinds) else None
        if value is None and {"count", "number"} & set(kinds):
            value = numbers.number_word(found.text)
        if value is None:
            # A sentence may say the right thing in other words; a judge can tell.
            return Verdict(False, found.text, "undecided", True)
        for each in expected:
            how = compare(value, each, rules)
            if how is not None:
                return Verdict(True, value, f"{found.where}:{how}")
        return Verdict(False, value, f"{found.where}:{kinds[0]}")
    return Verdict(False, found.text, f"{found.where}:{kinds[0] if kinds else 'none'}")


def grade_boxed(response: str, answers: Sequence[str]) -> Verdict:
    """`grade` where only a box counts: for training, whose prompt asks for one."""
    if extract_boxed(extract.final_part(response)) is None:
        return Verdict(False, None, "undecided", True)
    return grade(response, answers)


def equivalent(answer: str, expected: str, kind: str = "auto") -> bool:
    """Whether two answers say the same (no extraction from a response)."""
    return compare(answer, reference(expected), Rules(kind)) is not None


def reference(answer: str) -> str:
    """A reference answer without its box or the solution around it."""
    answer = text.undoubled(answer)
    if "boxed" in answer:
        boxed = extract.boxed_answer(answer) or extract.open_box(answer)
        if boxed:
            return boxed
    return answer.strip()


def compare(answer: str, expected: str, rules: Rules, depth: int = 0) -> str | None:
    """The rule by which ``answer`` is ``expected``, or None."""
    if not answer.strip() or not expected.strip() or len(answer) > _LONGEST:
        return None
    kind = _kind(expected, rules)
    if kind == "option":
        return "option" if _same_option(answer, expected, rules) else None
    if kind == "yes_no":
        said = text.yes_no(answer)
        return "yes_no" if said is not None and said == text.yes_no(expected) else None
    if text.same_text(answer, expected):
        return "number" if kind in ("number", "count") else "text"
    if kind == "text":
        return None
    decided = _numbers(answer, expected, kind, rules)
    if decided is not None:
        return "number" if decided else None
    if kind == "count":
        return None
    return _mathematics(answer, expected, kind, rules, depth)


def _kind(expected: str, rules: Rules) -> str:
    if rules.kind not in ("auto", "math"):
        return rules.kind
    if text.letter_of(expected) is not None:
        return "option"
    if text.normal(expected) in ("yes", "no", "true", "false"):
        return "yes_no"
    if numbers.parse_quantity(expected) is not None:
        return "number"
    return "math" if rules.kind == "math" or _MATHEMATICAL.search(expected) else "text"


def _same_option(answer: str, expected: str, rules: Rules) -> bool:
    mine = text.option_letter(answer, rules.options)
    wanted = text.option_letter(expected, rules.options)
    if wanted is None:
        return text.same_text(answer, expected)
    if mine is None and not rules.options:
        # A variable named like an option ("\\boxed{x = B}").
        mine = text.letter_of(sets.without_name(answer))
    return mine == wanted


def _numbers(answer: str, expected: str, kind: str, rules: Rules) -> bool | None:
    """Whether two numbers are equal; None if they are not both numbers."""
    wanted = numbers.parse_quantity(sets.without_name(expected))
    mine = numbers.parse_quantity(sets.without_name(answer))
    if wanted is None or mine is None:
        times = numbers.parse_time(answer), numbers.parse_time(expected)
        if times[0] is not None and times[1] is not None and (times[0][1] or times[1][1]):
            return times[0][0] == times[1][0]
        return None
    if rules.kind in ("auto", "math"):
        if rules.math.strict and sets.names_differ(answer, expected):
            return False
        if _product(mine, wanted):
            return False
    return numbers.same_quantity(
        mine,
        wanted,
        tolerance=rules.tolerance,
        precision=rules.math.precision,
        count=kind == "count",
    )


def _product(mine: numbers.Quantity, wanted: numbers.Quantity) -> bool:
    """Whether one side is a number and the other a product of it with symbols ("10m")."""
    if mine.glued and not wanted.unit:
        return True
    # A reference such as "10cm" is a length; of a single letter only the question knows.
    return wanted.glued and not mine.unit and len(wanted.unit) == 1


def _mathematics(answer: str, expected: str, kind: str, rules: Rules, depth: int) -> str | None:
    ordered = {"list": False, "ordered": True}.get(kind)
    mine, wanted = _parts(answer), _parts(expected)
    if mine is not None and wanted is not None and depth < _DEPTH:
        inner = Rules("auto", rules.tolerance, {}, rules.math)

        def same(part: str, other: str) -> bool:
            return _same_part(part, other, inner, depth + 1)

        if sets.same_parts(mine, wanted, same, ordered=ordered):
            return "list"
        if all(_plain_numbers(each) for each in (mine, wanted)) or ordered is not None:
            return None
    first, second = _for_math_verify(expected), _for_math_verify(answer)
    if second.count("{") != second.count("}") or not re.search(r"\w", second):
        return None  # nothing that a parser could read; asking it would only cost time
    return "math-verify" if math.same_expression(first, second, rules.math) else None


def _parts(answer: str) -> sets.Parts | None:
    return sets.read_parts(sets.without_name(answer)) or sets.read_parts(answer)


def _same_part(part: str, other: str, rules: Rules, depth: int) -> bool:
    if compare(part, other, rules, depth) is not None:
        return True
    sides = sets.sides(part), sets.sides(other)
    if len(sides[0]) == len(sides[1]) == 2:
        return all(compare(a, b, rules, depth) is not None for a, b in zip(*sides, strict=True))
    return False


def _plain_numbers(parts: sets.Parts) -> bool:
    return all(numbers.parse_quantity(item) is not None for item in parts.items)


def _for_math_verify(answer: str) -> str:
    """Without delimiters and with one spelling; math-verify does the rest."""
    plain = text.trim(text.latex_plain(answer)).replace("$", "").replace("°", "^{\\circ}")
    # math-verify knows the imaginary unit only where it stands alone; "i(2-i)" is a function to it.
    plain = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", plain)
    return re.sub(r"(?<![A-Za-z\\])i\s*(?=\()", r"i \\cdot ", plain)


def _led(response: str, kind: str, expected: Sequence[str]) -> Found | None:
    """A yes, a no or an option's letter that a response opens with."""
    final = extract.final_part(response)
    yes_no = kind == "yes_no" or (
        kind == "auto" and any(text.normal(e) in ("yes", "no") for e in expected)
    )
    option = kind == "option" or (
        kind == "auto" and any(text.letter_of(each) is not None for each in expected)
    )
    if yes_no and (match := re.match(r"\W*(yes|no)\b(?!\s+(?:and|or)\b)", final, re.IGNORECASE)):
        return Found(match.group(1), "led")
    if option and (match := re.match(r"\s*(?:\*\*)?(\([A-Z]\)|[A-Z][.):])(?=\s|\*|$)", final)):
        return Found(match.group(1), "led")
    return None


def _as_list(answer: str | Sequence[str]) -> list[str]:
    return [answer] if isinstance(answer, str) else [str(each) for each in answer]
