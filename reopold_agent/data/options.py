"""Options of multiple-choice rows: which they are, how they are shown, which of them is right."""
# ruff: noqa: RUF001  # options are written with full-width punctuation too

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

from reopold_agent.data.checks import RowError
from reopold_agent.data.pictures import as_list, is_null
from reopold_agent.judges.choices import letter_of
from reopold_agent.judges.rules import option_letters
from reopold_agent.judges.text import latex_plain, same_text

LETTERS = "ABCDEFGHIJ"

_PROBLEM = "options"
"""Kind of the problem that options, question and answer do not agree."""

_COLUMNS = ("options", "choices", "answer_choices")

_PERHAPS = ("option", "choice", "candidates")
"""Columns that hold options or something else, such as one option's letter."""

_LETTERED = re.compile(
    r"(?:option|choice)(?:[_ -]+|(?!s))(?P<letter>[a-z])|op(?P<short>[a-j])"
    r"|(?:option|choice)[_ -]?(?P<number>\d{1,2})",
    re.IGNORECASE,
)
"""Columns of one option each, but not ``options``: SEED-Bench's ``choice_a``, MedMCQA's ``opa``,
WinoGrande's ``option1``."""


def options_of(row: Mapping[str, Any], answers: Sequence[str] | None = None) -> list[str]:
    """Returns the texts of a row's options, or an empty list if it has none.

    They are in ``options``, ``choices`` or ``answer_choices`` (a list, an object by letter, the
    hub's ``text`` and ``label``, or one of these or a lettered list as text), in ``option``,
    ``choice`` or ``candidates`` if these are such a list or object, in ``option_a``, ``choice_a``,
    ``opa`` or ``option1`` and so on, in We-Math's ``option``, or else in the columns A, B and so
    on. All names but these letters may be written in capitals too.

    Args:
        row: the row.
        answers: the row's answers, where its format does not say that the columns A, B and so on
            hold options. They then do if both A and B are filled, unless all are numbers and no
            answer is a letter or one of them: the columns of a table.

    Raises:
        RowError: there are more than can be lettered, one between two others is empty, or they are
            not texts.
    """
    for column in (*_COLUMNS, *_PERHAPS):
        for name in row:
            if str(name).strip().casefold().replace(" ", "_") != column:
                continue
            if column in _PERHAPS and not isinstance(as_list(row[name]), (list, tuple, Mapping)):
                continue
            if found := _filled(_given(row, name)):
                return _texts(found)
    if found := _filled(_in_columns(row)):
        return _texts(found)
    lettered = [row.get(letter) for letter in ascii_uppercase]
    if answers is not None:
        if listed := options_in(str(row.get("option") or "")):  # We-Math's own reader shows it
            return _texts(listed)
        if any(
            is_blank(value) or not isinstance(value, (str, int, float)) for value in lettered[:2]
        ):
            return []
        first_gap = next((i for i, value in enumerate(lettered) if is_blank(value)), 26)
        if first_gap <= len(LETTERS):
            lettered = lettered[: len(LETTERS)]  # a column "N" or "X" is none of them
        if not _can_be_options(_filled(lettered), answers):
            return []
    return _texts(_filled(lettered))


def _in_columns(row: Mapping[str, Any]) -> list[Any]:
    """Returns the values of the columns of one option each, in order; a missing one is None."""
    letters: dict[str, Any] = {}
    numbers: dict[int, Any] = {}
    for name, value in row.items():
        if not (match := _LETTERED.fullmatch(str(name).strip())):
            continue
        if match["number"]:
            numbers[int(match["number"])] = value
        else:
            letters[(match["letter"] or match["short"]).upper()] = value
    if any(not is_blank(value) for value in letters.values()):
        return [letters.get(letter) for letter in ascii_uppercase]
    first = 0 if 0 in numbers else 1
    return [numbers.get(number) for number in range(first, max(numbers, default=0) + 1)]


def with_options(question: str, options: Sequence[str]) -> str:
    """Returns the question with its options, unless it lists them already.

    They are listed if each stands after its letter: "(A) 3", "A. 3", "A: 3" or "A - 3", anywhere,
    or "A 3" at the beginning of a line.

    Raises:
        RowError: the question lists them under other letters.
    """
    if not options:
        return question
    text = "\n".join(_plain(line) for line in question.splitlines())
    found = [_labels(option, text) for option in options]
    if all(letter in labels for letter, labels in zip(LETTERS.lower(), found, strict=False)):
        return question
    # "A:B = B:A" lists no options, even if they are called A and B.
    if len(options) > 1 and all(found) and not any(letter_of(option) for option in options):
        raise RowError(
            _PROBLEM,
            f"the question lists the {len(options)} options under other letters than their column",
        )
    listed = "\n".join(
        f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)
    )
    return f"{question}\nOptions:\n{listed}"


