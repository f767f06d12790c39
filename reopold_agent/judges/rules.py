"""Grades by rule: compares a response's answer with the acceptable ones.

For each acceptable answer the rules are tried in this order: an option; yes or no; the same words;
a number; a time; several parts, each by these rules; and last, for mathematics, math-verify. The
kind of answer decides which rules apply; for ``auto`` it follows from the acceptable answer.

A response is right, wrong or undecided. It is undecided if no answer is found, or if the answer or
the reference ("a reference in prose") is not of a form that the rules for its kind read.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction

from reopold_agent.errors import ConfigError
from reopold_agent.judges import (
    choices,
    counts,
    cues,
    dates,
    extract,
    intervals,
    math,
    numbers,
    residues,
    sets,
    text,
    units,
    vectors,
)
from reopold_agent.judges.boxed import boxed_answer, extract_boxed, open_box
from reopold_agent.judges.extract import Found
from reopold_agent.judges.verdict import Verdict

__all__ = ["KINDS", "Verdict", "equivalent", "extract_boxed", "grade", "grade_boxed"]

KINDS = ("auto", "option", "yes_no", "count", "number", "text", "math", "list", "ordered")
"""Kinds of answers. ``list`` has several parts in any order, ``ordered`` in the given order."""

_VALUES = frozenset({"option", "yes_no", "count", "number"})
"""Kinds whose answers are never sentences."""

_LONGEST = 4000
"""Largest number of characters of an answer; longer ones are repetition and never match."""

_SHORT = 300
"""Largest number of characters of a response that can be an option with its text."""

_DEPTH = 3
"""Enough for lists of tuples of numbers; deeper nesting is left to math-verify."""

_EMPTY_SET = re.compile(
    r"\\emptyset|\\\{\s*\\\}|\{\s*\}|(?:the )?empty set"
    r"|(?:there (?:is|are) )?no(?: real)? solutions?",
    re.IGNORECASE,
)
_REALS = re.compile(
    r"(?:[a-z]\s*\\in\s*)?\\mathbb\s*\{?R\}?|\N{DOUBLE-STRUCK CAPITAL R}|all reals"
    r"|(?:the set of )?all real numbers|\(-\\infty,\s*\+?\\infty\)",
    re.IGNORECASE,
)
_NOTHING = re.compile(r"d\.?n\.?e\.?|(?:the limit |it )?does not exist", re.IGNORECASE)
_SAME_MEANING = (_EMPTY_SET, _REALS, _NOTHING)
_AND_BEFORE = re.compile(r"(?<=[a-z])\s+and\s+(?=\d+\s*[a-z])")
""" "6 hours and 15 minutes"."""

_PLAIN_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)")
_PLAIN_FUNCTION = re.compile(
    r"(?<![A-Za-z\\{])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-z])",
    re.IGNORECASE,
)
_PLAIN_GREEK = re.compile(
    r"(?<![A-Za-z\\])(alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|pi)(?![A-Za-z])"
)
_COMBINATIONS = re.compile(
    r"(?<![A-Za-z\\])C\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)"
    r"|(?:\{\})?[_^]\s*\{?(\d+)\}?\s*C\s*_\s*\{?(\d+)\}?"
    r"|(?<![A-Za-z\\])C_\{?(\d+)\}?\^\{?(\d+)\}?"
)
""" "C(10,3)", "^{10}C_3" and "C_{10}^3". """

_ANGLE = re.compile(r"[-+]?\s*(?:\d+(?:\.\d+)?|\\frac\s*\{\d+\}\s*\{\d+\})\s*°")
_RADIANS = re.compile(r"\\pi(?![a-z])|\\?arc(?:sin|cos|tan)|(?:sin|cos|tan)\s*\^\s*\{?\s*-1")
_TURNED = re.compile(r"\A\s*([-+]?(?:\d|\\[df]?frac|\\sqrt)[^=<>]*?)\s*=\s*([A-Za-z])\s*\Z")
_FUNCTION_OF = re.compile(r"\A\s*(?:[fgh]\s*(\()\s*x\s*\)|y)\s*=\s*")
_TO = re.compile(r"(\d+)\s+to\s+(\d+)")
""" "4 to 1" is a ratio beside "4:1"."""

_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6}
_PARTS |= {"seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
_FRACTION_WORDS = re.compile(rf"(?:(\w+)[\s-]+)?({'|'.join(_PARTS)})s?", re.IGNORECASE)
_WIDE_UNIT = re.compile(r"(.*[\d})])\s*\$?\s*([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]{1,6})\$?")
_COUNT_WORDS = {
    "couple": "2",
    "pair": "2",
    "both": "2",
    "trio": "3",
    "single": "1",
    "dozen": "12",
    "nobody": "0",
    "nothing": "0",
}
_DOZENS = {"half a": 6, "a": 12, "one": 12, "two": 24, "three": 36, "four": 48, "five": 60}
_ORDINALS = {
    "first": "1st",
    "second": "2nd",
    "third": "3rd",
    "fourth": "4th",
    "fifth": "5th",
    "sixth": "6th",
    "seventh": "7th",
    "eighth": "8th",
    "ninth": "9th",
    "tenth": "10th",
}
_ORDINAL_WORD = re.compile(rf"\A(?:{'|'.join(_ORDINALS)})\b", re.IGNORECASE)
_JUDGED = re.compile(
    r"(?<!if )(?<!when )(?<!whether )(?:\b(?:the|this|that)\s+)(?:given\s+)?"
    r"(?:statement|claim|assertion|conclusion)"
    r"\s+(?:is|was)\s+(?:therefore\s+|thus\s+|indeed\s+)?\**(not\s+)?\**"
    r"(true|false|correct|incorrect|right|wrong)\b\W*\Z",
    re.IGNORECASE,
)
_NOBODY = re.compile(
    r"\b(?:no(?:body|ne)?|whether|either)\b[^,;:]*\Z|\bif\b[^.!?]*\Z"
    r"|\b(?:not|nor|and|or|yes|no)\W*\Z",
    re.IGNORECASE,
)
""" "No one can say", "yes or" before a yes or no."""

_MATHEMATICAL = re.compile(
    r"\\[a-zA-Z]|[\d^_=<>+*/|≤≥∞√π°]|^\W*[a-zA-Z]\W*$|[a-zA-Z]\s*\(|^\W*-"
    r"|(?<![a-zA-Z])[a-zA-Z]\s*-\s*[a-zA-Z](?![a-zA-Z])"
)

_AMOUNT = r"[$€£]?\d+(?:[.,]\d+)*%?"
_APART = re.compile(
    rf"{_AMOUNT}(?:\s*[-\N{{EN DASH}}\N{{EM DASH}}]+\s*{_AMOUNT})+(?:\s+[A-Za-z]{{2}}.*)?"
    r"|\d+(?:\.\d+){2,}|\d+(?:\s+\d+)+"
)
"""A range, date, score or telephone number; an address or version; numbers side by side."""

_SAME_COMMANDS = {
    "lnot": "neg", "lor": "vee", "land": "wedge", "to": "rightarrow", "ne": "neq", "le": "leq",
    "ge": "geq", "overrightarrow": "vec",
}  # fmt: skip
_ABOUT = re.compile(
    r"\A\s*(?:\\approx(?![a-z])|≈|(?:approximately|approx\.?|about|around|roughly|circa)(?=[\s\\]))"
    r"[\s\\]*(?=[-$€£\d.])",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"(?<=\d)(%?)\s*(?:\\text\{\s*)?\((?:(?:in|as of|for|since|during)\s+(?:the\s+year\s+)?\d{4}"
    r"|(?:i\.e\.,?|because|since|namely|that is,?)\s[^()]*"
    r"|\d+\s+[a-z]+(?:(?:\s*,\s*|\s+(?:and|plus)\s+|\s*\+\s*)\d+\s+[a-z]+)+)\)\s*\}?\s*\Z",
    re.IGNORECASE,
)
"""What explains a number behind it: "34 (in 2015)", "12 (4 red and 8 blue)"."""

_CHEMICAL = re.compile(r"(?:[A-Z][a-z]?(?:_?\d+)?|[()])+")
_RANGE_OF = re.compile(
    r"[,;]?\s*\(?\s*(?:where|for|with)?\s*([kmnl])\s*"
    r"(?:(?:\\in|∈)\s*(?:\\mathbb\s*)?\{?([ZN\N{DOUBLE-STRUCK CAPITAL Z}])\}?|is any? integer)"
    r"\s*\)?[\s.$]*\Z"
)
"""What says that a variable of a family of solutions is an integer."""

_LITERAL = re.compile(
    r"\d{1,2}:\d\d(?::\d\d)?|\d+(?:\s*x\s*\d+)+"
    r"|(?=[A-Za-z\d-]*[A-Za-z]\d)[A-Za-z\d-]+|[A-Z]{3,}|[A-Za-z]{4,}(?:\s+[A-Za-z]+)*"
    r"|[A-Za-z]+(?:\s+[A-Za-z]+){2,}"
)
"""What is not mathematics if both sides are such: a time, a size ("4x2"), a code ("AB12"),
capitals or words."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """How answers are compared.

    Attributes:
        kind: one of `KINDS`.
        tolerance: allowed relative error of numbers.
        options: texts of the question's options by letter.
        math: settings for mathematics.
    """

    kind: str = "auto"
    tolerance: float | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    math: math.MathOptions = dataclasses.field(default_factory=math.MathOptions)


def grade(
    response: str,
    answer: str | Sequence[str] | None,
    kind: str = "auto",
    *,
    tolerance: float | None = None,
    options: Sequence[str] | Mapping[str, str] | None = None,
    precision: numbers.Precision | None = None,
    strict: bool = True,
) -> Verdict:
    """Grades a response.

    Args:
        response: the final turn.
        answer: the right answer or several acceptable ones, plain or LaTeX, boxed or not. Without
            any, responses are undecided.
        kind: one of `KINDS`; ``auto`` derives it from the answer.
        tolerance: allowed relative error of numbers, if the benchmark defines one.
        options: the texts of the question's options, from A. With them, an option's text counts as
            its letter and vice versa.
        precision: decimals to round numbers to before comparing, or ``whole`` to cut them off.
        strict: names of variables matter, and sets differ from tuples.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"the kind of an answer must be one of {', '.join(KINDS)}, got '{kind}'")
    rules = Rules(
        kind,
        tolerance,
        choices.options_by_letter(options),
        math.MathOptions(precision, strict),
    )
    expected = [reference(each) for each in _as_list(answer)]
    kinds = [_kind(each, rules) for each in expected]
    found = _found(response, kinds, rules)
    whole = extract.final_part(response)
    if "text" in kinds and (found is None or found.prose):
        for phrase in extract.phrases(response):
            if any(compare(phrase, each, rules) for each in expected):
                return Verdict(True, phrase, "concluded:text")
    if found is None:
        if any(_repeats(whole, each, rules) for each in expected):
            return Verdict(True, whole, "bare:text")
        return Verdict(False, None, "undecided", True, "no answer was found")
    if len(found.text) > _LONGEST:
        return Verdict(False, found.text, "undecided")
    found = dataclasses.replace(found, text=text.half_width(found.text))
    values = [found.text]
    if found.text.count("=") > 1 and not any("=" in each for each in expected):
        chain = sets.sides(found.text)
        if len(chain) > 2 and len(sets.split(found.text)) == 1:
            values.append(chain[-1])  # "S = \\pi r l = 24\\pi"
    if found.prose or extract.is_prose(found.text):
        value = _value_in(found.text, kinds, rules)
        values += [] if value is None else [value]
    pointed = numbers.with_decimal_points(found.text)
    if pointed is not None and cues.writes_decimal_commas(whole):
        values.insert(0, pointed)
    for value in values:
        for each in expected:
            how = compare(value, each, rules)
            if how is not None:
                return Verdict(True, value, f"{found.where}:{how}")
    if found.where != "boxed" and any(_repeats(whole, each, rules) for each in expected):
        return Verdict(True, whole, "bare:text")
    if _equal_with_decimal_points(found.text, expected, rules):
        return Verdict(False, found.text, "undecided", True, _COMMA)
    reason = _undecided(values[-1], found.prose and len(values) == 1, expected, kinds, rules)
    if reason:
        return Verdict(False, found.text, "undecided", True, reason)
    return Verdict(False, values[-1], f"{found.where}:{kinds[0]}")


