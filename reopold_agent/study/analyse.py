"""Numbers over seeds: means with intervals, paired differences, and how soon a curve gets there.

Pure functions. The unit is the seed, never the task: all seeds play the same held-out tasks, so
an interval over tasks would say nothing about another training run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median

import numpy as np
import numpy.typing as npt

from reopold_agent.eval.metrics import bootstrap_interval

MIN_SEEDS = 5
"""Fewer decide nothing: that two seeds agree by luck alone happens every second time, five once in
sixteen."""

Curve = Sequence[tuple[float, float]]
"""Points (x, success), x ascending: steps or episodes."""

# 97.5 % points of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. ``low`` and ``high`` are None for a single seed, which has no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Second minus first, seed by seed.

    Attributes:
        estimate: mean difference and its interval.
        better: seeds in which the second is greater.
        worse: seeds in which it is smaller.
    """

    estimate: Estimate
    better: int
    worse: int

    @property
    def sign(self) -> int:
        """1 if the interval lies above 0, -1 if below, 0 if it holds 0 or seeds are too few."""
        low, high = self.estimate.low, self.estimate.high
        if low is None or high is None or self.estimate.n < MIN_SEEDS:
            return 0
        return 1 if low > 0 else -1 if high < 0 else 0


@dataclass(frozen=True)
class Reach:
    """How far the seeds had to go to a target.

    Attributes:
        per_seed: by seed; None where the target was not reached.
        median: over all seeds, those that did not arrive counting as infinite; None if infinite.
        of_mean: where the mean curve of all seeds arrives, or None.
        low: lower end of the 95 % interval of ``of_mean``, by drawing seeds; None if infinite.
        high: upper end.
    """

    per_seed: dict[int, float | None]
    median: float | None
    of_mean: float | None
    low: float | None
    high: float | None

    @property
    def reached(self) -> int:
        """How many seeds arrived."""
        return sum(value is not None for value in self.per_seed.values())


def confidence_for(n: int) -> float:
    """The confidence to ask of a percentile bootstrap of n values so that it holds 95 %.

    Percentile intervals of few values are too narrow. Their expansion by sqrt(n / (n - 1)) times
    the ratio of the t to the normal quantile mends most of it (Hesterberg 2015, "What teachers
    should know about the bootstrap", section 5.3).

    Raises:
        ValueError: fewer than two values.
    """
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least two, got {n}")
    t = _T[n - 2] if n - 2 < len(_T) else NormalDist().inv_cdf(0.975)
    return 1 - 2 * NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean over seeds with its 95 % interval (bootstrap over seeds, see `confidence_for`).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, None, 1)
    low, high = bootstrap_interval(values, seed=seed, confidence=confidence_for(n))
    return Estimate(fmean(values), low, high, n)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Second minus first over the seeds that both have; None if there is none."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    gaps = [second[seed] - first[seed] for seed in shared]
    return Difference(estimate(gaps), sum(g > 0 for g in gaps), sum(g < 0 for g in gaps))


def smoothed(values: Sequence[float]) -> list[float]:
    """Each inner point averaged with its two neighbours; the first and the last stay."""
    inner = [fmean(values[i - 1 : i + 2]) for i in range(1, len(values) - 1)]
    return [*values[:1], *inner, *values[1:][-1:]]


def reach(curve: Curve, target: float) -> float | None:
    """The x at which a curve, lightly smoothed, first is at or above a target.

    Between two points the curve is a straight line. None if it never gets there.
    """
    xs, ys = [x for x, _ in curve], smoothed([y for _, y in curve])
    for i, y in enumerate(ys):
        if y >= target:
            if i == 0 or y == ys[i - 1]:
                return float(xs[i])
            part = (target - ys[i - 1]) / (y - ys[i - 1])
            return float(xs[i - 1] + part * (xs[i] - xs[i - 1]))
    return None


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Point by point mean over seeds, at the points that all of them have."""
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(x, fmean(table[x] for table in tables)) for x in shared]


def band(curves: Sequence[Curve]) -> list[tuple[float, Estimate]]:
    """`mean_curve` with intervals."""
    tables = [dict(curve) for curve in curves]
    return [(x, estimate([table[x] for table in tables])) for x, _ in mean_curve(curves)]


def reach_over_seeds(
    curves: Mapping[int, Curve], target: float, *, seed: int = 0, resamples: int = 2000
) -> Reach:
    """`reach` for each seed and for the mean curve, whose interval comes from drawing seeds.

    The interval is that of where this method arrives at a fixed target; see `reach_share` for
    one that takes the target's own spread in.
    """
    per_seed = {key: reach(curve, target) for key, curve in sorted(curves.items())}
    found = median(math.inf if value is None else value for value in per_seed.values())
    low = high = None
    if len(curves) > 1:
        matrix = _Matrix(list(curves.values()))
        random = np.random.default_rng(seed)
        draws = [matrix.reach(random, lambda: target) for _ in range(resamples)]
        low, high = _interval(draws, confidence_for(len(curves)))
    return Reach(
        per_seed, _finite(found), reach(mean_curve(list(curves.values())), target), low, high
    )


def reach_share(
    fast: Mapping[int, Curve],
    slow: Mapping[int, Curve],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float | None, float | None, float | None]:
    """How much of the slow method's whole run the fast one needs for the slow one's final success.

    Mean curves of both; the interval comes from drawing the seeds of both, so that it knows that
    the target is uncertain as well.

    Returns:
        Share, lower and upper end; None stands for "not reached" (for the upper end: for a
        part of the draws that the interval cannot leave out).
    """
    whole = max(x for curve in slow.values() for x, _ in curve)
    target = fmean(curve[-1][1] for curve in slow.values())
    there = reach(mean_curve(list(fast.values())), target)
    share = None if there is None else there / whole
    n = min(len(fast), len(slow))
    if n < 2:
        return share, None, None
    random = np.random.default_rng(seed)
    matrix = _Matrix(list(fast.values()))
    ends = np.asarray([curve[-1][1] for curve in slow.values()])

    def drawn_target() -> float:
        return float(ends[random.integers(len(ends), size=len(ends))].mean())

    draws = [matrix.reach(random, drawn_target) / whole for _ in range(resamples)]
    low, high = _interval(draws, confidence_for(n))
    return share, low, high


def quantile(values: Sequence[float], share: float) -> float:
    """Of a sorted copy the value below which ``share`` lie; infinities are allowed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]


class _Matrix:
    """Curves over seeds as a matrix, for fast draws."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        tables = [dict(curve) for curve in curves]
        self.xs = sorted(set.intersection(*(set(table) for table in tables)))
        self.ys: npt.NDArray[np.float64] = np.asarray(
            [[table[x] for x in self.xs] for table in tables]
        )

    def reach(self, random: np.random.Generator, target: Callable[[], float]) -> float:
        """Where the mean of drawn seeds arrives; infinity if nowhere."""
        rows = random.integers(len(self.ys), size=len(self.ys))
        mean = self.ys[rows].mean(axis=0)
        found = reach(list(zip(self.xs, mean.tolist(), strict=True)), target())
        return math.inf if found is None else found


def _interval(draws: Sequence[float], confidence: float) -> tuple[float | None, float | None]:
    low, high = ((1 - confidence) / 2, (1 + confidence) / 2)
    return _finite(quantile(draws, low)), _finite(quantile(draws, high))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
