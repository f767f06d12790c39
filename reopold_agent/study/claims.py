"""Tests of the paper's claims on a study's numbers. Verdicts are computed, never typed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from reopold_agent.study.analyse import (
    MIN_SEEDS,
    Difference,
    Estimate,
    difference,
    estimate,
    reach_over_seeds,
    reach_share,
)
from reopold_agent.study.collect import Results
from reopold_agent.study.figures import decile_means, mean_time_shares, scaling_points
from reopold_agent.tracking.history import History

YES, NO, UNDECIDED, MISSING = "yes", "no", "not decided", "not measured"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the result here.

    Attributes:
        claim: in a few words, with its place in the paper.
        here: the numbers.
        verdict: ``yes``, ``no``, ``not decided`` (the interval contains both) or ``not measured``.
    """

    claim: str
    here: str
    verdict: str


def verdict_of(found: Difference | None) -> str:
    """Returns the verdict on the claim that a difference is positive."""
    if found is None:
        return MISSING
    return {1: YES, -1: NO, 0: UNDECIDED}[found.sign]


def better(claim: str, results: Results, first: str, second: str) -> Claim:
    """Tests whether the second setting ends with more success than the first."""
    found = difference(results.final_successes(first), results.final_successes(second))
    return Claim(claim, show_difference(found), verdict_of(found))


def greater_mean(
    claim: str, results: Results, key: str, small: str, large: str, *, until: float = 1.0
) -> Claim:
    """Tests whether a metric of training is greater in one setting than in another.

    Args:
        claim: its text.
        results: results of the study.
        key: name of the metric.
        small: setting with the smaller mean, according to the claim.
        large: the other setting.
        until: share of the steps, from the first, over which to average.
    """
    found = difference(
        _step_means(results, small, key, until), _step_means(results, large, key, until)
    )
    if found is None:
        return Claim(claim, "-", MISSING)
    means = [fmean(_step_means(results, each, key, until).values()) for each in (small, large)]
    here = (
        f"{results.title(small)} {means[0]:.3g}, {results.title(large)} {means[1]:.3g}; "
        f"difference {show(found.estimate, '.3g')}"
    )
    return Claim(claim, here, verdict_of(found))


def heavy_tail(claim: str, results: Results, label: str) -> Claim:
    """Tests whether strongly negative rewards outnumber strongly positive ones (figure 4)."""
    gaps: list[float] = []
    below, above, least = [], [], 0.0
    for record in results.records.get(label, {}).values():
        windows = record.history.windows("reward/histogram")
        if not windows:
            continue
        edges, counts = History.histogram(windows[0][1], "reward/histogram")
        shares = counts / counts.sum()
        below.append(float(shares[edges[1:] <= -_FAR].sum()))
        above.append(float(shares[edges[:-1] >= _FAR].sum()))
        gaps.append(below[-1] - above[-1])
        least = min(least, *(row["reward/min"] for row in windows[0][1]))
    if not gaps:
        return Claim(claim, "-", MISSING)
    found = Difference(estimate(gaps), 0, 0)
    here = (
        f"{100 * fmean(below):.2g} % of tokens below -{_FAR:g} nats (the least {least:.1f}), "
        f"{100 * fmean(above):.2g} % above +{_FAR:g}"
    )
    return Claim(claim, here, verdict_of(found))


def low_entropy_is_silent(claim: str, results: Results, label: str) -> Claim:
    """Tests whether the lower 60 % of the tokens by entropy carry less than a tenth of |R|."""
    means = [value.mean for value in decile_means(results, label)]
    if len(means) != 10 or not sum(means):
        return Claim(claim, "-", MISSING)
    share = sum(means[:6]) / sum(means)
    here = f"the lower 60 % carry {100 * share:.2g} % of the summed |R| ({results.title(label)})"
    return Claim(claim, here, YES if share < _SILENT else NO)