def _repeats(response: str, expected: str, rules: Rules) -> bool:
    """Returns whether a whole response is the reference."""
    if _kind(expected, rules) == "text":
        return text.same_text(response, expected)
    return text.same_answer(response, expected)


def _equal_with_decimal_points(answer: str, expected: Sequence[str], rules: Rules) -> bool:
    """Returns whether an answer equals a reference if a comma of either is a decimal point."""
    pointed = numbers.with_decimal_points(answer) if "," in answer else None
    pairs: list[tuple[str | None, str | None]] = [(pointed, each) for each in expected]
    pairs += [(answer, numbers.with_decimal_points(each)) for each in expected if "," in each]
    return any(a is not None and b is not None and compare(a, b, rules) for a, b in pairs)


def grade_boxed(
    response: str, answers: Sequence[str], options: Sequence[str] | None = None
) -> Verdict:
    """Grades only boxed answers; for training, whose prompt asks for a box.

    With ``options``, the answer is one of them, by letter or by text.
    """
    if extract_boxed(extract.final_part(response)) is None:
        return Verdict(False, None, "undecided", True, "the response has no box")
    return grade(response, answers, "option" if options else "auto", options=options)


def grade_stated(
    response: str, answers: Sequence[str], options: Sequence[str] | None = None
) -> Verdict:
    """Grades an answer in any form that `grade` finds; as `grade_boxed` otherwise."""
    return grade(response, answers, "option" if options else "auto", options=options)


