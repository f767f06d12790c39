"""Metrics: hand values, brute force and properties."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reopold_agent.common.statistics import bootstrap_interval, mcnemar_exact
from reopold_agent.evaluate.metrics import (
    anls,
    avg_at_k,
    hallusionbench_scores,
    levenshtein,
    maj_at_k,
    multi_answer_accuracy,
    paired_comparison,
    pass_at_k,
    rmse,
    wemath_scores,
)


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([i < c for i in range(n)], k))
        exact = Fraction(sum(any(draw) for draw in draws), len(draws))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-15)


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert pass_at_k(64, 0, 64) == 0
    assert pass_at_k(64, 1, 64) == 1
    assert pass_at_k(2000, 1000, 1000) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_avg_at_k() -> None:
    assert avg_at_k([True, False, False, True]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        avg_at_k([])


@pytest.mark.parametrize(
    ("samples", "right"),
    [
        ([("1", False), ("2", True), ("2", True)], 1),
        ([("1/2", True), ("3", False), ("3", False), ("0.5", True), ("\\frac12", True)], 1),
        ([("1", False), ("2", True)], 0),  # a tie: the first seen
        ([("2", True), ("1", False)], 1),
        ([("1", False), ("2", True), ("2", True), ("1", False)], 0),
        ([(None, False), (None, False), ("2", True)], 1),  # unanswered never wins
        ([(None, False), ("", False), (" ", False)], 0),
        ([], 0),
        ([("7", True)], 1),
    ],
)
def test_majority(samples: list[tuple[str | None, bool]], right: int) -> None:
    assert maj_at_k(samples) == right


def test_majority_of_options_and_of_own_classes() -> None:
    assert maj_at_k([("B. a car", True), ("A", False), ("(b)", True)], "option") == 1
    parity = [("1", False), ("2", True), ("4", True), ("3", False), ("6", True)]
    assert maj_at_k(parity, same=lambda a, b: int(a) % 2 == int(b) % 2) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.just(True)), max_size=12))
def test_majority_is_the_most_frequent_first_seen(samples: list[tuple[str | None, bool]]) -> None:
    answers = [answer for answer, _ in samples if answer is not None]
    marked = [(a, bool(answers) and a == max(answers, key=answers.count)) for a, _ in samples]
    assert maj_at_k(marked) == bool(answers)


def test_bootstrap_interval() -> None:
    values = [1.0] * 30 + [0.0] * 70
    low, high = bootstrap_interval(values, seed=3)
    # The binomial's standard error is 0.0458.
    assert low == pytest.approx(0.30 - 1.96 * 0.0458, abs=0.015)
    assert high == pytest.approx(0.30 + 1.96 * 0.0458, abs=0.015)
    assert bootstrap_interval(values, seed=3) == (low, high)
    shuffled = values[:]
    random.Random(0).shuffle(shuffled)
    assert bootstrap_interval(shuffled, seed=3) == (low, high)
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    random_values = random.Random(1)
    covered = 0
    for trial in range(300):
        values = [float(random_values.random() < 0.4) for _ in range(80)]
        low, high = bootstrap_interval(values, seed=trial, resamples=500)
        covered += low <= 0.4 <= high
    assert 270 <= covered <= 297


def test_mcnemar_against_the_binomial() -> None:
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_exact(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_exact(3, 3) == 1
    assert mcnemar_exact(1, 9) == pytest.approx(2 * 11 / 1024)
    assert 0 <= mcnemar_exact(900, 1100) < 1e-4
    for a, b in itertools.product(range(7), repeat=2):
        outcomes = list(itertools.product([0, 1], repeat=a + b))
        extreme = sum(sum(o) <= min(a, b) for o in outcomes)
        assert mcnemar_exact(a, b) == pytest.approx(min(1, 2 * extreme / len(outcomes)))


def test_paired_comparison() -> None:
    first = [1.0] * 60 + [0.0] * 40
    second = [1.0] * 55 + [0.0] * 5 + [1.0] * 20 + [0.0] * 20
    compared = paired_comparison(first, second)
    assert (compared.only_first, compared.only_second) == (5, 20)
    assert compared.difference == pytest.approx(0.15)
    assert compared.p_value == pytest.approx(mcnemar_exact(5, 20))
    assert 0 < compared.low < 0.15 < compared.high
    graded = paired_comparison([0.5, 0.25], [0.75, 0.5])
    assert (graded.difference, graded.p_value, graded.only_first) == (0.25, None, None)
    assert (graded.low, graded.high) == (0.25, 0.25)
    with pytest.raises(ValueError, match="same problems"):
        paired_comparison([1.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("paris", ["Paris"], 1),
        ("  New   York ", ["new york"], 1),
        ("pariss", ["paris"], 1 - 1 / 6),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["wxyz", "abce"], 0.75),
        ("abcd", ["abxy"], 0.5),  # equal to the threshold counts
        ("abc", ["axy"], 0),
        ("", ["a"], 0),
        ("a", [""], 0),
        ("a", [], 0),
        # The answer of a box is LaTeX; the accepted ones are not.
        ("40\\%", ["40%"], 1),
        ("\\$40", ["$40"], 1),
        ("$5 to $10", ["$5 to $10"], 1),
        ("C:\\new", ["C:\\new"], 1),
        ("C:\\text{x}", ["C:\\text{x}"], 1),
        ("$40", ["$40"], 1),
        ("$40$", ["40"], 1),
        ("\\text{Red car}", ["red car"], 1),
        ("\\textbf{Q\\&A}", ["q&a"], 1),
        ("\\frac{1}{2}", ["1/2"], 1),
        ("25^\\circ", ["25°"], 1),
        ("3 \\times 4", ["3 \u00d7 4"], 1),
    ],
)
def test_anls(answer: str, accepted: list[str], score: float) -> None:
    assert anls(answer, accepted) == pytest.approx(score)


def slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@settings(max_examples=150, deadline=None)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_levenshtein_as_defined(a: str, b: str) -> None:
    assert levenshtein(a, b) == slow_distance(a, b) == levenshtein(b, a)


def test_rmse() -> None:
    assert rmse([("3", "4"), ("four", "4"), ("10", "7")]) == pytest.approx(math.sqrt(10 / 3))
    assert rmse([(None, "3"), ("a few", "4")]) == pytest.approx(math.sqrt(12.5))
    assert rmse([("3", "red")]) is None
    assert rmse([]) is None
    assert math.isfinite(rmse([("9" * 190, "1")]) or math.inf)


def test_multi_answer_accuracy() -> None:
    rows = [("5 km", ["5", "five"]), ("Red", ["blue", "red"]), (None, ["x"]), ("7", ["8"])]
    assert multi_answer_accuracy(rows) == 0.5


def test_hallusionbench() -> None:
    rows = [
        (None, "q0", True),
        (None, "q1", False),
        ("f1", "q0", True),
        ("f1", "q1", True),
        ("f2", "q0", True),
        ("f2", "q1", False),
    ]
    # 4 of 6 answers; f1 of two figures; q0 of two questions.
    assert hallusionbench_scores(rows) == pytest.approx({"aAcc": 4 / 6, "fAcc": 0.5, "qAcc": 0.5})
    twice = rows + [(figure, question, True) for figure, question, _ in rows]
    assert hallusionbench_scores(twice) == pytest.approx(
        {"aAcc": 10 / 12, "fAcc": 3 / 4, "qAcc": 3 / 4}
    )


def wemath_rows() -> list[tuple[str, str, bool]]:
    """Eight two-step problems, one of each outcome, and a three-step one."""
    rows = []
    for number, (one, two, whole) in enumerate(itertools.product([False, True], repeat=3)):
        rows += [
            (str(number), "2steps_1", one),
            (str(number), "2steps_2", two),
            (str(number), "2steps_multi", whole),
        ]
    rows += [("0", "3steps_1", True), ("0", "3steps_2", False), ("0", "3steps_3", False)]
    return [*rows, ("0", "3steps_multi", True)]


def test_wemath() -> None:
    scores = wemath_scores(wemath_rows())
    # Whole wrong: 3 with a wrong step, 1 with none. Whole right: 4 + 1 (a single right step).
    assert scores["IK"] == pytest.approx(3 / 9)
    assert scores["IG"] == pytest.approx(1 / 9)
    assert scores["CM_strict"] == pytest.approx(1 / 9)
    assert scores["RM_strict"] == pytest.approx(4 / 5)
    assert scores["CM_loose"] == pytest.approx(4 / 9)
    assert scores["RM_loose"] == pytest.approx(1 / 5)
    assert scores["score_strict"] == pytest.approx((9 - 0.5 - 4 - 3) / 9)
    assert scores["score_loose"] == pytest.approx((9 - 0.5 - 1 - 3) / 9)
    assert scores["S1"] == pytest.approx((8 + 1) / (16 + 3))
    assert (scores["S2"], scores["S3"]) == (0.5, 1)
    assert "incomplete" not in scores
    # The score is what mastery and half of poor generalisation are worth.
    assert scores["score_strict"] == pytest.approx(scores["CM_strict"] + scores["IG"] / 2)


def test_wemath_leaves_out_problems_that_miss_a_part_and_keeps_samples_apart() -> None:
    rows = wemath_rows()
    whole = wemath_scores(rows)
    assert wemath_scores([*rows, ("99", "2steps_1", True)]) == {**whole, "incomplete": 1}
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    assert wemath_scores(shuffled) == whole
    wrong = [(problem, key, False) for problem, key, _ in rows]
    mean = statistics.fmean([whole["score_strict"], 0])
    assert wemath_scores(rows + wrong)["score_strict"] == pytest.approx(mean)
    assert wemath_scores([]) == {}
