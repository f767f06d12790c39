"""Intervals and tests of general statistics, on SciPy.

``scipy.stats`` is imported where it is used: it takes about a second, which commands that only
print their help or configuration should not wait for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval of a success rate.

    Unlike the usual normal interval it holds its coverage for few tasks and for rates near 0 or
    1, and never leaves [0, 1] (Wilson 1927; Brown, Cai and DasGupta 2001).

    Args:
        successes: number of successes, ``0 <= successes <= n``.
        n: number of independent trials.
        confidence: coverage, in (0, 1).

    Returns:
        Lower and upper bound; (0, 1) when ``n`` is 0, since nothing is known.

    Raises:
        ValueError: an argument is out of range.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n, got {successes} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly in (0, 1), got {confidence}")
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    The null hypothesis: a problem on which two runs differ is equally likely to fall on either
    side.

    Args:
        only_first: problems that only the first run solved.
        only_second: problems that only the second run solved.
    """
    from scipy.stats import binomtest

    differing = only_first + only_second
    return float(binomtest(only_first, differing).pvalue) if differing else 1.0


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, confidence: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Returns the percentile interval of the mean, by drawing values with replacement.

    The order of the values does not matter.

    Args:
        values: one per independent unit: per problem (for example its avg@k), never per sample,
            since samples of one problem are not independent.
        seed: seed of the draws.
        confidence: coverage, in (0, 1).
        resamples: number of draws.

    Raises:
        ValueError: there are no values.
    """
    from scipy.stats import bootstrap

    data = np.sort(np.asarray(values, dtype=np.float64))
    if not len(data):
        raise ValueError("an interval needs at least one value")
    if len(data) == 1:  # which SciPy refuses
        return float(data[0]), float(data[0])
    interval = bootstrap(
        (data,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // len(data)),  # bounds memory, not the result
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def bootstrap_confidence(n: int) -> float:
    """Returns the confidence at which a percentile bootstrap of n values covers 95 %.

    Percentile intervals of few values are too narrow. Widening them by sqrt(n / (n - 1)) times
    the ratio of the t to the normal quantile corrects most of it (Hesterberg 2015, "What teachers
    should know about the bootstrap", section 5.3).

    Raises:
        ValueError: fewer than two values.
    """
    from scipy.stats import norm, t

    if n < 2:
        raise ValueError(f"an interval over seeds needs at least two, got {n}")
    return float(1 - 2 * norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1)))