def asks_for_another_form(prompt: str) -> bool:
    """Returns whether a prompt asks for the answer after "Answer:" or "####" or in <answer>.

    So do the rows of DAPO, of verl's GSM8K and of R1-V; one that also asks for a box does not.
    """
    return "boxed" not in prompt and _ANOTHER_FORM.search(prompt) is not None


_ANOTHER_FORM = re.compile(
    r"####|<answer>|\banswer:\s*[$<\[{]|\b(?:form|format|line|with|after|by)\b[^.\n]{0,40}\banswer\s*:",
    re.IGNORECASE,
)


def equivalent(
    answer: str,
    expected: str,
    kind: str = "auto",
    *,
    options: Sequence[str] | Mapping[str, str] | None = None,
    precision: numbers.Precision | None = None,
) -> bool:
    """Returns whether two answers are the same, without extracting them from a response.

    Args:
        answer, expected: the two.
        kind, options, precision: as of `grade`.
    """
    rules = Rules(
        kind, options=choices.options_by_letter(options), math=math.MathOptions(precision)
    )
    return compare(text.half_width(answer), reference(expected), rules) is not None


def kind_of(answer: str, kind: str = "auto") -> str:
    """Returns the kind by which responses are compared with a reference."""
    return _kind(reference(answer), Rules(kind))


def reference(answer: str) -> str:
    """Returns a reference answer without its box or the solution around it."""
    answer = text.undoubled(text.half_width(answer))
    if "boxed" in answer:
        boxed = boxed_answer(answer) or open_box(answer)
        if boxed:
            return boxed
    return answer.strip()


def compare(answer: str, expected: str, rules: Rules, depth: int = 0) -> str | None:
    """Returns the name of the rule by which ``answer`` equals ``expected``, or None."""
    if not answer.strip() or not expected.strip() or len(answer) > _LONGEST:
        return None
    kind = _kind(expected, rules)
    if kind == "option":
        return "option" if _same_option(answer, expected, rules) else None
    if kind == "yes_no":
        said = choices.yes_no(answer)
        return "yes_no" if said is not None and said == choices.yes_no(expected) else None
    joined = [_AND_BEFORE.sub(" ", each) for each in (answer, expected)]
    if text.same_text(*joined):
        if kind == "text" or text.same_symbols(*joined):
            return "number" if kind in ("number", "count") else "text"
        if text.primes_differ(*joined):
            return None
    if (same := dates.same_date(answer, expected)) is not None:
        return "date" if same else None
    meant = [text.latex_plain(each).strip(" .$") for each in (answer, expected)]
    if rules.kind != "text" and any(all(map(each.fullmatch, meant)) for each in _SAME_MEANING):
        return "text"
    if kind == "text":
        return _texts(answer, expected)
    if depth < _DEPTH:
        congruent = residues.same_residue(
            answer, expected, lambda a, b: compare(a, b, rules, depth + 1) is not None
        )
        if congruent is not None:
            return "congruence" if congruent else None
    answer, expected = _without_wide_units(answer, expected)
    unit = other = ""
    if _quantity(answer) is None or _quantity(expected) is None:  # two numbers: `_numbers` knows
        (mine, unit), (wanted, other) = units.parted(answer), units.parted(expected)
        if unit and other and units.same_unit(unit, other) is False:
            return None
    answer, expected = _aligned(answer, expected)
    decided = _numbers(answer, expected, kind, rules)
    if decided is not None:
        return "number" if decided else None
    if kind == "count":
        return None
    found = _mathematics(answer, expected, kind, rules, depth)
    if found or depth >= _DEPTH or not (unit or other):
        return found
    return compare(mine, wanted, rules, depth + 1)


