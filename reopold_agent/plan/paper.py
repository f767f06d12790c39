"""Compares the paper's GPU-hours with the plan's (appendices C and D)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from reopold_agent.plan.estimate import Plan
from reopold_agent.plan.hardware import Rate, Rates

FITTED_ON = "paper_math_1_5b"
"""The only setting to which the two constants of `hardware` are fitted: its GPU-hours, and the
share of generation (appendix D)."""

GENERATION_SHARE = 0.773
"""Share of generation in a step of mathematics with 8192 tokens; the paper does not name the
student."""


@dataclass(frozen=True)
class PaperRun:
    """GPU-hours of a setting in the paper, and the teacher's share of a step if it is given."""

    gpu_hours: float
    teacher: float | None


PAPER_RUNS: Mapping[str, PaperRun] = {
    "paper_math_1_5b": PaperRun(200, 0.082),
    "paper_math_7b": PaperRun(312, 0.082),
    "paper_agentic": PaperRun(120, None),
    "paper_geometry_3b": PaperRun(20, 0.218),
    "paper_geometry_7b": PaperRun(24, 0.218),
}
"""From appendix C. The shares are from appendix D, which gives them for mathematics and for visual
reasoning without naming the student."""


def fit(plan: Callable[[Rates], Plan], rates: Rates) -> tuple[float, float]:
    """Fits two constants to the paper's GPU-hours and share of generation.

    Args:
        plan: makes the plan of `FITTED_ON` at given rates, with the schedule "shared".
        rates: initial rates; the memory bandwidth is not fitted.

    Returns:
        FLOP/s per GPU, and seconds of a decoding iteration.
    """
    start = plan(rates)
    hours = PAPER_RUNS[FITTED_ON].gpu_hours
    step = hours * 3600 / (start.config.steps * start.layout.gpus)

    def trial(compute: float, iteration: float) -> Plan:
        return plan(
            replace(
                rates,
                train=Rate(compute, "fit"),
                score=Rate(compute, "fit"),
                iteration=Rate(iteration, "fit"),
            )
        )

    # Generation hardly depends on the first constant, and the other parts not on the second.
    compute, iteration = rates.train.value, rates.iteration.value
    for _ in range(20):
        seconds = trial(compute, iteration).seconds
        rest = seconds.teacher + seconds.old_logp + seconds.update
        compute *= rest / (step * (1 - GENERATION_SHARE) - seconds.sync - seconds.switch)
        without, with_one = (trial(compute, x).seconds.generate for x in (0.0, 1.0))
        iteration = (step * GENERATION_SHARE - without) / (with_one - without)
    return compute, iteration
