"""The rule grader: exact verdicts, and properties over many answers."""

from __future__ import annotations

import itertools
import json
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import real_data

from reopold_agent.judges import JUDGES, Verdict, equivalent, extract_boxed, grade

many = settings(max_examples=1500)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{7}", "7"),
        ("It is \\boxed{ 7 }.", "7"),
        ("\\boxed{1} or rather \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\text{a {b} c}}", "\\text{a {b} c}"),
        ("\\boxed{}", ""),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{a \\boxed{b} c}", "b"),
        ("\\boxed{a \\boxed{b} c", "b"),
        ("} \\boxed{3} }", "3"),
        ("{ \\boxed{4} ", "4"),
        ("\\boxed{line\nbreak}", "line\nbreak"),
        ("\\boxed{x} {y}", "x"),
        ("\\fbox{7}", "7"),
        ("\\framebox{7}", "7"),
        ("\\boxed 12", "12"),
        ("\\boxed7", "7"),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, answer: str) -> None:
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    "text",
    ["", "7", "boxed{7}", "\\boxed{7", "\\boxed", "{7}", "\\fbox7{", "\\boxed}7{"],
)
def test_no_box_no_answer(text: str) -> None:
    assert extract_boxed(text) is None
    assert JUDGES.get("rules").grade(text, ["7"]) == Verdict(False, None, "undecided", True)


SAME = [
    ("7", "7"),
    ("7.", "7"),
    ("7.0", "7"),
    ("007", "7"),
    ("+7", "7"),
    ("7.00", "7.0"),
    ("7e2", "700"),
    (".5", "0.5"),
    ("-.5", "-0.5"),
    ("0.5", ".5"),
    ("1,000", "1000"),
    ("1,234,567.5", "1234567.5"),
    ("$5", "5"),
    ("\\$5", "5"),
    ("$7$", "7"),
    ("12%", "12 %"),
    ("12\\%", "12%"),
    ("12.0%", "12%"),
    ("Yes", "yes"),
    ("YES.", "yes"),
    ("Yes!", "yes"),
    ("'yes'", "Yes"),
    ("\\text{yes}", "yes"),
    ("\\textbf{\\text{Yes}}", "yes"),
    ("red  car", "red car"),
    ("stra\u00dfe", "STRASSE"),
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("B. a red car", "B"),
    ("B: a red car", "B"),
    ("(B) a red car", "B"),
    ("\\text{(B)}", "B"),
    ("B", "(B)"),
    ("B", "B."),
    ("5!", "5!"),
    ("5!", "120"),
    ("12%", "12"),
    ("12", "12%"),
    ("12%", "0.12"),
]
DIFFERENT = [
    ("7", "8"),
    ("7", "-7"),
    ("7", "70"),
    ("7", "7.1"),
    (".5", "5"),
    ("5!", "5"),
    ("12%", "1200"),
    ("1,00", "100"),
    ("1,2", "12"),
    ("1,2", "1.2"),
    ("yes", "no"),
    ("yes and no", "yes"),
    ("", ""),
    ("", "7"),
    ("7", ""),
    (".", "!"),
    ("A", "B"),
    ("a cat", "A"),
    ("AB", "A"),
    ("A or B", "A"),
    ("Bus", "B"),
    ("7 8", "78"),
    ("nan", "0"),
    ("inf", "1e999"),
    ("1e999999999999999999999", "1"),
]


@pytest.mark.parametrize(("answer", "expected"), SAME)
def test_same(answer: str, expected: str) -> None:
    assert equivalent(answer, expected)
    verdict = grade(f"So \\boxed{{{answer}}}", ["other", expected])
    assert (verdict.correct, verdict.extracted) == (True, answer)


@pytest.mark.parametrize(("answer", "expected"), DIFFERENT)
def test_different(answer: str, expected: str) -> None:
    assert not equivalent(answer, expected)
    verdict = grade(f"\\boxed{{{answer}}}", [expected])
    assert (verdict.correct, verdict.extracted) == (False, answer)


def test_the_answer_outside_the_box_does_not_count() -> None:
    assert not grade("The answer is 7. \\boxed{8}", ["7"]).correct
    assert not grade("\\boxed{7} No: \\boxed{8}", ["7"]).correct
    assert not grade("\\boxed{7}", []).correct