def _kind(expected: str, rules: Rules) -> str:
    if rules.kind not in ("auto", "math"):
        return rules.kind
    if choices.letter_of(expected) is not None or choices.letters_listed(expected):
        return "option"
    if text.normal(expected) in ("yes", "no", "true", "false"):
        return "yes_no"
    if numbers.parse_quantity(expected) is not None:
        return "number"
    return "math" if rules.kind == "math" or _MATHEMATICAL.search(expected) else "text"


def _same_option(answer: str, expected: str, rules: Rules) -> bool:
    mine, wanted = _chosen(answer, rules), _chosen(expected, rules)
    if wanted is None:
        return text.same_answer(answer, expected)
    if rules.options:
        return mine == wanted
    # The reference may give the option's text, and an answer only this text, or the letter and
    # another text ("A. Johnson" is not "A. Lincoln").
    own, given = choices.text_of_option(expected), choices.text_of_option(answer)
    if own and text.same_answer(answer, own):
        return True
    return mine == wanted and not (own and given and not text.same_answer(given, own))


def _chosen(answer: str, rules: Rules) -> choices.Letters | None:
    inner = Rules("auto", rules.tolerance, {}, rules.math)

    def same(mine: str, option: str) -> bool:
        if choices.letter_of(mine) is not None or extract.is_prose(mine):
            return False
        return compare(mine, option, inner) is not None

    found = choices.chosen(answer, rules.options, same)
    if found is None and not rules.options:
        # The option may be given as a variable's value ("\\boxed{x = B}").
        letter = choices.letter_of(sets.without_name(answer))
        return None if letter is None else frozenset({letter})
    return found


def _texts(answer: str, expected: str) -> str | None:
    """Compares short texts, as read from a picture, by number, spelling or parts.

    The peers that evaluate InfoVQA in an agentic setting (VerlTool and Pixel-Reasoner, in
    ``verl_tool/workers/reward_manager/pixel_reasoner.py``) compare with math-verify, ignoring case:
    numbers are equal by value ("1000" and "1,000", "2.50" and "2.5"), and units are ignored
    ("40 years" and "40"). lmms-eval and VLMEvalKit report ANLS, which `metrics.anls` computes.
    """
    answer, expected = _short_text(answer), _short_text(expected)
    if "/" not in answer + expected:
        mine, wanted = numbers.parse_quantity(answer), numbers.parse_quantity(expected)
        if mine is not None and wanted is not None:
            return "number" if numbers.same_quantity(mine, wanted) else None
        times = numbers.parse_time(answer), numbers.parse_time(expected)
        if times[0] is not None and times[1] is not None:
            return "number" if numbers.same_time(times[0], times[1]) else None
    if text.joined(answer) == text.joined(expected) != "":
        return "text"
    answer, expected = (re.sub(r"(?<=[A-Za-z])\s*[&/]\s*", " and ", e) for e in (answer, expected))
    parts, others = sets.read_parts(answer), sets.read_parts(expected)
    if parts is None or others is None or not {parts.shape, others.shape} <= {"list", "closed"}:
        return None

    def same_part(part: str, other: str) -> bool:
        return compare(part, other, Rules("text")) is not None

    same = sets.same_parts(parts, others, same_part, ordered=False)
    return "list" if same else None


def _short_text(answer: str) -> str:
    """Returns a text without LaTeX, with "5M" as "5 million" and "10 am" as "10:00 am"."""
    plain = re.sub(
        r"(?<=\w)\s+times$|^in\s+(?=\d{4}$)", "", text.plain_text(answer).strip(), flags=re.I
    )
    plain = _ORDINAL_WORD.sub(lambda match: _ORDINALS[match.group().lower()], plain)
    plain = re.sub(r"\A(\d[\d,.]*\s*-\s*\d[\d,.]*)\s+[A-Za-z]+\Z", r"\1", plain)  # a range's unit
    plain = re.sub(r"(?<=\d)%(?=\s*(?:-|to)\s*[\d.,]+%)", "", plain)  # "70%-80%" is "70-80%"
    plain = re.sub(r"^(\d{1,2})\s*(?=[ap]\.?m\.?$)", r"\1:00 ", plain, flags=re.IGNORECASE)
    return numbers.with_scale_word(plain)


def _numbers(answer: str, expected: str, kind: str, rules: Rules) -> bool | None:
    """Returns whether two numbers are equal; None if they are not both numbers."""
    wanted, mine = _quantity(expected), _quantity(answer) or _restated(answer)
    if mine is None and kind == "count":
        mine = _count_in_words(answer)
    symbols = rules.kind in ("auto", "math")
    if mine and wanted and symbols and rules.math.strict and sets.names_differ(answer, expected):
        return False
    same_letters = mine and wanted and sorted(mine.unit) == sorted(wanted.unit)
    if mine and wanted and mine.glued and same_letters and mine.unit.isalpha():
        mine = dataclasses.replace(mine, unit=wanted.unit)  # "2ab" is "2ba"
    for each, other in itertools.product(_readings(mine, answer), _readings(wanted, expected)):
        if not (symbols and _product(each, other)) and numbers.same_quantity(
            each,
            other,
            tolerance=rules.tolerance,
            precision=rules.math.precision,
            count=kind == "count",
        ):
            return True
    if mine and wanted:
        letters = (mine.glued or wanted.glued) and mine.unit and wanted.unit
        return None if symbols and letters else False  # "2aab" may be "2a^2b"
    times = numbers.parse_time(answer), numbers.parse_time(expected)
    if times[0] is not None and times[1] is not None and (times[0][1] or times[1][1]):
        return numbers.same_time(times[0], times[1])
    return None