def right_options(
    answers: Sequence[str], options: Sequence[str], *, by_letter: bool = False
) -> tuple[str, ...]:
    """Returns the right options by letter ("B"; "A, C" if both belong to one answer).

    Args:
        answers: letters, texts or values of options.
        options: their texts.
        by_letter: whether the format says that an answer is a letter; it may otherwise be an
            option's text, "A" for example.

    Raises:
        RowError: an answer is none of the options, or could be two of them.
    """
    found: dict[str, None] = {}
    for answer in answers:
        letters = option_letters(answer, options)
        written = [
            letter
            for letter, option in zip(LETTERS.lower(), options, strict=False)
            if same_text(answer, option)
        ]
        if len(written) == 1 and not by_letter:
            if letters is not None and letters != set(written):
                raise RowError(
                    _PROBLEM,
                    f"the answer '{answer[:40]}' is the letter of one option and the text of "
                    "another; give the letter of the right one in the column 'label'",
                )
            letters = frozenset(written)
        if letters is None:
            raise RowError(_PROBLEM, _no_option(answer, len(options), len(written)))
        found[", ".join(sorted(letters)).upper()] = None
    return tuple(found)


def _no_option(answer: str, count: int, same: int) -> str:
    if same > 1:
        return f"the answer '{answer[:40]}' is the text of {same} of the {count} options"
    told = (
        f"the answer '{answer[:40]}' is neither the letter nor the text of one of {count} options"
    )
    if answer.isdigit():
        told += "; an option's number, counted from 0, belongs in a column 'label'"
    return told


def labelled_option(row: Mapping[str, Any]) -> str | None:
    """Returns the letter of the option in the hub's column ``label``: its number, from 0.

    None if the row has no options or no label; -1 is the hub's word for no label.

    Raises:
        RowError: see `options_of`.
    """
    label = row.get("label")
    if is_blank(label) or isinstance(label, bool) or not isinstance(label, (str, int, float)):
        return None
    number = str(label).strip().removesuffix(".0")
    options = options_of(row, ["A"]) if number != "-1" else []
    if not options:
        return None
    if not number.isdecimal():
        return number
    if int(number) >= len(options):
        raise RowError(_PROBLEM, f"the label {number} is none of 0 to {len(options) - 1}")
    return LETTERS[int(number)]


def check_label(row: Mapping[str, Any], right: Sequence[str], count: int) -> None:
    """Compares the right options with the hub's ``label``, if it is one of the options.

    Args:
        row: the row.
        right: letters of the right options (`right_options`).
        count: number of options.

    Raises:
        RowError: the label is another option.
    """
    label = row.get("label")
    if is_blank(label) or isinstance(label, bool) or not isinstance(label, (str, int, float)):
        return
    letters = LETTERS[:count]
    told = text_of_value(label).removesuffix(".0")
    letter = dict(zip(map(str, range(count)), letters, strict=True)).get(told, told)
    if len(letter) == 1 and letter in letters and letter not in ", ".join(right):
        raise RowError(
            _PROBLEM,
            f"the answer is option {', '.join(right)}, but the column 'label' says {told}, which "
            f"is option {letter}, counted from 0; correct one of them, or remove 'label'",
        )


_OPTION_MARKS = (
    re.compile(r"(?:\A|[\n;；])\s*\(?([A-J])(?:\)|[.．:：、])\s*"),
    re.compile(r"(?:\A|\s)\(?([A-J])(?:\)|[.．:：、])\s*"),
)
"""Labels of options: each on a line or after a semicolon; else each after a space."""


def options_in(text: str) -> list[str]:
    """Returns the texts of options that are written one after the other.

    We-Math writes "A. 3; B. 4", MathVerse "A:3\\nB:4". The labels must be A, B, C and so on in
    this order; where they are not, the text is not understood and the list is empty.
    """
    for pattern in _OPTION_MARKS:
        marks = list(pattern.finditer(text))
        labels = "".join(mark[1] for mark in marks)
        if len(labels) < 2 or not LETTERS.startswith(labels) or text[: marks[0].start()].strip():
            continue
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        found = [text[m.end() : end].strip(" \n;；") for m, end in zip(marks, ends, strict=True)]
        return found if all(found) else []
    return []


def list_of(row: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the list in a column, or an empty one if the column is missing or null.

    A list that is written as text, as in tsv files, is read (``['3', '4']``).

    Raises:
        RowError: the column holds something else.
    """
    value = as_list(row.get(name))
    if is_blank(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = written(value)
        if value is None:
            raise RowError("wrong type", f"'{name}' is no list: {row[name][:40]}")
    if not isinstance(value, (list, tuple)):
        raise RowError("wrong type", f"'{name}' must be a list, got {type(value).__name__}")
    return list(value)


def written(text: str) -> Any:
    """Returns the value of a list or an object that is written as text, as tsv files have it.

    It is Python's or JSON's (with null, true and false). None if the text is something else, such
    as an interval.

    Raises:
        RowError: texts stand in it without commas, which would be read as one text, or a backslash
            as in ``\\frac`` is not doubled, which would be read as a control character.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on backslashes that stay
            value = ast.literal_eval(text.strip())
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text.strip()).readline)
                  if t.type not in (tokenize.NL, tokenize.NEWLINE)]  # fmt: skip
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        try:
            value, tokens = json.loads(text), []
        except (ValueError, RecursionError):
            return None
    for first, second in pairwise(tokens):
        if first.type == second.type == tokenize.STRING:
            raise RowError("wrong type", f"texts without a comma between them: {text[:40]}")
    if re.search(r"(?<!\\)\\x0[78bc]", repr(value)):
        raise RowError("wrong type", f"backslashes in a written list must be doubled: {text[:40]}")
    return value