def below(claim: str, results: Results, label: str, key: str, bound: float, skip: float) -> Claim:
    """Tests whether a share of tokens stays below a bound in every step after the first ones."""
    worst, everything = 0.0, []
    for record in results.records.get(label, {}).values():
        steps, values = record.history.series(key)
        late = values[steps >= skip * record.steps]
        everything += late.tolist()
        worst = max(worst, float(late.max(initial=0.0)))
    if not everything:
        return Claim(claim, "-", MISSING)
    here = (
        f"mean {100 * fmean(everything):.2g} %, at most {100 * worst:.2g} % of tokens of a step "
        f"after the first {100 * skip:.0f} % of steps ({results.title(label)})"
    )
    return Claim(claim, here, YES if worst < bound else NO)


def time_share(claim: str, results: Results, label: str, low: float, high: float) -> Claim:
    """Tests whether the teacher's share of a step lies in the paper's range."""
    if label not in results.records:
        return Claim(claim, "-", MISSING)
    share = mean_time_shares(results, label)["teacher"]
    here = f"{100 * share:.1f} % ({results.title(label)})"
    return Claim(claim, here, YES if low <= share <= high else NO)


def rises(claim: str, results: Results, label: str) -> Claim:
    """Tests whether avg@k and pass@k both end higher than before training (figure 6)."""
    start = results.model("student")
    records = results.records.get(label, {}).values()
    probes = [record.probes[-1] for record in records if record.probes]
    if start is None or not probes:
        return Claim(claim, "-", MISSING)
    k = start.samples
    gains = {
        f"avg@{k}": (start.avg, [probe.avg for probe in probes]),
        f"pass@{k}": (start.pass_at(k), [probe.pass_at(k) for probe in probes]),
    }
    signs, parts = [], []
    for name, (before, after) in gains.items():
        gain = Difference(estimate([value - before for value in after]), 0, 0)
        signs.append(gain.sign)
        parts.append(f"{name} {before:.3f} to {show(estimate(after))}")
    verdict = YES if min(signs) == 1 else NO if min(signs) == -1 else UNDECIDED
    return Claim(claim, ", ".join(parts), verdict)


def smaller_range(claim: str, results: Results, steady: str, moving: str) -> Claim:
    """Tests whether final success varies less over a family's values than over another's."""
    ranges = [_ranges(results, family) for family in (steady, moving)]
    found = difference(ranges[0], ranges[1])
    if found is None:
        return Claim(claim, "-", MISSING)
    here = (
        f"greatest less smallest success over the values, by seed: {steady} "
        f"{show(estimate(list(ranges[0].values())))}, {moving} "
        f"{show(estimate(list(ranges[1].values())))}; difference {show(found.estimate)}"
    )
    return Claim(claim, here, verdict_of(found))


def worst_beats_best(claim: str, results: Results, family: str, other: str) -> Claim:
    """Tests whether a family's lowest mean success is above another family's highest."""
    labels, other_labels = _by_mean(results, family), _by_mean(results, other)
    if not labels or not other_labels:
        return Claim(claim, "-", MISSING)
    worst, best = labels[0], other_labels[-1]
    found = difference(results.final_successes(best), results.final_successes(worst))
    here = f"{results.title(worst)} less {results.title(best)}: {show_difference(found)}"
    return Claim(claim, here, verdict_of(found))


def reaches(
    claim: str, results: Results, fast: str, slow: str, bound: float, *, episodes: bool
) -> Claim:
    """Tests whether the fast setting needs at most a share of the slow one's whole run."""
    fast_curves = results.curves(fast, episodes=episodes)
    slow_curves = results.curves(slow, episodes=episodes)
    if not fast_curves or not slow_curves:
        return Claim(claim, "-", MISSING)
    unit = "episodes" if episodes else "steps"
    gain = difference(
        {seed: curve[0][1] for seed, curve in slow_curves.items()},
        {seed: curve[-1][1] for seed, curve in slow_curves.items()},
    )
    if gain is not None and gain.estimate.n >= MIN_SEEDS and gain.sign < 1:
        here = (
            f"{results.title(slow)} does not learn here (end less start {show(gain.estimate)}), "
            "so its end is no target"
        )
        return Claim(claim, here, UNDECIDED)
    target = fmean(curve[-1][1] for curve in slow_curves.values())
    whole = max(x for curve in slow_curves.values() for x, _ in curve)
    share, low, high = reach_share(fast_curves, slow_curves)
    fast_reach = reach_over_seeds(fast_curves, target)
    slow_reach = reach_over_seeds(slow_curves, target)
    where = "not reached" if fast_reach.of_mean is None else f"{fast_reach.of_mean:.0f}"
    here = (
        f"target {target:.3f}, {results.title(slow)}'s end after {whole:.0f} {unit}; mean curve "
        f"{where} {unit}"
    )
    if share is not None:
        here += f", {share:.2f} of the run [{_end(low)}, {_end(high)}]"
    here += f"; seeds that get there {fast_reach.reached} of {len(fast_reach.per_seed)}"
    if fast_reach.median is not None:
        here += f", median {fast_reach.median:.0f}"
    if slow_reach.of_mean is not None:
        here += (
            f"; {results.title(slow)}'s own mean curve is first there at {slow_reach.of_mean:.0f}"
        )
    if min(len(fast_curves), len(slow_curves)) < MIN_SEEDS:
        verdict = UNDECIDED
    elif high is not None and high <= bound:
        verdict = YES
    elif low is None or low > bound:
        verdict = NO
    else:
        verdict = UNDECIDED
    return Claim(claim, here, verdict)