def _readings(first: numbers.Quantity | None, answer: str) -> list[numbers.Quantity]:
    """Returns a quantity and what else its text may mean: "5K" is 5000, "three quarters" 3/4."""
    plain = text.latex_plain(text.undelimited(answer))
    scaled = numbers.with_scale_word(plain)
    found = [first, None if scaled == plain else numbers.parse_quantity(text.undelimited(scaled))]
    parts = _FRACTION_WORDS.fullmatch(text.trim(plain))
    if parts is not None:
        word = (parts[1] or ("a" if parts[2].lower() == "half" else "")).lower()
        over = numbers.parse_quantity("one" if word == "a" else word)
        if over is not None:
            found.append(numbers.Quantity(over.value / _PARTS[parts[2].lower()]))
    return [each for each in found if each is not None]


def _quantity(answer: str) -> numbers.Quantity | None:
    # "\\$5" keeps its currency only as written.
    return numbers.parse_quantity(answer) or numbers.parse_quantity(sets.without_name(answer))


def _without_wide_units(answer: str, expected: str) -> tuple[str, str]:
    """Removes a Chinese, Japanese or Korean unit after a value, unless both have different ones."""
    found = [_WIDE_UNIT.fullmatch(each.strip()) for each in (answer, expected)]
    units = {match[2] for match in found if match}
    if len(units) != 1 or any(re.search(cues.OTHERWISE, unit) for unit in units):
        return answer, expected
    first, second = (m[1] if m else each for m, each in zip(found, (answer, expected), strict=True))
    return first, second


def _aligned(answer: str, expected: str) -> tuple[str, str]:
    """Unifies what the sides may write differently: "5 = x", "y =", "f(x) =", "4 to 1"."""
    answer, expected = (
        _TURNED.sub(r"\2 = \1", text.undelimited(each)) for each in (answer, expected)
    )
    plain = text.latex_plain(answer), text.latex_plain(expected)
    for ratio, other in (plain, plain[::-1]):
        if re.search(r"\d\s*:\s*\d", ratio) and _TO.fullmatch(other.strip()):
            answer, expected = (_TO.sub(r"\1:\2", each) for each in plain)
    answer = _REMARK.sub(r"\1", _ABOUT.sub("", answer))
    (mine, numbers_of), (wanted, others) = map(_without_range, (answer, expected))
    if not numbers_of or not others or numbers_of == others:
        answer, expected = mine, wanted
    names = [_FUNCTION_OF.match(each) for each in (answer, expected)]
    if all(names) and {bool(name[1]) for name in names if name} == {True, False}:
        answer, expected = (_FUNCTION_OF.sub("", each) for each in (answer, expected))
    return answer, expected


def _without_range(answer: str) -> tuple[str, str]:
    """Returns solutions without ", k \\in \\mathbb{Z}", and the name of that set or ""."""
    plain = text.latex_plain(answer)
    found = _RANGE_OF.search(plain)
    before = plain[: found.start()] if found else ""
    if found is None or not re.search(rf"(?<![A-Za-z\\]){found[1]}(?![a-z])", before):
        return answer, ""
    return before, "N" if found[2] == "N" else "Z"


def _restated(answer: str) -> numbers.Quantity | None:
    """Reads a number that is given twice: "three (3)"."""
    match = re.fullmatch(r"(.*\S)\s*\((.*)\)", text.trim(text.latex_plain(answer)))
    if match is None:
        return None
    first, second = numbers.parse_quantity(match[1]), numbers.parse_quantity(match[2])
    same = first is not None and second is not None and first.value == second.value
    return first if same else None


def _count_in_words(answer: str) -> numbers.Quantity | None:
    """Reads a count with words around it ("only 3", "a pair"), or in another language."""
    if cues.REFUSED.search(answer):
        return None
    plain = numbers.parse_quantity(_bare_count(answer))
    if plain is not None:
        return plain
    value = counts.read_count(answer)
    value = counts.counted(answer) if value is None else value
    return None if value is None else numbers.Quantity(Fraction(value))


def _bare_count(answer: str) -> str:
    """Returns a count without the words around it ("only 3", "a pair", "none of them"), or ""."""
    plain = re.sub(r"^(?:only|just|exactly|precisely|a total of|all)\s+", "", text.normal(answer))
    if re.match(r"(?:no one|none of|no)\b(?!.*(?:[,;:.\d]|\b(?:and|or|but)\b))", plain):
        return "0" if numbers.number_word(plain.removeprefix("no one")) is None else ""
    dozens = re.match(r"(half a|a|one|two|three|four|five)\s+dozens?\b", plain)
    if dozens:
        return str(_DOZENS[dozens[1]])
    words = re.sub(r"^an?\s+", "", plain).split()
    if words and words[0] in _COUNT_WORDS and len(words) <= 4:
        return _COUNT_WORDS[words[0]]
    return plain if plain != text.normal(answer) else ""


def _product(mine: numbers.Quantity, wanted: numbers.Quantity) -> bool:
    """Returns whether one side is a number and the other its product with symbols ("10m")."""
    if bool(mine.unit) == bool(wanted.unit):
        return False
    # A reference such as "10cm" is a length; "10m" could be a length or a product.
    unit, glued = mine.unit or wanted.unit, mine.glued or wanted.glued
    return mine.glued or units.is_product(unit, glued=glued)