numbers = st.decimals(-(10**9), 10**9, places=3)


@many
@given(numbers, numbers)
def test_numbers_are_equal_exactly_when_their_values_are(a: Decimal, b: Decimal) -> None:
    plain = format(a, "f")
    assert equivalent(plain, format(b, "f")) == (a == b)
    assert equivalent(f"{a:,}", plain)
    assert equivalent(f" ${plain}$. ", plain)
    assert equivalent(f"{plain}000", plain)
    assert equivalent(f"{plain}%", plain)
    assert not equivalent(format(a + 1, "f"), plain)


words = st.text(st.characters(codec="utf-8"), max_size=12)
noise = st.lists(
    st.sampled_from(
        ["\\boxed{", "\\boxed", "{", "}", "\\text{", "$", "%", "7", ".", "e9", "(b)", " "]
    )
    | st.text(max_size=3),
    max_size=20,
).map("".join)


@settings(max_examples=800)
@given(noise, noise, noise)
def test_any_text_has_a_verdict(response: str, first: str, second: str) -> None:
    verdict = grade(response, [first, second])
    assert isinstance(verdict.correct, bool)
    assert not (verdict.correct and verdict.undecided)
    if verdict.extracted is None:
        assert not verdict.correct
    strict = JUDGES.get("rules").grade(response, [first, second])
    assert strict == verdict or strict.extracted is None


def simple_boxed(text: str) -> str | None:
    """The definition, written without regard to speed."""
    for start in range(len(text), -1, -1):
        if not text.startswith("\\boxed{", start):
            continue
        depth = 0
        for position in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + 7 : position].strip()
    return None


@many
@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "a", "\\", " "]), max_size=16).map("".join))
def test_the_box_is_found_as_defined(text: str) -> None:
    assert extract_boxed(text) == simple_boxed(text)


@many
@given(words, words)
def test_equality_is_symmetric_for_words_and_reflexive(a: str, b: str) -> None:
    stripped = a.strip(" .,;:!?*\"'`$")
    # Punctuation or a control character alone answers nothing, not even itself.
    if any(c.isalnum() for c in stripped) and "\\" not in a and "$" not in a:
        assert equivalent(a, a)
    if a.casefold() != b.casefold() and a.isalpha() and b.isalpha() and min(len(a), len(b)) > 1:
        assert not equivalent(a, b)
        assert not equivalent(b, a)


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 10_000,
     "\\boxed{" + "\\text{" * 8_000 + "}" * 8_001, "\\boxed{" + "9" * 60_000 + "}",
     "\\boxed{1e" + "9" * 150 + "}", "\\boxed{" + "{}" * 30_000, "\\boxed{" + "1," * 30_000 + "}"],
)  # fmt: skip
def test_a_student_that_repeats_itself_is_graded_at_once(text: str) -> None:
    started = time.perf_counter()
    assert not grade(text, ["7", "12%", "B", "1e5"]).correct
    assert time.perf_counter() - started < 10  # without the bound it takes hours


def test_obvious_answers_of_real_data() -> None:
    """GSM8K's own answers, as themselves, with commas, and off by one."""
    rows = real_data("math", "gsm8k_test.jsonl")
    graded = 0
    for line in rows.read_text(encoding="utf-8").splitlines():
        gold = json.loads(line)["answer"].rsplit("####", 1)[1].strip()
        value = int(gold.replace(",", ""))
        graded += 1
        for same in (gold, str(value), f"{value:,}", f"{value}.0", f"\\${value}"):
            assert grade(f"\\boxed{{{same}}}", [gold]).correct, (same, gold)
        assert not grade(f"\\boxed{{{value + 1}}}", [gold]).correct
        assert not grade(f"\\boxed{{{value}1}}", [gold]).correct
    assert graded == 1319


def test_the_answers_that_real_solutions_box_match_themselves() -> None:
    rows = real_data("math", "math500.jsonl")
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    right = sum(grade(row["solution"], [row["answer"]]).correct for row in found)
    assert (right, len(found)) == (500, 500)
    shifted = sum(
        grade(row["solution"], [other["answer"]]).correct
        for row, other in itertools.pairwise(found)
    )
    same = sum(a["answer"] == b["answer"] for a, b in itertools.pairwise(found))
    assert same <= shifted <= same + 5