def faster_than_teacher(claim: str, results: Results, label: str) -> Claim:
    """Tests whether a student reaches any of the teacher's pass@k in less time."""
    student_seconds, teacher_seconds = results.latency(label), results.latency("teacher")
    student, teacher = (scaling_points(results, each, "pass") for each in (label, "teacher"))
    factors = {}
    for k, seconds in teacher_seconds.items():
        if k not in teacher:
            continue
        ks = [j for j in sorted(student_seconds) if j in student]
        values = [student[j].mean for j in ks]
        if values and max(values) >= teacher[k].mean:
            order = np.maximum.accumulate(values)
            times = [student_seconds[j] for j in ks]
            factors[k] = seconds / float(np.interp(teacher[k].mean, order, times))
    if not teacher_seconds or not student:
        return Claim(claim, "-", MISSING)
    enough = len(results.records[label]) >= MIN_SEEDS
    if not factors:
        here = f"{results.title(label)} reaches no pass@k of the teacher"
        return Claim(claim, here, NO if enough else UNDECIDED)
    best = max(factors, key=lambda k: factors[k])
    here = (
        f"at most {factors[best]:.2f} times as fast, at the teacher's pass@{best} of "
        f"{teacher[best].mean:.3f} (means; no interval)"
    )
    return Claim(claim, here, (YES if factors[best] > 1 else NO) if enough else UNDECIDED)


def show(value: Estimate, form: str = ".3f") -> str:
    """Formats a mean and its interval."""
    if value.low is None or value.high is None:
        return f"{value.mean:{form}} (one seed)"
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def show_difference(found: Difference | None) -> str:
    """Formats a paired difference, its interval, and the numbers of seeds by sign."""
    if found is None:
        return "-"
    value = found.estimate
    if value.low is None or value.high is None:
        return f"{value.mean:+.3f} (one seed)"
    return (
        f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}], better in {found.better} and "
        f"worse in {found.worse} of {value.n} seeds"
    )


_FAR = 2.5
"""Nats: rewards beyond this count as outliers. It is an edge of the histograms, near the floor of
lambda 0.1."""

_SILENT = 0.1


def _step_means(results: Results, label: str, key: str, until: float) -> dict[int, float]:
    means = {}
    for seed, record in results.records.get(label, {}).items():
        steps, values = record.history.series(key)
        early = values[steps < until * record.steps]
        if early.size:
            means[seed] = float(early.mean())
    return means


def _family(results: Results, family: str) -> list[str]:
    return [label for label in results.records if results.setting(label).family == family]


def _ranges(results: Results, family: str) -> dict[int, float]:
    ends: list[Mapping[int, float]] = [
        results.final_successes(each) for each in _family(results, family)
    ]
    if not ends:
        return {}
    seeds = set.intersection(*(set(each) for each in ends))
    return {s: max(e[s] for e in ends) - min(e[s] for e in ends) for s in sorted(seeds)}


def _by_mean(results: Results, family: str) -> list[str]:
    return sorted(
        _family(results, family), key=lambda label: fmean(results.final_successes(label).values())
    )


def _end(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.2f}"