def _mathematics(answer: str, expected: str, kind: str, rules: Rules, depth: int) -> str | None:
    if _spelling(answer) == _spelling(expected):
        return "text"
    ordered = {"list": False, "ordered": True}.get(kind)
    inner = Rules("auto", rules.tolerance, {}, rules.math)

    def same(part: str, other: str) -> bool:
        return _same_part(part, other, inner, depth + 1)

    regions = intervals.read_regions(answer, expected) if depth < _DEPTH else None
    if regions is not None and intervals.same_region(*regions, same, strict=rules.math.strict):
        return "interval"
    mine, wanted = _with_unit_vectors(answer, expected)
    if mine is not None and wanted is not None and depth < _DEPTH:
        if sets.same_parts(mine, wanted, same, ordered=ordered):
            return "list"
        if all(_plain_numbers(each) for each in (mine, wanted)) or ordered is not None:
            return None
    if _as_written(answer, expected):
        return _texts(answer, expected)
    answer, expected = _in_radians(answer, expected), _in_radians(expected, answer)
    if text.primes_differ(sets.without_name(answer), sets.without_name(expected)):
        return None  # math-verify drops primes, subscripts of numbers and capitals
    based = _bases(answer, expected)
    if based is not None:
        return "number" if based else None
    first, second = _cases_apart(_for_math_verify(expected), _for_math_verify(answer))
    if second.count("{") != second.count("}") or not re.search(r"\w", second):
        return None  # no parser can read this; trying would only cost time
    return "math-verify" if math.same_expression(first, second, rules.math) else None


def _spelling(answer: str) -> str:
    """Returns an answer without what never changes its meaning: spaces, braces around one symbol.

    math-verify takes "mg" in "\\mu mg" for a unit, and knows neither sets (\\mathbb Z) nor H_2O.
    """
    plain = text.latex_plain(answer).strip(" .$")
    for command, same in _SAME_COMMANDS.items():
        plain = re.sub(rf"\\{command}(?![A-Za-z])", rf"\\{same}", plain)
    plain = re.sub(r"(?<!\d)\s|\s(?!\d)", "", plain)
    plain = re.sub(r"(?<!\\)\{(\w|\\[A-Za-z]+)\}", r"\1", plain)
    return plain.replace("_", "") if _CHEMICAL.fullmatch(plain) else plain


def _bases(answer: str, expected: str) -> bool | None:
    """Returns whether two numbers that name their bases ("101_2") are equal; None without these."""
    found = [_BASED.fullmatch(text.latex_plain(each).strip(" .$")) for each in (answer, expected)]
    values = []
    for match in found:
        base = None if match is None else numbers.parse_quantity(match[2] or match[3])
        if match is None or base is None or not 2 <= base.value <= 36:
            return None
        try:
            values.append(int(match[1].replace(" ", ""), int(base.value)))
        except ValueError:  # a digit that the base does not have
            return None
    return values[0] == values[1]


_BASED = re.compile(r"\(?([0-9A-Z ]+)\)?\s*_\s*(?:\{\s*([a-z]+|\d+)\s*\}|(\d))")
_SYMBOL_OR_COMMAND = re.compile(
    r"\\(?:begin|end|text|mathrm|mathbb|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]"
)


def _cases_apart(first: str, second: str) -> tuple[str, str]:
    """Renames capitals that stand beside the same small letters in either of two expressions."""
    used = set(_SYMBOL_OR_COMMAND.findall(first + second))
    free = (letter for letter in "abcdghjklmnopqrstuvwxyz" if not {letter, letter.upper()} & used)
    names = {}
    for symbol in sorted(used):
        small = symbol[:2].lower() + symbol[2:]
        if small != symbol and small in used and (len(symbol) == 1 or symbol[2:].islower()):
            names[symbol] = next(free, symbol)

    def renamed(found: re.Match[str]) -> str:
        name = names.get(found[0])
        return found[0] if name is None else f"{name} " if len(found[0]) > 1 else name

    renamed_first, renamed_second = (
        _SYMBOL_OR_COMMAND.sub(renamed, each) for each in (first, second)
    )
    return renamed_first, renamed_second


def _as_written(answer: str, expected: str) -> bool:
    """Returns whether the sides are not mathematics, though math-verify would compute with them.

    It would take "26-35" for -9, "1 2" for 3, and "listen" for a product of six variables.
    """
    plain = [text.trim(text.latex_plain(e).replace("$", "")) for e in (answer, expected)]
    return any(map(_APART.fullmatch, plain)) or all(map(_LITERAL.fullmatch, plain))


def _in_radians(answer: str, other: str) -> str:
    """Converts an angle in degrees if the other side is a multiple of pi, or an arc function."""
    plain = text.latex_plain(answer).strip(" $")
    if not _ANGLE.fullmatch(plain) or not _RADIANS.search(text.latex_plain(other)):
        return answer
    return f"\\frac{{{plain[:-1]}\\pi}}{{180}}"


def _with_unit_vectors(answer: str, expected: str) -> tuple[sets.Parts | None, sets.Parts | None]:
    """Returns the parts of both sides; those of "3i - 2j" are its components.

    They have as many dimensions as the other side, or three if both are sums of unit vectors.
    """
    mine, wanted = _parts(answer), _parts(expected)
    if (mine is None) == (wanted is None) and mine is not None:
        return mine, wanted
    sums = [
        None if parts is not None else vectors.read_unit_vectors(each)
        for parts, each in ((mine, answer), (wanted, expected))
    ]
    unread = [s is None and p is None for s, p in zip(sums, (mine, wanted), strict=True)]
    if sums == [None, None] or any(unread):
        return mine, wanted
    names = "ij" if any(parts and len(parts.items) == 2 for parts in (mine, wanted)) else "ijk"
    if any(each and set(each) - set(names) for each in sums):
        return mine, wanted
    first, second = (
        parts
        if each is None
        else sets.Parts(tuple(each.get(name, "0") for name in names), "tuple", "(", ")")
        for each, parts in zip(sums, (mine, wanted), strict=True)
    )
    return first, second


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
    return all(_quantity(item) is not None for item in parts.items)