def is_blank(value: Any) -> bool:
    """Returns whether a value is missing: null, NaN or a blank text."""
    return is_null(value) or (isinstance(value, str) and not value.strip())


def _filled(values: Sequence[Any]) -> list[Any]:
    """Returns values up to the last that is not empty; an empty one between them is None."""
    given = [None if is_blank(value) else value for value in values]
    while given and given[-1] is None:
        given.pop()
    return given


def _given(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Returns the options in a column, in any of the forms that `options_of` documents."""
    value = row.get(name)
    if isinstance(value, str):
        if lettered := options_in(value):
            return lettered
        if value.lstrip().startswith("{"):
            value = written(value)
    if not isinstance(value, Mapping):
        return list_of({name: row.get(name)}, name)
    labels, texts = as_list(value.get("label")), as_list(value.get("text"))
    if isinstance(texts, (list, tuple)):
        labels = ascii_uppercase[: len(texts)] if labels is None else labels
        fits = isinstance(labels, Sequence) and len(labels) == len(texts)
        value = {str(label): text for label, text in zip(labels, texts)} if fits else {}  # noqa: B905
    by_letter = {str(key).strip().upper(): option for key, option in value.items()}
    if not by_letter or not set(by_letter) <= set(ascii_uppercase):
        raise RowError(
            "wrong type", f"'{name}' must be a list, or an object with the keys A, B and so on"
        )
    return [by_letter.get(letter) for letter in ascii_uppercase]


def _texts(values: Sequence[Any]) -> list[str]:
    """Returns options as texts without letters of their own.

    Raises:
        RowError: they cannot be lettered, or are not texts.
    """
    if len(values) > len(LETTERS):
        raise RowError(_PROBLEM, f"{len(values)} options; {len(LETTERS)} are possible")
    if None in values:
        raise RowError(_PROBLEM, f"option {LETTERS[values.index(None)]} of {len(values)} is empty")
    for value in values:
        if not isinstance(value, (str, int, float)):
            kind = type(value).__name__
            raise RowError("wrong type", f"an option must be a text or a number, got {kind}")
    texts = [text_of_value(value) for value in values]
    bare = options_in("\n".join(texts))
    if len(bare) == len(texts):
        return bare
    own = [mark[1] for text in texts if (mark := _OPTION_MARKS[0].match(text))]
    if 1 < len(own) == len(texts) == len(set(own)):
        raise RowError(
            _PROBLEM,
            f"the options' own letters are {', '.join(own)}; "
            f"put them in the order {', '.join(LETTERS[: len(own)])}, or remove the letters",
        )
    return texts


_EXACT = 2**53
"""Larger numbers in floating point may stand for another whole number."""


def text_of_value(value: str | float) -> str:
    """Returns a text or a number as text; pandas makes 3.0 of a 3 in a column with empty cells."""
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        value = int(value)
    return str(value).strip()


def _can_be_options(values: Sequence[Any], answers: Sequence[str]) -> bool:
    if not all(_is_number(value) for value in values if value is not None):
        return True
    texts = ["" if value is None else text_of_value(value) for value in values]
    return any(
        letter_of(answer) is not None or option_letters(answer, texts) is not None
        for answer in answers
    )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _plain(text: str) -> str:
    """Returns a text without differences in width, case, Markdown and delimiters of formulas."""
    plain = latex_plain(unicodedata.normalize("NFKC", text)).replace("$", "")
    return " ".join(re.sub(r"\*\*|__", "", plain).split()).casefold()


_LABEL = re.compile(
    r"(?<![a-z0-9])[(\[]?\s*([a-j])\s*(?:[)\].:、]+\s*(?:[-–—]\s*)?|\s[-–—]\s*)|^([a-j])\s+",
    re.MULTILINE,
)
"""A letter before an option, in a text without capitals (see `with_options`)."""


def _labels(option: str, text: str) -> set[str]:
    """Returns the letters that stand before an option in a question; both as from `_plain`."""
    words = _plain(option).rstrip(" .;,")
    inside = re.compile(r"[a-z0-9]|[.,]\d") if words[-1:].isalnum() else None
    return {
        label[1] or label[2]
        for label in _LABEL.finditer(text)
        if text.startswith(words, label.end())
        and not (inside and inside.match(text, label.end() + len(words)))
    }
