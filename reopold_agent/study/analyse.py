"""Statistics over seeds: means with intervals, paired differences, and when curves reach a target.

Pure functions. The unit is the seed, never the task: all seeds play the same held-out tasks, so
an interval over tasks would say nothing about another training run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
import numpy.typing as npt

from reopold_agent.common.statistics import bootstrap_confidence, bootstrap_interval

MIN_SEEDS = 5
"""Least number of seeds for a verdict: two seeds agree by chance every second time, five once in
sixteen."""

Curve = Sequence[tuple[float, float]]
"""Points (x, success), x ascending: steps or episodes."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval; ``low`` and ``high`` are None for a single seed."""

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
        """1 if the interval lies above 0, -1 if below, 0 if it contains 0 or seeds are too few."""
        low, high = self.estimate.low, self.estimate.high
        if low is None or high is None or self.estimate.n < MIN_SEEDS:
            return 0
        return 1 if low > 0 else -1 if high < 0 else 0


@dataclass(frozen=True)
class Reach:
    """When training reaches a target, in steps or episodes.

    Attributes:
        per_seed: by seed; None where the target was not reached.
        median: over all seeds, where not reaching counts as infinite; None if infinite.
        of_mean: where the mean curve of all seeds reaches the target, or None.
        low: lower end of the 95 % interval of ``of_mean`` (bootstrap over seeds); None if infinite.
        high: upper end.
    """

    per_seed: dict[int, float | None]
    median: float | None
    of_mean: float | None
    low: float | None
    high: float | None

    @property
    def reached(self) -> int:
        """Number of seeds that reached the target."""
        return sum(value is not None for value in self.per_seed.values())


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Returns the mean over seeds with its 95 % interval (bootstrap, see `bootstrap_confidence`).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, None, 1)
    low, high = bootstrap_interval(values, seed=seed, confidence=bootstrap_confidence(n))
    return Estimate(fmean(values), low, high, n)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Returns second minus first over their shared seeds, or None without any."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    gaps = [second[seed] - first[seed] for seed in shared]
    return Difference(estimate(gaps), sum(g > 0 for g in gaps), sum(g < 0 for g in gaps))


def smoothed(values: Sequence[float]) -> list[float]:
    """Averages each inner point with its two neighbours; the first and the last stay."""
    inner = [fmean(values[i - 1 : i + 2]) for i in range(1, len(values) - 1)]
    return [*values[:1], *inner, *values[1:][-1:]]


def reach(curve: Curve, target: float) -> float | None:
    """Returns the x at which a curve, lightly smoothed, first is at or above a target.

    The curve is linear between two points. None if it never reaches the target.
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
    """Returns the mean curve over seeds, at the points that all of them have."""
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(x, fmean(table[x] for table in tables)) for x in shared]


def band(curves: Sequence[Curve]) -> list[tuple[float, Estimate]]:
    """Returns `mean_curve` with an interval at each point."""
    tables = [dict(curve) for curve in curves]
    return [(x, estimate([table[x] for table in tables])) for x, _ in mean_curve(curves)]


def reach_over_seeds(
    curves: Mapping[int, Curve], target: float, *, seed: int = 0, resamples: int = 2000
) -> Reach:
    """Applies `reach` to each seed and to the mean curve, with an interval by bootstrap over seeds.

    The target is taken as fixed; `reach_share` also accounts for its spread.
    """
    per_seed = {key: reach(curve, target) for key, curve in sorted(curves.items())}
    found = median(math.inf if value is None else value for value in per_seed.values())
    low = high = None
    if len(curves) > 1:
        matrix = _Matrix(list(curves.values()))
        random = np.random.default_rng(seed)
        draws = [matrix.reach(random, lambda: target) for _ in range(resamples)]
        low, high = _interval(draws, bootstrap_confidence(len(curves)))
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
    """Returns the share of the slow run after which the fast one reaches the slow one's end.

    Both are mean curves. The interval is bootstrapped over the seeds of both, so that it accounts
    for the uncertainty of the target.

    Returns:
        Share, lower and upper end; None stands for "not reached" (for the upper end: not
        reached in more draws than the interval leaves out).
    """
    whole = max(x for curve in slow.values() for x, _ in curve)
    target = fmean(curve[-1][1] for curve in slow.values())
    reached = reach(mean_curve(list(fast.values())), target)
    share = None if reached is None else reached / whole
    n = min(len(fast), len(slow))
    if n < 2:
        return share, None, None
    random = np.random.default_rng(seed)
    matrix = _Matrix(list(fast.values()))
    ends = np.asarray([curve[-1][1] for curve in slow.values()])

    def drawn_target() -> float:
        return float(ends[random.integers(len(ends), size=len(ends))].mean())

    draws = [matrix.reach(random, drawn_target) / whole for _ in range(resamples)]
    low, high = _interval(draws, bootstrap_confidence(n))
    return share, low, high


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the value below which a share of the values lies; infinities are allowed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]


class _Matrix:
    """Curves over seeds as a matrix, for fast resampling."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        tables = [dict(curve) for curve in curves]
        self.xs = sorted(set.intersection(*(set(table) for table in tables)))
        self.ys: npt.NDArray[np.float64] = np.asarray(
            [[table[x] for x in self.xs] for table in tables]
        )

    def reach(self, random: np.random.Generator, target: Callable[[], float]) -> float:
        """Returns where the mean curve of resampled seeds reaches the target, or infinity."""
        rows = random.integers(len(self.ys), size=len(self.ys))
        mean = self.ys[rows].mean(axis=0)
        found = reach(list(zip(self.xs, mean.tolist(), strict=True)), target())
        return math.inf if found is None else found


def _interval(draws: Sequence[float], confidence: float) -> tuple[float | None, float | None]:
    low, high = ((1 - confidence) / 2, (1 + confidence) / 2)
    return _finite(quantile(draws, low)), _finite(quantile(draws, high))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