def _for_math_verify(answer: str) -> str:
    """Removes delimiters and unifies the spelling; math-verify does the rest."""
    answer = _COMBINATIONS.sub(
        lambda m: f"\\binom{{{m[1] or m[3] or m[5]}}}{{{m[2] or m[4] or m[6]}}}", answer
    )
    answer = _PLAIN_ROOT.sub(r"\\sqrt{\1}", answer.replace("**", "^"))
    answer = _PLAIN_FUNCTION.sub(lambda found: f"\\{found[1].lower()} ", answer)
    answer = _PLAIN_GREEK.sub(r"\\\1 ", answer)
    plain = text.trim(numbers.marked_ellipsis(text.latex_plain(answer))).replace("$", "")
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", plain):
        angle = r"\d+(?:\.\d+)?|(?<![a-zA-Z\\])[a-zA-Z]|\\[a-z]+"
        plain = re.sub(rf"\{{?({angle})\s*°\}}?", r"{\\frac{\1\\pi}{180}}", plain)
    plain = plain.replace("°", "^{\\circ}")
    # math-verify recognises the imaginary unit only alone; it takes "i(2-i)" for a function.
    plain = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", plain)
    plain = re.sub(
        r"(?<![A-Za-z\\])e\s*\^\s*\{\s*(-?\d*)i(?=[A-Za-z\\])", r"e^{\1 i \\cdot ", plain
    )
    return re.sub(r"(?<![A-Za-z\\])i\s*(?=\()", r"i \\cdot ", plain)


def _found(response: str, kinds: Sequence[str], rules: Rules) -> Found | None:
    """Returns the answer of a response, with the ways of stating it that its kind has."""
    kind = next((each for each in ("option", "yes_no", "count") if each in kinds), "auto")
    found = extract.find_answer(response, kind=kind)
    if found is not None and found.where in ("boxed", "marked"):
        if kind == "option" and _chosen(found.text, rules) is None:
            named = choices.named_option(found.text, rules.options)
            return found if named is None else Found(_capitals(named), found.where)
        return found
    closing = extract.closing(response)
    if closing and kind == "option":
        concluded = (
            found is not None
            and found.where == "concluded"
            and choices.letter_of(found.text) is None
        )
        if concluded and choices.names_letter(closing.splitlines()[-1]):
            found = None  # "B is wrong because x = 4", where 4 is the text of an option
        if closing.endswith("?"):
            return None
        return _found_option(closing, found, rules) or found
    if closing and kind == "yes_no" and (found is None or choices.yes_no(found.text) is None):
        return _led(closing) or found
    return found


def _found_option(closing: str, found: Found | None, rules: Rules) -> Found | None:
    letters = choices.stated_choice(closing, rules.options)
    if letters is not None:
        return Found(_capitals(letters), "stated")
    if cues.RETRACTED.search(closing):
        return None
    if len(closing) <= _SHORT and (letters := _chosen(closing, rules)):
        return Found(_capitals(letters), "bare")
    letters = choices.last_choice(closing, rules.options)
    if letters is not None:
        return Found(_capitals(letters), "concluded")
    said = {letter: choices.yes_no(option) for letter, option in rules.options.items()}
    if sorted(map(str, said.values())) == ["False", "True"] and (led := _led(closing)):
        letters = frozenset(each for each in said if said[each] == choices.yes_no(led.text))
        return Found(_capitals(letters), led.where)
    last = closing.splitlines()[-1]
    if found is not None and not found.prose and (letters := _chosen(found.text, rules)):
        return Found(_capitals(letters), found.where)
    letters = choices.named_option(found.text if found else last, rules.options)
    if letters is not None and extract.is_certain(last):
        return Found(_capitals(letters), "named")
    match = re.match(r"\s*(?:\*\*)?(\([A-Z]\)|[A-Z][.):])(?=\s|\*|$)", closing)
    if match is None or choices.is_excluded(closing[match.end(1) - (match[1][0] != "(") :]):
        return None
    letter = match[1].strip("().:")
    if choices.agreeing(letter, closing.splitlines()[0], rules.options) is None:
        return None  # "A. 12", where 12 is another option
    return Found(match.group(1), "led")


def _capitals(letters: choices.Letters) -> str:
    return ", ".join(sorted(letters)).upper()


def _led(closing: str) -> Found | None:
    """Returns the yes or no that a response begins or ends with."""
    said = re.sub(r"^(?:[^.!?\n]*\?\s*)+", "", closing)
    judged = _JUDGED.search(said)
    if judged is not None and not extract.is_denied(said[: judged.start()]):
        right = bool(judged[1]) != (judged[2].lower() in ("true", "correct", "right"))
        return Found("yes" if right else "no", "concluded")
    if not said or not extract.is_certain(said.splitlines()[-1]):
        return None
    lead = choices.leading(said)
    if lead is not None:
        return Found("yes" if lead else "no", "led")
    if len(said) <= _SHORT and "\n" not in said and choices.yes_no(said) is not None:
        return Found(said, "bare")
    match = re.search(r"[\s,:]\**(yes|no)\**\W*$", said, re.IGNORECASE)
    before = said[: match.start()] if match else ""
    clause = cues.CLAUSE.split(before)[-1]
    if match is None or extract.is_denied(before) or _NOBODY.search(before):
        return None
    if choices.yes_no(f"{clause} {match[1]}") is None:
        return None
    return Found(match.group(1), "concluded")


def _value_in(answer: str, kinds: Sequence[str], rules: Rules) -> str | None:
    """Returns the only value in an answer that is a sentence, if values are expected."""
    if "option" in kinds:
        letters = choices.stated_choice(answer, rules.options)
        letters = letters or choices.named_option(answer, rules.options)
        if letters is not None or choices.names_letter(answer):
            return _capitals(letters) if letters else None
    if not _VALUES - {"yes_no"} & set(kinds):
        return None
    value = extract.value_in(answer, "count" if "count" in kinds else "auto")
    if value is None and {"count", "number"} & set(kinds) and extract.is_asserted(answer):
        value = numbers.number_word(answer)
    return value


