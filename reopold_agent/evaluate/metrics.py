"""Metrics from verdicts: over samples, over problems, between runs, and those of benchmarks.

Pure functions: nothing here reads files or calls a model.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from reopold_agent.common.statistics import bootstrap_interval, mcnemar_exact
from reopold_agent.judges.numbers import parse_quantity
from reopold_agent.judges.rules import equivalent
from reopold_agent.judges.text import plain_text

_ANLS_THRESHOLD = 0.5

# Over the samples of one problem


def avg_at_k(correct: Sequence[bool]) -> float:
    """Returns the share of right samples.

    Raises:
        ValueError: there are no samples.
    """
    if not correct:
        raise ValueError("avg@k needs at least one sample")
    return statistics.fmean(map(bool, correct))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the unbiased chance that one of ``k`` samples is right: 1 - C(n-c, k) / C(n, k).

    Args:
        n: samples drawn.
        c: number of right ones.
        k: samples considered.

    Raises:
        ValueError: not 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    # Exact in integers; floats would overflow for many samples.
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def maj_at_k(
    samples: Sequence[tuple[str | None, bool]],
    kind: str = "auto",
    *,
    same: Callable[[str, str], bool] | None = None,
) -> float:
    """Returns 1 if the most frequent answer is right, else 0.

    Answers that the grader takes as equal ("1/2" and "0.5") are counted together. Of equally
    frequent ones the first wins. Samples without an answer are not counted.

    Args:
        samples: extracted answer (None if there is none) and verdict, in the order drawn.
        kind: how answers are compared.
        same: replaces the grader's comparison.
    """
    equal = same or (lambda first, second: equivalent(first, second, kind))
    classes: list[tuple[list[str], bool]] = []
    spelled: dict[str, int] = {}
    for answer, correct in samples:
        if answer is None or not answer.strip():
            continue
        at = spelled.get(answer)
        if at is None:
            found = (i for i, (members, _) in enumerate(classes) if equal(answer, members[0]))
            at = next(found, len(classes))
            spelled[answer] = at
        if at == len(classes):
            classes.append(([], bool(correct)))
        classes[at][0].append(answer)
    if not classes:
        return 0.0
    # max returns the first of equals.
    return float(max(classes, key=lambda each: len(each[0]))[1])


# Over problems


@dataclass(frozen=True)
class PairedComparison:
    """Comparison of two runs on the same problems.

    Attributes:
        difference: mean of the second minus mean of the first.
        low: lower end of the 95 % interval of the difference, by paired bootstrap.
        high: upper end.
        only_first: problems that only the first run got right; None if figures are not 0 or 1.
        only_second: the same for the second run.
        p_value: of McNemar's exact test, two-sided; None in the same case.
    """

    difference: float
    low: float
    high: float
    only_first: int | None = None
    only_second: int | None = None
    p_value: float | None = None


def paired_comparison(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, resamples: int = 10_000
) -> PairedComparison:
    """Compares two runs, problem by problem.

    Raises:
        ValueError: the runs have different numbers of problems, or none.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or not len(a):
        raise ValueError(f"a paired comparison needs the same problems, got {len(a)} and {len(b)}")
    differences = b - a
    low, high = bootstrap_interval(differences.tolist(), seed=seed, resamples=resamples)
    mean = float(differences.mean())
    if not set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        return PairedComparison(mean, low, high)
    only_first, only_second = int((differences < 0).sum()), int((differences > 0).sum())
    p_value = mcnemar_exact(only_first, only_second)
    return PairedComparison(mean, low, high, only_first, only_second, p_value)


# Benchmarks' own


def multi_answer_accuracy(
    rows: Iterable[tuple[str | None, Sequence[str]]], kind: str = "auto"
) -> float:
    """Returns the share of answers that equal one of the accepted ones.

    Raises:
        ValueError: there are no rows.
    """
    return avg_at_k(
        [
            answer is not None and any(equivalent(answer, each, kind) for each in accepted)
            for answer, accepted in rows
        ]
    )


def anls(answer: str, answers: Sequence[str], *, threshold: float = _ANLS_THRESHOLD) -> float:
    """Returns ANLS: the normalised Levenshtein similarity to the closest accepted answer.

    As in the evaluation script of the DocVQA and InfographicVQA challenges (and lmms-eval's
    ``anls``), case and runs of spaces do not matter, and a similarity below the threshold counts as
    0. LaTeX in the answer, which those scripts do not expect, may also be read as text: "40\\%" is
    "40%", and "C:\\new" what it is.
    """
    best = 0.0
    for said in {answer, plain_text(answer)}:
        given = " ".join(said.lower().split())
        for each in answers:
            wanted = " ".join(each.lower().split())
            if longest := max(len(given), len(wanted)):
                best = max(best, 1 - levenshtein(given, wanted) / longest)
    return best if best >= threshold else 0.0