def _undecided(
    answer: str,
    prose: bool,
    expected: Sequence[str],
    kinds: Sequence[str],
    rules: Rules,
) -> str:
    """Returns why a response that equals no reference is not decided to be wrong, or ""."""
    if not expected:
        return "there is no reference"
    for each, kind in zip(expected, kinds, strict=True):
        problem = _reference_problem(each, kind, rules)
        if problem:
            return problem
    chosen = {"option", "yes_no"} & set(kinds)
    counted = "count" in kinds and _count_in_words(answer) is not None
    sentence = prose or not answer or (_VALUES & set(kinds) and extract.is_prose(answer))
    if not chosen and not counted and sentence:
        return "the answer is a sentence, which may be right in other words"
    mine = None if chosen else _quantity(answer)
    for each in expected:
        other = _quantity(each)
        if not mine or not other or (mine.glued and other.glued):
            continue
        if numbers.same_but_for_words(mine, other, tolerance=rules.tolerance):
            return _UNIT
    read = [_readable(answer, *each, rules) for each in zip(expected, kinds, strict=True)]
    return "" if any(read) else _UNREAD


_UNIT = "the number is the same, but the words or signs beside it may mean something else"
_COMMA = "its comma may be a decimal point, or may stand between two numbers"
_UNREAD = "the answer is not in a form that the rules for its kind read"
_SYMBOLS = ("GREEK", "MICRO", "DOUBLE-STRUCK", "SCRIPT", "MATHEMATICAL")
"""Beginning of the Unicode names of letters that are symbols."""

_KNOWN_WORDS = frozenset(
    {
        *("none", "no", "not", "solution", "solutions", "real", "number", "numbers", "all", "set"),
        *("undefined", "does", "exist", "infinite", "infinitely", "many", "infinity", "empty"),
        *("and", "or", "if", "for", "where", "yes", "true", "false", "odd", "even", "impossible"),
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh"),
        *("tanh", "log", "exp", "lim", "max", "min", "mod", "gcd", "lcm", "det"),
    }
)


def _readable(answer: str, expected: str, kind: str, rules: Rules) -> bool:
    """Returns whether the rules for a kind read an answer, so that a difference means wrong."""
    if kind == "option":
        mine = _chosen(answer, rules)
        return mine is not None and mine != _chosen(expected, rules)
    if kind == "yes_no":
        return choices.yes_no(answer) is not None
    if kind in ("count", "number", "math", "list", "ordered"):
        if numbers.parse_quantity(answer) is not None or numbers.parse_time(answer) is not None:
            return True
        if kind == "count":
            if cues.REFUSED.search(answer):
                return False
            named = numbers.parse_quantity(sets.without_name(answer)) or _restated(answer)
            return named is not None or _count_in_words(answer) is not None
        if intervals.unread(answer, expected):
            return False
        if intervals.read_regions(answer, expected) is not None:
            return True
    return _unknown_words(answer, expected, only_scripts=kind == "text") == []


def _unknown_words(answer: str, expected: str, *, only_scripts: bool) -> list[str]:
    """Returns the words of an answer that the rules do not know and the reference lacks.

    Args:
        answer: the response's answer.
        expected: the reference.
        only_scripts: count only words in a script (or with accents) that the reference lacks.
    """
    plain = re.sub(r"\\[A-Za-z]+", " ", text.latex_plain(answer))
    words = re.findall(r"[^\W\d_]+", plain.casefold())
    known = set(re.findall(r"[^\W\d_]+", text.latex_plain(expected).casefold())) | _KNOWN_WORDS
    foreign = [
        w for w in words if not w.isascii() and not unicodedata.name(w[0], "").startswith(_SYMBOLS)
    ]
    if only_scripts:
        return [word for word in foreign if expected.isascii()]
    return [word for word in words if word not in known and (len(word) >= 3 or word in foreign)]


def reference_problem(
    answer: str, kind: str = "auto", options: Sequence[str] | Mapping[str, str] | None = None
) -> str:
    """Returns why a reference answer cannot be compared by rule, or "" if it can.

    Responses that do not equal such a reference are undecided.
    """
    rules = Rules(kind, options=choices.options_by_letter(options))
    value = reference(answer)
    return _reference_problem(value, _kind(value, rules), rules)


def _reference_problem(expected: str, kind: str, rules: Rules) -> str:
    missing = expected.strip().casefold() in ("none", "null", "nan")
    if not expected.strip() or (missing and rules.kind not in ("text", "count")):
        return "the reference is empty"
    if kind == "option" and _chosen(expected, rules) is None:
        return "the reference is not an option"
    if kind == "yes_no" and choices.yes_no(expected) is None:
        return "the reference is neither yes nor no"
    if kind == "count" and numbers.parse_quantity(expected) is None:
        return "the reference is not a number"
    if (kind != "text" and kind not in _VALUES and extract.is_prose(expected)) or (
        kind == "text" and rules.kind != "text" and extract.is_prose(expected)
    ):
        return "the reference is a sentence"
    return ""


def option_letters(answer: str, options: Sequence[str]) -> choices.Letters | None:
    """Returns the options that a reference answer names by letter, text or value, or None.

    Args:
        answer: the reference.
        options: the options' texts, from A.
    """
    rules = Rules("option", options=choices.options_by_letter(options))
    return _chosen(reference(answer), rules)


def _as_list(answer: str | Sequence[str] | None) -> list[str]:
    if answer is None or isinstance(answer, str):
        return [] if answer is None else [answer]
    return [str(each) for each in answer if each is not None]