def levenshtein(first: str, second: str) -> int:
    """Returns the least number of insertions, deletions and replacements between two strings.

    Kept by hand: the base install has no library for it.
    """
    if len(first) < len(second):
        first, second = second, first
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        current = [i]
        for j, b in enumerate(second, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


def rmse(pairs: Iterable[tuple[str | None, str]]) -> float | None:
    """Returns the root mean squared error of counts; None if no reference is a number.

    An answer that is missing or not a number counts as 0, so that not answering is no advantage.
    """
    errors = []
    for answer, expected in pairs:
        wanted = parse_quantity(expected)
        if wanted is None:
            continue
        given = None if answer is None else parse_quantity(answer)
        difference = (0 if given is None else given.value) - wanted.value
        # A student may write any number of digits; a float's square must not overflow.
        errors.append(float(min(abs(Fraction(difference)), Fraction(10) ** 150)) ** 2)
    return math.sqrt(statistics.fmean(errors)) if errors else None


def hallusionbench_scores(
    rows: Iterable[tuple[Hashable | None, Hashable, bool]],
) -> dict[str, float]:
    """Returns HallusionBench's aAcc (answers), fAcc (whole figures), qAcc (whole questions).

    Args:
        rows: figure, question and verdict. A figure counts if all its answers are right, a
            question if it is answered right for all its figures. ``figure`` is None where the
            question comes without one; such rows count for aAcc and qAcc only. If rows repeat
            (several samples), each round is scored by itself and the scores are averaged.
    """
    figures: dict[Hashable, list[bool]] = defaultdict(list)
    questions: dict[Hashable, list[bool]] = defaultdict(list)
    seen: dict[Hashable, int] = defaultdict(int)
    answers = []
    for figure, question, correct in rows:
        turn = seen[figure, question]
        seen[figure, question] += 1
        answers.append(correct)
        questions[turn, question].append(correct)
        if figure is not None:
            figures[turn, figure].append(correct)
    scores = {"aAcc": avg_at_k(answers)}
    if figures:
        scores["fAcc"] = avg_at_k([all(group) for group in figures.values()])
    scores["qAcc"] = avg_at_k([all(group) for group in questions.values()])
    return scores


def wemath_scores(rows: Iterable[tuple[Hashable, str, bool]]) -> dict[str, float]:
    """Returns We-Math's four-way score.

    Each problem is asked as a whole (``2steps_multi``) and by step (``2steps_1``, ``2steps_2``):

    * insufficient knowledge (IK): whole wrong, a step wrong;
    * inadequate generalisation (IG): whole wrong, all steps right;
    * complete mastery (CM) and rote memorisation (RM): whole right, and all steps right or not.
      Loosely, CM needs one right step, and RM has none.

    The score is 1 - (IG / 2 + RM + IK) / problems. RM is a share of RM + CM, as in the benchmark;
    the others are shares of the problems. S1, S2 and S3 are the accuracies of
    single steps and of whole two- and three-step problems.

    Args:
        rows: problem, key (as above) and verdict. Problems of which a part is missing are left
            out and counted under ``incomplete``.
    """
    parts: dict[Hashable, dict[str, bool]] = defaultdict(dict)
    steps_of: dict[Hashable, int] = {}
    seen: dict[Hashable, int] = defaultdict(int)
    for problem, key, correct in rows:
        match = re.fullmatch(r"(\d)steps?_(multi|\d)", key)
        if match is None:
            continue
        turn = seen[problem, key]
        seen[problem, key] += 1
        # Two- and three-step problems are numbered separately.
        name = (problem, match[1], turn)
        parts[name][match[2]] = bool(correct)
        steps_of[name] = int(match[1])
    whole: dict[int, list[bool]] = defaultdict(list)
    single: list[bool] = []
    counts: dict[str, int] = defaultdict(int)
    for group, found in parts.items():
        wanted = [str(i) for i in range(1, steps_of[group] + 1)]
        if set(found) != {*wanted, "multi"}:
            counts["incomplete"] += 1
            continue
        steps = [found[each] for each in wanted]
        single += steps
        whole[len(steps)].append(found["multi"])
        counts["problems"] += 1
        if found["multi"]:
            counts["CM_strict" if all(steps) else "RM_strict"] += 1
            counts["CM_loose" if any(steps) else "RM_loose"] += 1
        else:
            counts["IG" if all(steps) else "IK"] += 1
    total = counts["problems"]
    if not total:
        return {}
    scores = {"IK": counts["IK"] / total, "IG": counts["IG"] / total}
    for how in ("strict", "loose"):
        mastered, by_rote = counts[f"CM_{how}"], counts[f"RM_{how}"]
        lost = counts["IG"] / 2 + by_rote + counts["IK"]
        scores[f"score_{how}"] = 1 - lost / total
        scores[f"CM_{how}"] = mastered / total
        scores[f"RM_{how}"] = by_rote / (mastered + by_rote) if mastered + by_rote else 0.0
    scores["S1"] = avg_at_k(single)
    scores |= {f"S{steps}": avg_at_k(verdicts) for steps, verdicts in sorted(whole.items())}
    if counts["incomplete"]:
        scores["incomplete"] = float(counts["incomplete"])
    return scores
